"""Many tasks at once, one learning rate for the head of each (the paper's section 4.2).

Two problems: the 14 labels of yeast genes, and 40 yes-no questions about handwritten digits, asked
of the frozen features of a pretrained vision transformer (DINOv2-small), which are computed once
and cached. Compares `optax.chain(optax.adamw(1.0), hidlr(...))`, K = 14 and K = 40 groups and
nothing tuned, with AdamW at a grid of constant, cosine and warmed-up rates, tuned on validation
data.

    python -m benchmarks.paper.multitask
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit import training
from benchmarks.kit.loop import Method
from benchmarks.problems import data
from benchmarks.problems.models import vit

BATCH_SIZE = 64
GRID = (3e-3, 1e-2, 3e-2, 1e-1)


class Problem(NamedTuple):
    """Inputs (n, width), and the 0-1 answers (n, tasks)."""

    inputs: np.ndarray
    answers: np.ndarray


class Heads(nnx.Module):
    """A linear head for each task; nothing is shared."""

    def __init__(self, width: int, tasks: int, rngs: nnx.Rngs):
        self.heads = nnx.List([nnx.Linear(width, 1, rngs=rngs) for _ in range(tasks)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, width) -> (n, tasks) logits."""
        return jnp.concatenate([head(x) for head in self.heads], axis=1)


def label_by_task(params: Any) -> Any:
    """`heads/3/kernel` and `heads/3/bias` are of task 3."""
    tasks = len(params["heads"])
    digits = len(str(tasks - 1))
    return hd.label_by_path(params, [(f"heads/{k}/.*", f"{k:0{digits}}") for k in range(tasks)])


def questions(images: data.Images) -> np.ndarray:
    """40 yes-no questions about each digit: 14 of its value, 10 of its shape, 16 of its places."""
    pixels, digits = images
    is_digit = [digits == digit for digit in range(10)]
    prime, round_ = np.isin(digits, (2, 3, 5, 7)), np.isin(digits, (0, 6, 8, 9))
    kinds = [digits % 2 == 0, digits >= 5, prime, round_]
    ink = pixels.sum((1, 2))
    rows, columns = pixels.sum(2) / ink[:, None], pixels.sum(1) / ink[:, None]
    place = np.arange(28)
    y, x = rows @ place, columns @ place
    cells = pixels.reshape(-1, 4, 7, 4, 7).sum((2, 4)).reshape(-1, 16)
    measures = [
        ink,
        rows.max(1),
        columns.max(1),
        y,
        x,
        rows @ place**2 - y**2,
        columns @ place**2 - x**2,
        np.einsum("nij,i,j->n", pixels, place, place) / ink - x * y,
        np.abs(pixels - pixels[:, :, ::-1]).sum((1, 2)) / ink,
        np.abs(pixels - pixels[:, ::-1]).sum((1, 2)) / ink,
        *cells.T,
    ]
    large = [measure > np.median(measure) for measure in measures]
    return np.stack([*is_digit, *kinds, *large], axis=1).astype(np.float32)


def features(images: np.ndarray) -> np.ndarray:
    """(n, 384) class tokens of DINOv2-small, from the cache if they are there."""
    cached = data.CACHE / "dinov2-mnist.npy"
    if cached.exists():
        return np.load(cached)
    model = vit.load_dinov2(rngs=nnx.Rngs(0))
    encode = nnx.jit(lambda model, batch: model(batch)[:, 0])
    parts = np.array_split(images, range(50, len(images), 50))
    found = [
        np.asarray(encode(model, vit.normalise(part)))
        for part in tqdm(parts, "features", disable=None)
    ]
    np.save(cached, np.concatenate(found))
    return np.load(cached)


def digits() -> Problem:
    """The questions, asked of frozen features of 5,000 MNIST images."""
    images = data.mnist()
    return Problem(features(images.images), questions(images))


def yeast() -> Problem:
    """2,417 genes with 103 features and 14 labels."""
    return Problem(*data.yeast())


def loss_fn(model: Heads, batch: Any) -> jax.Array:
    """Mean cross-entropy over examples and tasks."""
    inputs, answers = batch
    return optax.sigmoid_binary_cross_entropy(model(inputs), answers).mean()


@nnx.jit
def predict(model: Heads, inputs: jax.Array) -> jax.Array:
    """(n, tasks) logits."""
    return model(inputs)


def make_task(problem: Problem) -> training.Task:
    """60/20/20 of its rows; features standardised."""
    order = np.random.default_rng(0).permutation(len(problem.inputs))
    cuts = [len(order) * 3 // 5, len(order) * 4 // 5]
    train, validation, test = np.split(order, cuts)
    rows = {"train": train, "validation": validation, "test": test}
    known = problem.inputs[train]
    inputs = ((problem.inputs - known.mean(0)) / (known.std(0) + 1e-6)).astype(np.float32)

    def batch(seed: int, step: int) -> Any:
        chosen = np.random.default_rng((seed, step)).choice(train, BATCH_SIZE)
        return inputs[chosen], problem.answers[chosen]

    def evaluate(model: Heads, part: str) -> dict[str, float]:
        truth = problem.answers[rows[part]]
        logits = np.asarray(predict(model, inputs[rows[part]]), np.float64)
        right = ((logits > 0) == truth).mean(0)
        loss = float(np.mean(np.logaddexp(0, logits) - truth * logits))
        mean, least = float(right.mean()), float(right.min())
        return {"score": -loss, "accuracy": mean, "worst task": least, "loss": loss}

    def build(seed: int) -> Heads:
        return Heads(inputs.shape[1], problem.answers.shape[1], nnx.Rngs(seed))

    return training.Task(build, nnx.Param, loss_fn, batch, evaluate)


def methods(steps: int) -> list[Method]:
    """Tuned baselines, and rules that need no tuning."""
    given = optax.chain(optax.adamw(1.0), training.given_rates(training.label_all))
    found = training.baselines(GRID, steps, given, {"all": 1.0})
    decay = optax.cosine_decay_schedule(1.0, steps)
    rules = {
        "Hi-ULR": hd.hiulr(None),
        "Hi-ULR, cosine": hd.hiulr(None, schedule=decay),
        "Hi-DLR": hd.hidlr(None, label_by_task),
        "Hi-DLR, cosine": hd.hidlr(None, label_by_task, schedule=decay),
    }
    return found + training.untuned(rules)


def main() -> None:
    """Runs everything."""
    parser = training.arguments(__doc__, "multitask", steps=300)
    args = training.parse(parser)
    compared = training.offered(args, methods(args.steps))
    for problem in (yeast, digits):
        print(f"\n{problem.__doc__}\n")
        part = argparse.Namespace(**vars(args) | {"out": args.out / problem.__name__})
        training.main(make_task(problem()), compared, part)


if __name__ == "__main__":
    main()
