"""Full fine-tuning of a pretrained vision transformer (DINOv2-small), two groups at a time.

The groups of the paper's Table 1: head / rest, bias / rest and norm / rest. Compares
`optax.chain(optax.adamw(1.0), hidlr(...))`, with nothing tuned, with AdamW at a grid of constant,
cosine and warmed-up rates, tuned on validation data. By default on 5,000 MNIST images at 56×56
pixels; or on a file with x_train, y_train, x_test and y_test.

    python -m benchmarks.finetune.vision
    python -m benchmarks.finetune.vision --data-dir fashion.npz
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import hidlr_optax as hd
from benchmarks.kit import training
from benchmarks.kit.loop import SCHEDULES, Method, averaging
from benchmarks.problems import data
from benchmarks.problems.models import vit

BATCH_SIZE = 32
GRID = (3e-6, 1e-5, 3e-5, 1e-4)
GROUPS = {"head": r"head/.*", "bias": r".*/bias", "norm": r".*norm.*"}


def load(args: Any) -> dict[str, data.Images]:
    """80/10/10 of MNIST; of a file, a tenth of its training images is for validation."""
    if args.data_dir is None:
        images, test = data.mnist(), None
        shares = (0.8, 0.9)
    else:
        images, test = data.npz(args.data_dir)
        shares = (0.9, 1.0)
    order = np.random.default_rng(0).permutation(len(images.labels))
    cuts = [int(share * len(order)) for share in shares]
    train, validation, rest = map(images.take, np.split(order, cuts))
    splits = {"train": train, "validation": validation, "test": test or rest}
    return {n: x.take(np.arange(64)) for n, x in splits.items()} if args.quick else splits


def loss_fn(model: vit.Classifier, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def predict(model: vit.Classifier, images: jax.Array) -> jax.Array:
    """(n, classes) logits."""
    return model(images)


def make_task(splits: dict[str, data.Images], image_size: int) -> training.Task:
    """The encoder with a new head, on these images."""
    labels = splits["train"].labels
    pretrained = vit.load_dinov2(image_size, rngs=nnx.Rngs(0))

    def build(seed: int) -> vit.Classifier:
        return vit.Classifier(nnx.clone(pretrained), int(labels.max()) + 1, nnx.Rngs(seed))

    def batch(seed: int, step: int) -> Any:
        rows = training.epoch_rows(seed, step, len(labels), BATCH_SIZE)
        return vit.normalise(splits["train"].images[rows], image_size), labels[rows]

    def evaluate(model: vit.Classifier, part: str) -> dict[str, float]:
        images, truth = splits[part]

        def logits(rows: np.ndarray) -> jax.Array:
            return predict(model, vit.normalise(images[rows], image_size))

        guess, loss = training.classified(training.logits_of(logits, len(truth)), truth)
        accuracy = float((guess == truth).mean())
        return {"score": accuracy, "accuracy": accuracy, "loss": loss}

    return training.Task(build, nnx.Param, loss_fn, batch, evaluate)


def methods(steps: int) -> list[Method]:
    """Tuned baselines, and rules that need no tuning."""
    given = optax.chain(optax.adamw(1.0), training.given_rates(training.label_all))
    found = training.baselines(GRID, steps, given, {"all": 1.0})
    cosine: dict[str, Any] = {"schedule": SCHEDULES["cosine"](steps)}
    warm: dict[str, Any] = {"schedule": SCHEDULES["warm-up"](steps)}
    rules = {
        "Hi-ULR": hd.hiulr(None),
        "Hi-ULR, cosine": hd.hiulr(None, **cosine),
        "Hi-ULR, warm-up": hd.hiulr(None, **warm),
    }
    for group, pattern in GROUPS.items():
        labels = functools.partial(hd.label_by_path, rules=((pattern, group),), default="rest")
        rules[f"Hi-DLR {group}/rest, cosine"] = hd.hidlr(None, labels, **cosine)
        rules[f"Hi-DLR {group}/rest, warm-up"] = hd.hidlr(None, labels, **warm)
    untuned = training.untuned(rules)
    return found + untuned + [averaging(m) for m in untuned if m.name == "Hi-ULR"]


def main() -> None:
    """Runs everything."""
    parser = training.arguments(__doc__, "finetune_vision", steps=100)
    parser.add_argument("--data-dir", type=Path, help="an npz file, or the folder it is in")
    parser.add_argument("--image-size", type=int, default=56, help="a multiple of 14 pixels")
    args = training.parse(parser)
    compared = training.offered(args, methods(args.steps))
    with training.bad_input(parser):
        vit.Config(args.image_size)
        task = make_task(load(args), args.image_size)
    training.main(task, compared, args)


if __name__ == "__main__":
    main()
