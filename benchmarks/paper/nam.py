"""The paper's Figures 5, 11 and 12: neural additive models, one learning rate per feature.

y = β + Σ_k f_k(x_k), each f_k a network 1–100–50–1 with ReLU, K + 1 groups (each f_k, and β).

* synthetic: 10 features, uniform on (−1, 1), of which six count and four do not, noise of standard
  deviation 1; 3,000 examples for training, 1,000 each for validation and test; SGD, batches of 256,
  Φ = 2. The paper's listing of its functions was not at hand: f₁ to f₆ here are of very different
  scale and roughness, as those of sparse additive models are.
* housing: California housing, 8 features, 60/20/20 of its 20,640 rows; Adam, batches of 256, Φ = 8.

The base optimizer at constant, linear and cosine rates, each over a grid of five, chosen by
validation loss; rivals with their recommended settings; the paper's rule to the letter; and `hidlr`
with nothing tuned. 100 epochs as in the paper, and 40; with `--full` 200, as in the paper.

    python -m benchmarks.paper.nam --out nam.jsonl
    python -m benchmarks.paper.nam --out nam.jsonl --report --figure nam.png
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.metrics
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

import hidlr_optax as hd
from benchmarks.kit.loop import Method, Problem, job, watched
from benchmarks.kit.rivals import OTHERS
from benchmarks.kit.store import Job, Row, Store, arguments, rounded
from benchmarks.kit.tables import finite_mean, markdown, mean_sd
from benchmarks.problems import small

FIELDS = ("problem", "method", "rate", "epochs")
BATCH, CHECKS, POINTS = 256, 20, 50
RIVALS = ("Prodigy", "Prodigy, cosine", "D-Adaptation, cosine", "DoG", "schedule-free AdamW")
RIVALS += ("MoMo-Adam",)
COUNTING = 6  # of the synthetic features


class Study(NamedTuple):
    """What is trained, and how.

    Attributes:
      problem: its steps are set by the epochs.
      interval: Φ.
      grid: five rates.
      epochs: by default, of the paper, and of a quick run.
    """

    problem: Problem
    interval: int
    grid: tuple[float, ...]
    epochs: tuple[int, int, int]

    def lasting(self, epochs: int) -> Problem:
        """The problem for so many epochs: a multiple of the number of checks."""
        batches = len(self.problem.everything[0]) // BATCH
        return self.problem._replace(steps=max(epochs * batches // CHECKS, 1) * CHECKS)


def shapes(x: np.ndarray) -> np.ndarray:
    """f_1(x), …, f_10(x), stacked along the last axis; the last four are zero."""
    found = [
        4 * x,
        4 * x**2,
        2 * np.sin(6 * x),
        np.exp(2 * x) / 2,
        2 * np.abs(x),
        10 * x**3 * np.cos(3 * x),
    ]
    return np.stack([*found, *[np.zeros_like(x)] * 4], axis=-1)


def synthetic() -> Study:
    """Six functions and noise; what is known is known in `shapes`."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (5000, 10)).astype(np.float32)
    parts = np.stack([shapes(x[:, k])[:, k] for k in range(10)], axis=1)
    y = (parts.sum(1) + rng.normal(size=len(x))).astype(np.float32)
    cuts = {"train": slice(3000), "validation": slice(3000, 4000), "test": slice(4000, None)}
    splits = {name: (jnp.asarray(x[rows]), jnp.asarray(y[rows])) for name, rows in cuts.items()}
    return Study(_additive(splits, optax.sgd), 2, _rates(1e-3, 1e-1), (100, 100, 2))


def housing() -> Study:
    """Standardised."""
    splits = small.split(small.housing())
    return Study(_additive(splits, optax.adam), 8, _rates(1e-4, 1e-2), (40, 200, 1))


def _rates(lowest: float, highest: float) -> tuple[float, ...]:
    return tuple(float(f"{rate:.2g}") for rate in np.geomspace(lowest, highest, 5))


STUDIES: dict[str, Callable[[], Study]] = {"synthetic": synthetic, "housing": housing}


def init(key: jax.Array, features: int) -> Any:
    """One small network per feature, and β."""
    keys = jax.random.split(key, features)
    nets = {f"f{k:02d}": small.mlp_init((1, 100, 50, 1), keys[k]) for k in range(features)}
    return nets | {"beta": jnp.zeros(())}


def contributions(params: Any, x: jax.Array) -> jax.Array:
    """f_k(x_k), (n, features)."""
    nets = [net for name, net in sorted(params.items()) if name != "beta"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    return jax.vmap(small.mlp, (0, 1), 1)(stacked, x[..., None])[..., 0]


def loss(params: Any, batch: Any) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((contributions(params, x).sum(1) + params["beta"] - y) ** 2)


def _additive(splits: dict[str, Any], direction: Callable[[Any], Any]) -> Problem:
    features = splits["train"][0].shape[1]
    start = functools.partial(init, features=features)
    groups = {"features": small.first_key}
    return Problem(start, loss, 0, splits, BATCH, groupings=groups, direction=direction)


def train(problem: Problem, method: Method, key: jax.Array) -> dict[str, jax.Array]:
    """One run: curves of the losses, rates and influences, and the shapes at the end."""

    def look(kept: None, params: Any, state: Any, losses: jax.Array) -> Any:
        del losses
        seen = method.evaluated(state, params)
        now = {name: loss(seen, batch) for name, batch in problem.splits.items()}
        return kept, now | _watched(state)

    (params, state), _, curves = watched(problem, method.tx, key, CHECKS, look)
    seen = method.evaluated(state, params)
    grid = jnp.linspace(-1, 1, POINTS)[:, None] * _reach(problem)
    refreshes = optax.tree.get(state, "refreshes", default=jnp.zeros((), jnp.int32))
    return curves | {"shapes": contributions(seen, grid), "refreshes": refreshes}


def _watched(state: Any) -> dict[str, jax.Array]:
    """Rates and influences by group, in the order of their names; nothing of others.

    Where no curvature is positive, influence is zero.
    """
    rates = optax.tree.get(state, "group_learning_rates", default=None)
    if rates is None:
        return {}
    found = hd.report.find_state(state).diagnostics
    slope, curvature = (jnp.stack([x[k] for k in rates]) for x in (found.slope, found.curvature))
    worth = jnp.where(curvature > 0, slope**2 / jnp.where(curvature > 0, curvature, 1), 0)
    return {"rates": jnp.stack(list(rates.values())), "influence": worth}


def _reach(problem: Problem) -> jax.Array:
    """The largest |x| of each feature, within three standard deviations."""
    x = problem.everything[0]
    return jnp.minimum(jnp.abs(x).max(0), 3 * jnp.maximum(x.std(0), 1 / 3))


def schedules(steps: int) -> dict[str, Callable[[Any], Any]]:
    """Factors that begin at one."""
    return {
        "constant": lambda count: 1.0,
        "linear": optax.linear_schedule(1.0, 0.0, steps),
        "cosine": optax.cosine_decay_schedule(1.0, steps),
    }


def untuned(problem: Problem, interval: int) -> dict[str, Callable[[], Method]]:
    """Everything that is given no rate."""
    cosine: dict[str, Any] = {"schedule": schedules(problem.steps)["cosine"]}

    def behind(rule: Any, labels: Any = problem.labels, **more: Any) -> Callable[[], Method]:
        def make() -> Method:
            made = rule(loss, labels, update_interval=interval, **more)
            return Method(optax.chain(problem.direction(1.0), made))

        return make

    found = {
        "hidlr": behind(hd.hidlr),
        "hidlr, cosine": behind(hd.hidlr, **cosine),
        "one rate": behind(hd.hidlr, "all"),
        "one rate, cosine": behind(hd.hidlr, "all", **cosine),
        "Algorithm 1": behind(hd.paper_hidlr, init_learning_rate=1e-3, batch_size=1),
        "first version": behind(hd.paper.one_step, curvature=hd.paper.probes(batch_size=1)),
    }
    return found | {name: lambda make=OTHERS[name]: make(problem.steps) for name in RIVALS}


def jobs(name: str, study: Study, epochs: int) -> list[Job]:
    """The grids, and the rules."""
    problem = study.lasting(epochs)

    def tuned(schedule: str) -> Callable[[float], Job]:
        factor = schedules(problem.steps)[schedule]

        def run(rate: jax.Array, key: jax.Array) -> Any:
            parts = problem.direction(1.0), optax.scale_by_schedule(factor), optax.scale(rate)  # pyright: ignore[reportArgumentType]
            return train(problem, Method(optax.chain(*parts)), key)

        compiled = functools.cache(lambda: jax.jit(run))

        def of_rate(rate: float) -> Job:
            key = {"problem": name, "method": schedule, "rate": rate, "epochs": epochs}
            return Job(key, lambda seed: [rounded(compiled()(rate, jax.random.key(seed)), 6)])

        return of_rate

    def given(method: str, make: Callable[[], Method]) -> Job:
        key = {"problem": name, "method": method, "rate": None, "epochs": epochs}
        told = functools.partial(rounded, digits=6)
        return job(key, lambda key: train(problem, make(), key), told)

    compiled = map(tuned, schedules(problem.steps))  # each once, for all rates
    found = [of_rate(rate) for of_rate in compiled for rate in study.grid]
    methods = untuned(problem, study.interval)
    return found + [given(method, make) for method, make in methods.items()]


Runs = dict[str, list[Row]]


def chosen(rows: list[Row], name: str) -> Runs:
    """Method -> its runs on a problem; of a grid, those of the best rate by validation loss."""
    settings: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        if row["problem"] == name:
            settings.setdefault(row["method"], {}).setdefault(row["rate"], []).append(row)

    def last(found: list[Row]) -> float:
        return finite_mean(row["validation"][-1] for row in found)

    best = {
        method: min(runs, key=lambda rate: last(runs[rate])) for method, runs in settings.items()
    }
    return {
        method if rate is None else f"{method}, {rate:.2g}": settings[method][rate]
        for method, rate in best.items()
    }


def separation(row: Row) -> float:
    """How well influence tells features that count from those that do not: the area under ROC.

    Not a number where there are no influences of single features.
    """
    influence = np.array(row.get("influence", [[]]))[:, 1:]  # β comes first by name
    if influence.shape[1] <= COUNTING or not np.all(np.isfinite(influence)):
        return np.nan
    truth = [1] * COUNTING + [0] * (influence.shape[1] - COUNTING)
    return float(sklearn.metrics.roc_auc_score(truth, np.median(influence, axis=0)))


def steps_to(row: Row, target: float) -> float:
    """The part of the run after which the validation loss meets a target; infinite if never."""
    reached = np.flatnonzero(np.array(row["validation"]) <= target)
    return (reached[0] + 1) / len(row["validation"]) if len(reached) else np.inf


def table(rows: list[Row], name: str) -> str:
    """Markdown. The target of the third column is the worst of the tuned schedules' last losses."""
    runs = chosen(rows, name)
    tuned = [
        np.mean([row["validation"][-1] for row in found])
        for method, found in runs.items()
        if method.split(", ")[0] in ("constant", "linear", "cosine") and found[0]["rate"]
    ]
    target, lines = float(max(tuned)), []
    for method, found in runs.items():
        losses = [np.array([row[s][-1] for row in found]) for s in ("train", "test")]
        spread = [mean_sd(x, ddof=1) if np.all(x < 1e6) else "diverged" for x in losses]
        part = float(np.median([steps_to(row, target) for row in found]))
        areas = [separation(row) for row in found if name == "synthetic"]
        seconds = np.median([row["seconds"] for row in found])
        area = f"{np.mean(areas):.2f}" if np.all(np.isfinite(areas)) and areas else ""
        reached = f"{100 * part:.0f} %" if np.isfinite(part) else "never"
        lines.append([method, len(found), *spread, reached, area, f"{seconds:.0f}"])
    head = ["method", "seeds", "train loss", "test loss", "reaches the target after"]
    return markdown([*head, "influence: ROC", "seconds"], lines)


def draw(rows: list[Row], path: Path) -> None:
    """Per problem: test losses, rates and influences by group, and the shapes that were learned."""
    names = [name for name in STUDIES if any(row["problem"] == name for row in rows)]
    colours = list(TABLEAU_COLORS)
    figure = Figure(figsize=(16, 4 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 4, squeeze=False)
    for name, (curves, rates, influence, learned) in zip(names, grid, strict=True):
        runs = chosen(rows, name)
        styles = np.repeat(["-", "--", ":"], len(colours))
        curves.set_prop_cycle(color=3 * colours, linestyle=styles)
        for method, found in runs.items():
            ways = np.array([row["test"] for row in found])
            epochs = np.arange(1, CHECKS + 1) * found[0]["epochs"] / CHECKS
            (line,) = curves.plot(epochs, ways.mean(0), label=method, linewidth=1)
            curves.fill_between(epochs, ways.min(0), ways.max(0), color=line.get_color(), alpha=0.1)
        curves.set(yscale="log", xlabel="epoch", title=f"{name}: test loss")
        ends = [row["test"][place] for found in runs.values() for row in found for place in (0, -1)]
        curves.set_ylim(0.9 * np.nanmin(ends), float(np.nanmedian(ends[::2])))
        curves.legend(fontsize=6, loc="upper right", bbox_to_anchor=(-0.2, 1))
        (row, *_) = runs["hidlr, cosine"]
        epochs = np.arange(1, CHECKS + 1) * row["epochs"] / CHECKS
        labels = ["β", *(f"f{k + 1}" for k in range(len(row["rates"][0]) - 1))]
        for k, label in enumerate(labels):
            dashed = name == "synthetic" and k > COUNTING
            style: Any = {"linestyle": "--" if dashed else "-", "linewidth": 1, "label": label}
            rates.plot(epochs, np.array(row["rates"])[:, k], **style)
            influence.plot(epochs, np.array(row["influence"])[:, k], **style)
        rates.set(yscale="log", xlabel="epoch", title="hidlr, cosine: learning rates")
        limits = 1e-6, 3 * max(float(np.max(row["influence"])), 1e-6)
        title = "influence b²/a (dashed: counts nothing)"
        influence.set(yscale="log", xlabel="epoch", title=title, ylim=limits)
        influence.legend(fontsize=6)
        places = np.linspace(-1, 1, POINTS)
        for k in range(min(len(labels) - 1, COUNTING)):
            shape = np.array(row["shapes"])[:, k]
            (line,) = learned.plot(places, shape - shape.mean(), linewidth=1, label=labels[k + 1])
            if name == "synthetic":
                true = shapes(places)[:, k]
                learned.plot(places, true - true.mean(), ":", color=line.get_color(), linewidth=1)
        learned.set(xlabel="x", title="learned f, centred (dotted: true)")
        learned.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parses the arguments."""
    told = {"full": "the epochs of the paper", "quick": "two epochs of a few methods"}
    args = arguments(__doc__, "nam.jsonl", **told, figure=True)
    problems, seeds = (["synthetic"], 1) if args.quick else (list(STUDIES), args.seeds)
    store = Store(args.out, FIELDS)
    for name in problems if not args.report else ():
        study = STUDIES[name]()
        epochs = study.epochs[2 if args.quick else args.full]
        wanted = jobs(name, study, epochs)
        if args.quick:
            wanted = [job for job in wanted if job.key["method"] in ("cosine", "hidlr, cosine")]
        store.run(wanted, range(seeds), name)
    rows = store.rows()
    for name in STUDIES:
        if any(row["problem"] == name for row in rows):
            print(f"\n{name}\n\n{table(rows, name)}")
    if rows and args.figure is not None:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
