"""Paint a photograph as a sum of Gaussians, with one learning rate per group and nothing tuned.

A Gaussian has a position, a scale, a rotation, a colour and an opacity: five groups of parameters
in five units. `optax.chain(optax.adam(1.0), hidlr(...))` finds a rate for each of them. Beside it
run Adam at four rates, the best of which is shown, and Prodigy: one for all parameters, and one for
each group. All have a cosine schedule. Prints a table and draws one figure.

    python examples/quickstart.py
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from tqdm import tqdm

import hidlr_optax as hd

SIZE = 192  # pixels, of the sides of the image
GAUSSIANS = 600
BATCH = 2048  # pixels
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
WINDOW = 10  # steps, over which losses are averaged in the figure
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "black")
STYLES = ("-", "--", "-.", ":", ":")


def photograph() -> jax.Array:
    """A square of the flower that scikit-learn ships: (SIZE, SIZE, 3), colours in [0, 1].

    The photograph is by flickr.com/photos/vultilion, CC BY 2.0.
    """
    image = np.asarray(load_sample_image("flower.jpg"), np.float32)[20:404, 150:534] / 255
    block = 384 // SIZE
    return jnp.asarray(image.reshape(SIZE, block, SIZE, block, 3).mean((1, 3)))


IMAGE = photograph()
GRID = (jnp.arange(SIZE) + 0.5) / SIZE - 0.5
PLACES = jnp.stack(jnp.meshgrid(GRID, GRID), -1).reshape(-1, 2)  # (pixels, 2), from the centre
COLOURS = IMAGE.reshape(-1, 3)


def initial(key: jax.Array) -> dict[str, jax.Array]:
    """Gaussians at random places in the colours found there. Each key is a group."""
    a, b, c = jax.random.split(key, 3)
    pixels = jax.random.choice(a, SIZE * SIZE, (GAUSSIANS,), replace=False)
    spacing = jnp.log(0.6 / np.sqrt(GAUSSIANS))
    return {
        "position": PLACES[pixels],  # in widths of the image
        "scale": spacing + 0.2 * jax.random.normal(b, (GAUSSIANS, 2)),  # logarithms of such widths
        "rotation": jax.random.uniform(c, (GAUSSIANS,), maxval=np.pi),  # radians
        "colour": COLOURS[pixels],
        "opacity": jnp.full(GAUSSIANS, -2.0),  # logits
    }


def render(params: Any, places: jax.Array) -> jax.Array:
    """(n, 2) places -> (n, 3) colours: the sum of all Gaussians.

    Each exponent is a quadratic function of the place, so one product of matrices finds them all.
    """
    cos, sin = jnp.cos(params["rotation"]), jnp.sin(params["rotation"])
    long, short = jnp.exp(-2 * params["scale"].T)
    xx, yy = long * cos**2 + short * sin**2, long * sin**2 + short * cos**2
    xy = (long - short) * cos * sin
    x, y = params["position"].T
    linear = xx * x + xy * y, xy * x + yy * y
    constant = -0.5 * (linear[0] * x + linear[1] * y)
    form = jnp.stack([-0.5 * xx, -xy, -0.5 * yy, *linear, constant])
    a, b = places.T
    powers = jnp.stack([a * a, a * b, b * b, a, b, jnp.ones_like(a)], 1)
    paint = jax.nn.sigmoid(params["opacity"])[:, None] * params["colour"]
    return jnp.exp(jnp.minimum(powers @ form, 0.0)) @ paint


@jax.jit
def loss_fn(params: Any, pixels: jax.Array) -> jax.Array:
    """The mean square error of the colours of these pixels."""
    return jnp.mean((render(params, PLACES[pixels]) - COLOURS[pixels]) ** 2)


class Run(NamedTuple):
    """One training run: the loss at each step, the rates of each group, and how it ended."""

    losses: np.ndarray
    rates: dict[str, np.ndarray]
    final_loss: float
    params: Any
    seconds: float
    words: str


@functools.partial(jax.jit, static_argnames="tx")
def train_step(tx: Any, params: Any, state: Any, key: jax.Array) -> Any:
    """One step. The extra arguments are for hidlr; the others ignore them."""
    pixels = jax.random.randint(key, (BATCH,), 0, SIZE * SIZE)
    loss, grads = jax.value_and_grad(loss_fn)(params, pixels)
    updates, state = tx.update(grads, state, params, batch=pixels, value=loss, grad=grads)
    rates = optax.tree.get(state, "group_learning_rates", {})
    return optax.apply_updates(params, updates), state, (loss, rates)


def train(name: str, tx: optax.GradientTransformation, steps: int) -> Run:
    """Trains from the same Gaussians, on the same batches, whatever the optimizer."""
    tx = optax.with_extra_args_support(tx)
    params = initial(jax.random.key(0))
    state, rows, start = tx.init(params), [], time.perf_counter()
    for key in tqdm(jax.random.split(jax.random.key(1), steps), name, disable=None):
        params, state, row = train_step(tx, params, state, key)
        rows.append(row)
    rows = jax.device_get(rows)
    seconds = time.perf_counter() - start
    return Run(
        losses=np.array([loss for loss, _ in rows]),
        rates={group: np.array([found[group] for _, found in rows]) for group in rows[0][1]},
        final_loss=float(loss_fn(params, jnp.arange(SIZE * SIZE))),
        params=params,
        seconds=seconds,
        words=hd.explain(state) if rows[0][1] else "",
    )


def methods(steps: int) -> dict[str, optax.GradientTransformation]:
    """The optimizers under comparison."""
    cosine = optax.cosine_decay_schedule(1.0, steps)
    labels = {group: group for group in initial(jax.random.key(0))}
    prodigy = optax.contrib.prodigy
    found: dict[str, Any] = {
        "hidlr": optax.chain(optax.adam(1.0), hd.hidlr(loss_fn, labels, schedule=cosine)),
        "Prodigy": prodigy(cosine),
        "Prodigy per group": optax.partition({g: prodigy(cosine) for g in labels}, labels),
    }
    for rate in RATES:
        found[f"Adam {rate:g}"] = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return found


def shown(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs of the figure: of the four rates of Adam, the one that ended lowest."""
    best = min((n for n in runs if n.startswith("Adam")), key=lambda n: runs[n].final_loss)
    return {n: runs[n] for n in ("hidlr", best, "Prodigy", "Prodigy per group")}


def table(runs: dict[str, Run]) -> str:
    """Final losses, less is better, as Markdown."""
    lines = ["| optimizer | final loss, less is better | seconds |", "|---|---|---|"]
    for name, run in runs.items():
        lines.append(f"| {name} | {run.final_loss:.5f} | {run.seconds:.1f} |")
    return "\n".join(lines)


def draw(runs: dict[str, Run], path: Path) -> None:
    """The photograph and three fits; below, the losses and the rates that hidlr found."""
    figure = Figure(figsize=(6.2, 5.0), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.45))
    above, below = parts
    chosen = shown(runs)
    pictures = {"photograph": IMAGE}
    for name, run in list(chosen.items())[:3]:
        image = render(run.params, PLACES).reshape(IMAGE.shape)
        pictures[f"{name}: {run.final_loss:.4f}"] = jnp.clip(image, 0, 1)
    for axes, (title, image) in zip(above.subplots(1, 4), pictures.items(), strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    left, right = below.subplots(1, 2)
    losses = {name: smoothed(run.losses) for name, run in chosen.items()}
    draw_lines(left, losses, widths=[2.4, 1.8, 1.8, 1.8], columns=2)
    left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
    # Each thinner than those below it, since rates of several groups can be the same.
    draw_lines(right, runs["hidlr"].rates, widths=[5, 3.4, 2, 2, 1.6], columns=3)
    right.set(xlabel="step", ylabel="rate before the schedule")
    figure.savefig(path, dpi=160)


def draw_lines(axes: Axes, lines: dict[str, np.ndarray], widths: list[float], columns: int) -> None:
    """Lines on a log scale, with a legend above."""
    looks = zip(lines.items(), widths, STYLES, COLORS, strict=False)
    for (name, line), width, style, color in looks:
        axes.plot(line, style, color=color, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    above: Any = {"loc": "lower center", "bbox_to_anchor": (0.45, 1.0), "ncols": columns}
    axes.legend(frameon=False, fontsize=10, columnspacing=1.0, handlelength=1.8, **above)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The mean of the last `WINDOW` steps, or of as many as there are."""
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    ends = np.arange(1, len(losses) + 1)
    begins = np.maximum(ends - WINDOW, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="the figure")
    args = parser.parse_args()
    runs = {name: train(name, tx, args.steps) for name, tx in methods(args.steps).items()}
    print(table(runs), "hidlr in words:", sep="\n\n")
    print(runs["hidlr"].words)
    draw(runs, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
