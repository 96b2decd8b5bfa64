"""The paper's Figure 1: the loss along a step, and what a quadratic makes of it.

An MLP on digits, trained by AdamW with `hidlr` (cosine schedule, nothing tuned). At some
iterations, on one batch: the loss L(w + x η_k u_k) for x from −2 to 4, of each group alone and of
all together, beside −b x + a x²/2 by three estimators: `probes`, of each group alone, so that the
joint step has no coupling (the paper's diagonal); `secant`, of each group in the company of the
others; and the whole Hessian.

    python -m benchmarks.paper.quadratic_fit --out quadratic_fit.jsonl
    python -m benchmarks.paper.quadratic_fit --report --figure quadratic_fit.png
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hidlr_optax as hd
from benchmarks.kit.store import Job, Row, Store, arguments, rounded
from benchmarks.kit.tables import markdown
from benchmarks.problems.small import PROBLEMS
from hidlr_optax._groups import Groups
from hidlr_optax._step_loss import StepLoss

FIELDS = ("iteration", "group", "steps")
PROBLEM, ITERATIONS, STEPS = "digits", (5, 50, 200), 400
PLACES = np.linspace(-2, 4, 61)
TOGETHER = "all together"
ESTIMATORS: dict[str, Any] = {
    "probes": hd.paper.probes(),
    "secant": hd.paper.secant(),
    "Hessian": hd.paper.hessian(),
}


def measured(
    step_loss: StepLoss, rates: jax.Array, slope: jax.Array, value: jax.Array
) -> dict[str, Any]:
    """Losses along each group's step and the joint one, (K + 1, places), and the predictions."""
    ways = jnp.concatenate([jnp.diag(rates), rates[None]])
    places = jnp.asarray(PLACES, jnp.float32)
    losses = jax.vmap(lambda way: jax.lax.map(lambda x: step_loss(x * way), places))(ways)
    found: dict[str, Any] = {"losses": losses - value}
    for name, estimator in ESTIMATORS.items():
        quadratic = estimator.estimate(step_loss, rates, slope=slope, value=value).quadratic
        matrix = jnp.diag(quadratic.curvature)
        if quadratic.coupling is not None:
            matrix += quadratic.coupling
        fall = ways @ slope
        curve = jnp.einsum("ij,jk,ik->i", ways, matrix, ways)
        found[name] = -fall[:, None] * places + curve[:, None] * places**2 / 2
    return found


def run(seed: int, iterations: tuple[int, ...], steps: int) -> list[Row]:
    """One training run, measured at its iterations."""
    problem = PROBLEMS[PROBLEM]()
    labels = problem.labels
    decay = optax.cosine_decay_schedule(1.0, steps)
    direction = optax.adamw(1.0)
    rule = hd.hidlr(problem.loss, labels, schedule=decay)
    start, order = jax.random.split(jax.random.key(seed))
    params = problem.init(start)
    groups = Groups.of(labels, params)

    @jax.jit
    def step(params: Any, states: Any, key: jax.Array) -> Any:
        batch = problem.batch(key)
        value, grad = jax.value_and_grad(problem.loss)(params, batch)
        u, first = direction.update(grad, states[0], params)
        known = {"batch": batch, "value": value, "grad": grad}
        updates, second = rule.update(u, states[1], params, **known)
        return optax.apply_updates(params, updates), (first, second), (u, value, grad, batch)

    @jax.jit
    def measure(params: Any, rates: jax.Array, seen: Any) -> Any:
        u, value, grad, batch = seen
        step_loss = StepLoss(lambda p: problem.loss(p, batch), params, u, groups)
        return measured(step_loss, rates, step_loss.slope(grad), value)

    states, rows = (direction.init(params), rule.init(params)), []
    for n, key in enumerate(jax.random.split(order, max(iterations) + 1)):
        before = params
        params, states, seen = step(params, states, key)
        if n not in iterations:
            continue
        found = jax.tree.map(np.asarray, measure(before, states[1].applied, seen))
        for k, group in enumerate([*groups.names, TOGETHER]):
            lines = rounded({name: value[k] for name, value in found.items()}, 7)
            rows.append({"iteration": n, "group": group, "steps": steps} | lines)
    return rows


def error(row: Row, name: str, x: float) -> float:
    """Of a prediction at a place, as a part of the loss that the step wins at best."""
    place = int(np.argmin(np.abs(PLACES - x)))
    losses = np.array(row["losses"])
    best = -losses[PLACES >= 0].min()
    return abs(row[name][place] - losses[place]) / best if best > 0 else np.nan


def table(rows: list[Row]) -> str:
    """Markdown: median errors over seeds."""
    lines = []
    for iteration, group in dict.fromkeys((row["iteration"], row["group"]) for row in rows):
        found = [row for row in rows if (row["iteration"], row["group"]) == (iteration, group)]
        cells = [
            f"{100 * np.nanmedian([error(row, name, x) for row in found]):.0f} %"
            for name in ESTIMATORS
            for x in (1, 2)
        ]
        lines.append([iteration, group, *cells])
    return markdown(
        ["iteration", "group", *(f"{n}, x = {x}" for n in ESTIMATORS for x in (1, 2))], lines
    )


def draw(rows: list[Row], path: Path) -> None:
    """Panels of the first seed: iterations downwards, groups across."""
    rows = [row for row in rows if row["seed"] == 0]
    iterations = list(dict.fromkeys(row["iteration"] for row in rows))
    names = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 2.6 * len(iterations)), layout="constrained")
    panels = figure.subplots(len(iterations), len(names), squeeze=False)
    for row in rows:
        panel = panels[iterations.index(row["iteration"])][names.index(row["group"])]
        losses = np.array(row["losses"])
        panel.plot(PLACES, losses, color="black", linewidth=2, label="measured")
        for name in ESTIMATORS:
            panel.plot(PLACES, row[name], linestyle="--", linewidth=1, label=name)
        low, high = losses.min(), losses.max()
        panel.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
        panel.axvline(1, color="lightgray", linewidth=1, zorder=0)
        panel.set_title(f"iteration {row['iteration']}, {row['group']}", fontsize=9)
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("x: steps of the present learning rates", fontsize=9)
    figure.supylabel("change of the loss", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parses the arguments."""
    quick = "two iterations of one seed"
    args = arguments(__doc__, "quadratic_fit.jsonl", full="ten seeds", quick=quick, figure=True)
    iterations, steps, seeds = ITERATIONS, STEPS, 10 if args.full else args.seeds
    if args.quick:
        iterations, steps, seeds = (1, 3), 10, 1
    store = Store(args.out, FIELDS)
    if not args.report:
        key = {"iteration": iterations[0], "group": TOGETHER, "steps": steps}
        store.run([Job(key, lambda seed: run(seed, iterations, steps))], range(seeds))
    rows = store.rows()
    print(table(rows))
    if args.figure is not None:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
