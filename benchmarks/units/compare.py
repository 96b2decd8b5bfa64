"""Rules that find learning rates, beside tuned ones: final losses on the problems of this package.

The direction is that of the problem, Adam or momentum, with a cosine schedule.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit import store
from benchmarks.kit.loop import Problem, given, run
from benchmarks.units import more, problems

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "predator_prey": problems.predator_prey,
    "bundle_adjustment": problems.bundle_adjustment,
    "neural_field": problems.neural_field,
    "variational_inference": problems.variational_inference,
    "splats": more.splats,
    "enzyme_kinetics": more.enzyme_kinetics,
    "gaussian_process": more.gaussian_process,
    "wound_healing": more.wound_healing,
}
TUNED = Path(__file__).with_name("tuned.json")
WORST = 1e9  # the loss of a run that is not finite
WORST_RATIO = 1000.0  # in the summary, so that one such run does not decide it


def labels(params: Any) -> Any:
    """One group for each top-level key."""
    return {name: jax.tree.map(lambda _, name=name: name, params[name]) for name in params}


def groups(problem: Problem) -> list[str]:
    """The names of the groups, sorted."""
    return sorted(jax.eval_shape(problem.init, jax.random.key(0)))


def cosine(problem: Problem) -> optax.Schedule:
    """One at the start, zero at the end of the run."""
    return optax.cosine_decay_schedule(1.0, problem.steps)


def train(
    problem: Problem, tx: optax.GradientTransformation, seed: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One run, to be jitted: the final loss, and the rates of the groups if the state has them."""
    params, state = run(problem, tx, jax.random.key(seed))
    return problem.judged(params), optax.tree.get(state, "group_learning_rates", {})


def geometric_mean(losses: Any) -> Any:
    """Over the last axis; what is not finite counts as `WORST`."""
    losses = np.asarray(losses, float)
    return np.exp(np.log(np.clip(np.nan_to_num(losses, nan=WORST), 1e-30, WORST)).mean(-1))


def fixed(problem: Problem, rates: dict[str, Any]) -> optax.GradientTransformation:
    """The direction with a given rate for each group."""
    schedule = optax.scale_by_schedule(cosine(problem))
    return optax.chain(problem.direction(1.0), given(rates), schedule)


def lbfgs() -> optax.GradientTransformationExtraArgs:
    """L-BFGS with Optax's line search, which refuses a batch beside its function."""
    inner = optax.lbfgs()

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        known = {name: extra[name] for name in ("value", "grad", "value_fn")}
        return inner.update(updates, state, params, **known)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def tuned(name: str) -> dict[str, Any]:
    """What `tune` found for a problem.

    Raises:
      KeyError: it has not been tuned.
    """
    rows = json.loads(TUNED.read_text())
    if name not in rows:
        raise KeyError(f"{name} is not in {TUNED.name}: tune it first, with --tune")
    return rows[name]


def transformation(method: str, name: str, problem: Problem) -> optax.GradientTransformation | None:
    """The optimizer of a method; None where it does not apply."""
    names, schedule, prodigy = groups(problem), cosine(problem), optax.contrib.prodigy
    if method.startswith("tuned"):
        row = tuned(name)
        same = method == "tuned, one rate"
        return fixed(problem, dict.fromkeys(names, row["uniform"]) if same else row["rates"])
    if method == "L-BFGS":
        return lbfgs() if problem.deterministic else None
    if method == "Prodigy":
        return prodigy(schedule)
    if method == "Prodigy per group":
        return optax.partition({n: prodigy(schedule) for n in names}, labels)
    rule = {
        "hidlr": lambda: hd.hidlr(problem.loss, labels, schedule=schedule),
        "hiulr": lambda: hd.hiulr(problem.loss, schedule=schedule),
        "Algorithm 1": lambda: hd.paper_hidlr(problem.loss, labels, schedule=schedule),
    }[method]
    return optax.chain(problem.direction(1.0), rule())


METHODS = (
    "tuned, one rate",
    "tuned, one per group",
    "hidlr",
    "hiulr",
    "Prodigy",
    "Prodigy per group",
    "Algorithm 1",
    "L-BFGS",
)


def job(name: str, method: str) -> store.Job | None:
    """The runs of a method on a problem; None where it does not apply."""
    problem = PROBLEMS[name]()
    tx = transformation(method, name, problem)
    if tx is None:
        return None
    compiled = jax.jit(lambda seed: train(problem, tx, seed))

    def execute(seed: int) -> list[store.Row]:
        loss, rates = compiled(seed)
        found = {group: float(f"{float(rate):.3g}") for group, rate in rates.items()}
        return [{"loss": float(loss), "rates": found}]

    return store.Job({"problem": name, "method": method}, execute)


def compare(names: Sequence[str], methods: Sequence[str], seeds: int, out: Path) -> None:
    """Runs what is missing in `out`, and prints a table for each problem and a summary."""
    runs = store.Store(out, ("problem", "method"))
    for name in names:
        for method in methods:
            missing = job(name, method)
            if missing is not None:
                runs.run([missing], range(seeds))
        print(table(name, _chosen(runs.rows(), [name], methods, seeds)), flush=True)
    print(summary(_chosen(runs.rows(), names, methods, seeds)))


def _chosen(
    rows: Iterable[store.Row], names: Sequence[str], methods: Sequence[str], seeds: int
) -> dict[str, dict[str, list[store.Row]]]:
    """Rows by method and problem, in the order that was asked for."""
    chosen: dict[str, dict[str, list[store.Row]]] = {method: {} for method in methods}
    for row in rows:
        if row["problem"] in names and row["method"] in methods and row["seed"] < seeds:
            chosen[row["method"]].setdefault(row["problem"], []).append(row)
    return chosen


def table(name: str, chosen: dict[str, dict[str, list[store.Row]]]) -> str:
    """Final losses on one problem, lower is better, and the rates that the first seed found."""
    best, width = tuned(name), max(map(len, METHODS))
    lines = [
        f"\n{name}: tuned, one rate {best['one rate']:.4g}; one per group {best['per group']:.4g}",
        f"{'final loss':{width}s} {'mean':>9s} {'lowest':>9s} {'highest':>9s} "
        f"{'/one rate':>9s} {'/per group':>10s} {'seconds':>7s}  rates",
    ]
    for method, found in chosen.items():
        if name not in found:
            continue
        losses = [row["loss"] for row in found[name]]
        mean, seconds = geometric_mean(losses), min(row["seconds"] for row in found[name])
        over = f"{mean / best['one rate']:9.2f} {mean / best['per group']:10.2f}"
        rates = " ".join(f"{k} {v:.2g}" for k, v in found[name][0]["rates"].items())
        lines.append(
            f"{method:{width}s} {mean:9.4g} {np.min(losses):9.4g} {np.max(losses):9.4g} "
            f"{over} {seconds:7.1f}  {rates}"
        )
    return "\n".join(lines)


def summary(chosen: dict[str, dict[str, list[store.Row]]]) -> str:
    """Geometric mean over problems of the loss over that of tuned rates per group; lower is better.

    A ratio above `WORST_RATIO` counts as that.
    """
    width = max(map(len, METHODS))
    lines = ["\nloss over that of tuned rates per group, geometric mean over problems"]
    for method, found in chosen.items():
        if found:
            ratios = [
                min(
                    geometric_mean([row["loss"] for row in rows]) / tuned(name)["per group"],
                    WORST_RATIO,
                )
                for name, rows in found.items()
            ]
            lines.append(f"{method:{width}s} {geometric_mean(ratios):8.3f}  of {len(ratios)}")
    return "\n".join(lines)
