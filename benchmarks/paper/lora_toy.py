"""The paper's Figure 13: the two learning rates of LoRA, on the toy problem of LoRA+.

A network x ↦ c·φ((V + BA)φ(Wx)) of width n = 1,000, φ = ReLU, frozen but for the adapters A (20 ×
n, random) and B (n × 20, zero), on y = sin(Σ x_i / d) + noise of d = 5 inputs; 1,000 examples each
for training, validation and test, full batches, Adam. (The paper's own listing was not at hand:
sizes are those of LoRA+, arXiv 2402.12354, with its width raised to the paper's n.)

A grid of constant rates for A and B; the best of all, the best equal ones and the best with B at
ten times the rate of A (LoRA+ has sixteen), by validation loss; and where `hidlr` takes its two
rates, nothing tuned.

    python -m benchmarks.paper.lora_toy --out lora_toy.jsonl
    python -m benchmarks.paper.lora_toy --out lora_toy.jsonl --report --figure lora_toy.png
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hidlr_optax as hd
from benchmarks.kit.loop import Problem, given, job, watched
from benchmarks.kit.rivals import line_search
from benchmarks.kit.store import Job, Row, Store, arguments, rounded
from benchmarks.kit.tables import finite_mean, markdown, mean_sd

FIELDS = ("method", "rate_A", "rate_B", "width", "steps")
LABELS = {"A": "A", "B": "B"}
INPUTS, RANK, EXAMPLES, NOISE = 5, 20, 1000, 0.1
RATES = tuple(10.0 ** (n / 2) for n in range(-9, -1))  # half a decade apart
CHECKS, DIGITS = 20, 8


class Size(NamedTuple):
    """n, and the steps of a run."""

    width: int
    steps: int


class Examples(NamedTuple):
    """What the frozen layers make of inputs: h = φ(Wx) and Vh, (examples, n), and the targets."""

    hidden: jax.Array
    frozen: jax.Array
    targets: jax.Array


def problem_of(size: Size, key: jax.Array) -> Problem:
    """The problem, and the adapters to begin with."""
    width = size.width
    inner, middle, outer, start, *parts = jax.random.split(key, 7)
    first = jax.random.normal(inner, (INPUTS, width)) / np.sqrt(INPUTS)
    second = jax.random.normal(middle, (width, width)) / np.sqrt(width)
    splits = {}
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        ours, noise = jax.random.split(part)
        x = jax.random.normal(ours, (EXAMPLES, INPUTS))
        y = jnp.sin(x.sum(1) / INPUTS) + NOISE * jax.random.normal(noise, (EXAMPLES,))
        hidden = jax.nn.relu(x @ first)
        splits[name] = Examples(hidden, hidden @ second, y)
    adapters = {
        "A": jax.random.normal(start, (width, RANK)) / np.sqrt(width),
        "B": jnp.zeros((RANK, width)),
    }
    last = jax.random.normal(outer, (width,)) / np.sqrt(width)

    def loss(params: Any, batch: Examples) -> jax.Array:
        adapted = batch.frozen + batch.hidden @ params["A"] @ params["B"]
        return jnp.mean((jax.nn.relu(adapted) @ last - batch.targets) ** 2)

    return Problem(lambda _: adapters, loss, size.steps, splits)


def train(rule: Any, size: Size, key: jax.Array) -> dict[str, jax.Array]:
    """One run: losses at the end, and rates and training losses on the way."""
    problem = problem_of(size, key)

    def look(kept: None, params: Any, state: Any, losses: jax.Array) -> Any:
        del params
        rates = optax.tree.get(state, "group_learning_rates", default={"A": 0.0, "B": 0.0})
        # Sorted by name: A and B, or one rate for both.
        now = jnp.stack([jnp.float32(list(rates.values())[place]) for place in (0, -1)])
        return kept, (now, losses[-1])

    tx = optax.chain(optax.adam(1.0), rule)
    (params, _), _, (rates, losses) = watched(problem, tx, key, CHECKS, look)
    ends = {name: problem.loss(params, batch) for name, batch in problem.splits.items()}
    return ends | {"rates": rates, "losses": losses}


def constant_job(size: Size) -> Callable[[float, float], Job]:
    """Of two rates; all share one compilation."""

    def run(rates: jax.Array, key: jax.Array) -> Any:
        return train(given({"A": rates[0], "B": rates[1]}), size, key)

    compiled = functools.cache(lambda: jax.jit(run))

    def of_rates(a: float, b: float) -> Job:
        def execute(seed: int) -> list[Row]:
            return [rounded(compiled()(jnp.array([a, b]), jax.random.key(seed)), DIGITS)]

        return Job({"method": "grid", "rate_A": a, "rate_B": b} | size._asdict(), execute)

    return of_rates


def rule_job(method: str, rule: Any, size: Size) -> Job:
    """Of a rule that finds its rates."""
    key = {"method": method, "rate_A": None, "rate_B": None} | size._asdict()
    told = functools.partial(rounded, digits=DIGITS)
    return job(key, functools.partial(train, rule, size), told)


def rules(steps: int) -> dict[str, Any]:
    """Nothing tuned."""
    cosine = optax.cosine_decay_schedule(1.0, steps)
    return {
        "hidlr": hd.hidlr(None, LABELS),
        "hidlr, cosine": hd.hidlr(None, LABELS, schedule=cosine),
        "one rate": hd.hiulr(None),
        "one rate, cosine": hd.hiulr(None, schedule=cosine),
        "backtracking line search": line_search(),
    }


def jobs(size: Size, rates: tuple[float, ...]) -> list[Job]:
    """The grid, and the rules."""
    constant = constant_job(size)
    found = [constant(a, b) for a, b in itertools.product(rates, rates)]
    return found + [rule_job(method, rule, size) for method, rule in rules(size.steps).items()]


Pair = tuple[float, float]  # η_A, η_B
Grid = dict[Pair, list[Row]]


def by_method(rows: list[Row]) -> tuple[Grid, dict[str, list[Row]]]:
    """The runs of constant rates, and those of the rules."""
    grid: Grid = {}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == "grid":
            grid.setdefault((row["rate_A"], row["rate_B"]), []).append(row)
        else:
            found.setdefault(row["method"], []).append(row)
    return grid, found


def best(grid: Grid, ratio: float | None = None) -> Pair:
    """By validation loss; of the pairs of this η_B/η_A alone, where one is given."""
    pairs = [(a, b) for a, b in grid if ratio is None or np.isclose(b / a, ratio)]
    return min(pairs, key=lambda pair: finite_mean(row["validation"] for row in grid[pair]))


def table(rows: list[Row]) -> str:
    """Markdown: what is best by validation loss, and the rules."""
    grid, found = by_method(rows)
    chosen = {
        "best pair": best(grid),
        "best equal pair": best(grid, 1.0),
        "LoRA+: B at ten times the rate of A": best(grid, 10.0),
    }
    runs = {f"{name} ({a:.1g}, {b:.1g})": grid[a, b] for name, (a, b) in chosen.items()} | found
    lines = []
    for name, repeats in runs.items():
        losses = [[row[split] for row in repeats] for split in ("train", "test")]
        lines.append([name, len(repeats), *(mean_sd(values, 4, ddof=1) for values in losses)])
    return markdown(["rates of A and B", "seeds", "train loss", "test loss"], lines)


def draw(rows: list[Row], path: Path) -> None:
    """The plane of the two rates: test losses, and the ways of `hidlr`."""
    grid, found = by_method(rows)
    rates = sorted({a for a, _ in grid})
    losses = np.array([[finite_mean(r["test"] for r in grid[a, b]) for a in rates] for b in rates])
    figure = Figure(figsize=(11, 5), layout="constrained")
    plane, curves = figure.subplots(1, 2)
    ratio = losses / losses.min()
    colours: Any = {"shading": "nearest", "cmap": "viridis", "vmin": 1, "vmax": 2}
    shown = plane.pcolormesh(rates, rates, ratio, **colours)
    label = "test loss of constant rates, over the least; 2 and more"
    figure.colorbar(shown, ax=plane, label=label, extend="max")
    for method, colour in (("hidlr", "tab:orange"), ("hidlr, cosine", "tab:red")):
        for n, row in enumerate(found[method]):
            way = np.array(row["rates"])
            label = method if n == 0 else None
            plane.plot(way[:, 0], way[:, 1], color=colour, linewidth=1, label=label)
            plane.plot(*way[-1], marker="o", color=colour)
    plane.plot(rates, rates, color="white", linestyle=":", linewidth=1, label="one rate")
    plane.set(xscale="log", yscale="log", xlabel="learning rate of A", ylabel="learning rate of B")
    plane.legend(fontsize=8)
    a, b = best(grid)
    for name, repeats in ({f"best pair ({a:.1g}, {b:.1g})": grid[a, b]} | found).items():
        ways = np.array([row["losses"] for row in repeats])
        steps = np.arange(1, ways.shape[1] + 1) * repeats[0]["steps"] / ways.shape[1]
        (line,) = curves.plot(steps, ways.mean(0), label=name, linewidth=1)
        curves.fill_between(steps, ways.min(0), ways.max(0), color=line.get_color(), alpha=0.15)
    curves.set(yscale="log", xlabel="step", ylabel="training loss: mean and range of the seeds")
    curves.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parses the arguments."""
    told = {"full": "five times the steps", "quick": "a few steps of a narrow network"}
    args = arguments(__doc__, "lora_toy.jsonl", **told, figure=True)
    size, rates = Size(1000, 200), RATES
    if args.full:
        size = Size(1000, 1000)
    if args.quick:
        size, rates, args.seeds = Size(32, CHECKS), RATES[::2], 1
    store = Store(args.out, FIELDS)
    if not args.report:
        store.run(jobs(size, rates), range(args.seeds), "LoRA toy")
    rows = store.rows()
    if rows:
        print(table(rows))
        if args.figure is not None:
            draw(rows, args.figure)


if __name__ == "__main__":
    main()
