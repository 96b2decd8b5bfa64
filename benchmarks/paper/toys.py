"""The paper's Figure 2: two functions of two variables, one learning rate per variable.

An ellipse from (50, 1), and the sum of Beale's and Rosenbrock's functions from (4, 3), 100 steps of
gradient descent each. Hi-DLR (K = 2) and Hi-ULR (K = 1) against the best constant rate of a grid,
Prodigy, D-Adaptation and a line search. Prints a table and draws one figure.

    python -m benchmarks.paper.toys
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hidlr_optax as hd
from benchmarks.kit.loop import Problem, stepper
from benchmarks.kit.rivals import line_search
from benchmarks.kit.tables import markdown
from benchmarks.problems import small

STEPS = 100
GRID = np.logspace(-7, 0, 43)  # six constant rates per decade


class Toy(NamedTuple):
    """A function and what part of the plane to draw."""

    name: str
    problem: Problem
    window: tuple[float, float, float, float]


TOYS = (
    Toy("ellipse", small.ellipse(), (-20.0, 55.0, -1.5, 1.5)),
    Toy("Beale + Rosenbrock", small.beale_rosenbrock(), (-0.5, 4.5, -0.5, 4.0)),
)


def descend(toy: Toy, tx: Any, rate: Any = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The (STEPS + 1, 2) points and their (STEPS + 1,) losses."""
    tx = optax.chain(tx, optax.scale(rate))
    step, start = stepper(toy.problem.loss, tx), toy.problem.init(jax.random.key(0))

    def body(carry: Any, _: None) -> Any:
        point, state, value = step(*carry, None)
        return (point, state), (carry[0], value)

    @jax.jit
    def run(start: Any) -> Any:
        (last, _), (points, losses) = jax.lax.scan(body, (start, tx.init(start)), length=STEPS)
        path = jnp.stack([jnp.append(points[axis], last[axis]) for axis in "xy"], axis=1)
        return path, jnp.append(losses, toy.problem.judged(last))

    return jax.tree.map(np.asarray, run(start))


def best_constant(toy: Toy) -> tuple[float, np.ndarray, np.ndarray]:
    """The rate of the grid with the lowest final loss, its path and its losses."""
    runs = [(rate, *descend(toy, optax.sgd(1.0), rate)) for rate in GRID]
    return min(runs, key=lambda run: np.nan_to_num(run[2][-1], nan=np.inf))


def methods(toy: Toy) -> dict[str, optax.GradientTransformation]:
    """Everything that is compared, except the grid."""
    labels = toy.problem.labels
    shared: dict[str, Any] = {"init_learning_rate": 1e-4, "update_interval": 1}
    # Full gradients of a function that changes fast: nothing to average, and every step counts.
    exact: dict[str, Any] = shared | {
        "slope": "gradient",
        "curvature": hd.paper.probes(per_group=4),
        "solver": hd.paper.diagonal(max_change=None),
        "ema_decay": 0.0,
        "warmup": 0,
    }
    return {
        "Hi-DLR": optax.chain(optax.sgd(1.0), hd.paper.one_step(None, labels, **exact)),
        "Hi-DLR, Algorithm 1": optax.chain(optax.sgd(1.0), hd.paper_hidlr(None, labels, **shared)),
        "Hi-ULR": optax.chain(optax.sgd(1.0), hd.paper.one_step(None, "all", **exact)),
        "Prodigy": optax.contrib.prodigy(1.0),
        "D-Adaptation": optax.contrib.dadapt_adamw(1.0),
        "backtracking line search": optax.chain(optax.sgd(1.0), line_search()),
    }


def compare(toy: Toy) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Path and losses of every method."""
    rate, *constant = best_constant(toy)
    runs = {name: descend(toy, tx) for name, tx in methods(toy).items()}
    return runs | {f"best constant rate ({rate:.2g})": (constant[0], constant[1])}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One row per function: contours with the paths, and the losses above the lowest one."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(len(TOYS), 2)
    for toy, (plane, losses) in zip(TOYS, axes, strict=True):
        left, right, bottom, top = toy.window
        x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
        values = np.asarray(toy.problem.judged({"x": x, "y": y}))
        plane.contour(x, y, np.log(values + 1e-3), levels=25, colors="lightgray", linewidths=0.7)
        lowest = min(np.nanmin(loss) for _, loss in results[toy.name].values())
        for name, (points, loss) in results[toy.name].items():
            plane.plot(points[:, 0], points[:, 1], marker=".", linewidth=1, label=name)
            losses.plot(np.maximum(loss - lowest, 1e-8), label=name)
        plane.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y", title=toy.name)
        losses.set(xlabel="step", ylabel=f"loss − {lowest:.4g}, from 1e-8 up", yscale="log")
        losses.set_ylim(top=1e6)
        losses.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs both functions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("toys.png"), help="the figure")
    args = parser.parse_args()
    results = {toy.name: compare(toy) for toy in TOYS}
    lines = [
        [function, name, f"{losses[10]:.3g}", f"{losses[-1]:.3g}"]
        for function, runs in results.items()
        for name, (_, losses) in runs.items()
    ]
    print(markdown(["function", "method", "loss after 10 steps", "after 100"], lines))
    draw(results, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
