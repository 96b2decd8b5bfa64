"""LoRA fine-tuning of a pretrained sentence encoder (MiniLM), groups lora_A / lora_B / head.

Compares `optax.chain(optax.adamw(1.0), hidlr(...))`, with nothing tuned, with AdamW at a grid of
constant, cosine and warmed-up rates and with LoRA+ (B at sixteen times the rate of A), each of them
tuned on validation data. By default on the sentiment of snippets of movie reviews; or on a task of
GLUE in its standard layout (DIR/CoLA/train.tsv and dev.tsv, …).

    python -m benchmarks.finetune.text
    python -m benchmarks.finetune.text --data-dir DIR --task CoLA
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import hidlr_optax as hd
from benchmarks.kit import training
from benchmarks.kit.loop import SCHEDULES, Method, averaging
from benchmarks.problems import data
from benchmarks.problems.models import bert, lora

BATCH_SIZE = 16
GRID = (3e-4, 1e-3, 3e-3, 1e-2)
LOWER = (1e-4, 3e-4, 1e-3, 3e-3)  # for LoRA+, whose B goes faster
LORA_PLUS = 16.0  # the rate of B over that of A
METRICS = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}


class Batch(NamedTuple):
    """Tokenised texts, their classes, and the dropout key (None: no dropout)."""

    tokens: Any
    labels: Any
    key: jax.Array | None


class Corpus(NamedTuple):
    """Three splits that share no example, and the metrics whose mean is the score."""

    splits: dict[str, tuple[bert.Tokens, np.ndarray]]
    metrics: tuple[str, ...]


def load(args: Any) -> Corpus:
    """Snippets 60/20/20; of GLUE, `dev` is the test set, and a tenth of `train` for validation."""
    if args.data_dir is None:
        texts, metrics = data.snippets(), ("accuracy",)
        order = np.random.default_rng(0).permutation(len(texts.labels))
        parts = np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5])
        train, validation, test = map(texts.take, parts)
    else:
        texts, metrics = data.glue(args.data_dir, args.task, "train"), data.GLUE[args.task].metrics
        order = np.random.default_rng(0).permutation(len(texts.labels))
        validation, train = map(texts.take, np.split(order, [len(order) // 10]))
        test = data.glue(args.data_dir, args.task, "dev")
    splits = {"train": train, "validation": validation, "test": test}
    if args.quick:
        splits = {name: texts.take(np.arange(64)) for name, texts in splits.items()}

    def tokenized(texts: data.Texts) -> tuple[bert.Tokens, np.ndarray]:
        pairs: Any = zip(texts.first, texts.second, strict=True) if texts.second else texts.first
        return bert.tokenize(list(pairs), args.max_length), texts.labels

    return Corpus({name: tokenized(texts) for name, texts in splits.items()}, metrics)


def rows_of(tokens: bert.Tokens, rows: Any) -> bert.Tokens:
    """Those rows of all three arrays."""
    return bert.Tokens(*(array[rows] for array in tokens))


def loss_fn(model: bert.Classifier, batch: Batch) -> jax.Array:
    """Mean cross-entropy."""
    rngs = None if batch.key is None else nnx.Rngs(dropout=batch.key)
    logits = model(*batch.tokens, rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@nnx.jit
def predict(model: bert.Classifier, tokens: Any) -> jax.Array:
    """(n, classes) logits."""
    return model(*tokens)


def make_task(
    corpus: Corpus, dropout: float, rank: int, layers: int | None = None
) -> training.Task:
    """The encoder with LoRA in queries and values and a new head, on this corpus."""
    inputs, labels = corpus.splits["train"]
    pretrained = bert.load_minilm(layers, dropout, rngs=nnx.Rngs(0))

    def build(seed: int) -> bert.Classifier:
        model = bert.Classifier(nnx.clone(pretrained), int(labels.max()) + 1, nnx.Rngs(seed))
        lora.add_lora(model, rank, rngs=nnx.Rngs(seed + 1000))
        return model

    def batch(seed: int, step: int) -> Batch:
        rows = training.epoch_rows(seed, step, len(labels), BATCH_SIZE)
        key = jax.random.fold_in(jax.random.key(seed), step)
        return Batch(rows_of(inputs, rows), labels[rows], key if dropout else None)

    def evaluate(model: bert.Classifier, part: str) -> dict[str, float]:
        tokens, truth = corpus.splits[part]
        logits = training.logits_of(lambda n: predict(model, rows_of(tokens, n)), len(truth))
        guess, loss = training.classified(logits, truth)
        found = {name: float(METRICS[name](truth, guess)) for name in corpus.metrics}
        return {"score": float(np.mean([*found.values()])), **found, "loss": loss}

    return training.Task(build, lora.TRAINED, loss_fn, batch, evaluate)


def methods(steps: int) -> list[Method]:
    """Tuned baselines, and rules that need no tuning."""
    given = optax.chain(optax.adamw(1.0), training.given_rates(hd.label_by_role))
    one: dict[str, float] = dict.fromkeys(("lora_A", "lora_B", "head"), 1.0)
    found = training.baselines(GRID, steps, given, one)
    plus = one | {"lora_B": LORA_PLUS}
    found += training.tuned("LoRA+, warm-up", "warm-up", LOWER, steps, given, plus)
    cosine: dict[str, Any] = {"schedule": SCHEDULES["cosine"](steps)}
    warm: dict[str, Any] = {"schedule": SCHEDULES["warm-up"](steps)}
    rules = {
        "Hi-ULR, cosine": hd.hiulr(None, **cosine),
        "Hi-DLR": hd.hidlr(None, hd.label_by_role),
        "Hi-DLR, cosine": hd.hidlr(None, hd.label_by_role, **cosine),
        "Hi-DLR, warm-up": hd.hidlr(None, hd.label_by_role, **warm),
    }
    untuned = training.untuned(rules)
    return found + untuned + [averaging(m) for m in untuned if m.name == "Hi-DLR"]


def main() -> None:
    """Runs everything."""
    parser = training.arguments(__doc__, "finetune_text", steps=250)
    parser.add_argument("--data-dir", type=Path, help="a folder in GLUE's layout")
    parser.add_argument("--task", default="CoLA", help=f"of GLUE: {', '.join(data.GLUE)}")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a text or pair")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--dropout", type=float, default=0.1)
    args = training.parse(parser)
    compared = training.offered(args, methods(args.steps))
    with training.bad_input(parser):
        task = make_task(load(args), args.dropout, args.rank, layers=2 if args.quick else None)
    training.main(task, compared, args)


if __name__ == "__main__":
    main()
