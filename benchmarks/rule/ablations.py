"""What a reviewer would take away or change of `hidlr`, one thing at a time.

On digits (an MLP, one fifth of the labels wrong) with AdamW and on an additive model with SGD,
cosine schedule, three seeds: no schedule, K, Φ, momentum and weight decay in the direction.

    python -m benchmarks.rule.ablations --out ablations.jsonl
    python -m benchmarks.rule.ablations --out ablations.jsonl --report
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import SCHEDULES, Method, Problem, plain, train
from benchmarks.kit.store import Job, Row, Store, arguments
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.problems.small import PROBLEMS, neighbours

FIELDS = ("problem", "variant", "steps")
DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "digits, 20 % noise": lambda: optax.adamw(1.0),
    "synthetic NAM": lambda: optax.sgd(1.0),
}


def _halves(problem: Problem) -> Any:
    del problem
    return functools.partial(neighbours, groups=2)


def _leaves(problem: Problem) -> Any:
    del problem
    return lambda params: neighbours(params, groups=len(jax.tree.leaves(params)))


class Variant(NamedTuple):
    """A change.

    Attributes:
      labels: problem -> the groups.
      interval: Φ.
      schedule: a key of `SCHEDULES`.
      base: in place of the problem's own optimizer.
    """

    labels: Callable[[Problem], Any] = lambda problem: problem.labels
    interval: int = 10
    schedule: str = "cosine"
    base: Callable[[], optax.GradientTransformation] | None = None


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "default, no schedule": Variant(schedule="constant"),
    "default, one group": Variant(lambda problem: "all"),
    "default, two groups": Variant(_halves),
    "default, a group for each leaf": Variant(_leaves),
    **{f"default, Φ = {n}": Variant(interval=n) for n in (1, 4, 40)},
    "default, momentum in the direction": Variant(base=lambda: optax.sgd(1.0, momentum=0.9)),
    "default, weight decay 0.1 in the direction": Variant(
        base=lambda: optax.adamw(1.0, weight_decay=0.1)
    ),
}


def job(name: str, variant: str, steps: int | None) -> Job:
    """One variant; all seeds share a compilation."""
    changed = VARIANTS[variant]

    @functools.cache
    def compiled() -> Any:
        problem = PROBLEMS[name]()
        problem = problem if steps is None else problem._replace(steps=steps)
        known: dict[str, Any] = {"schedule": SCHEDULES[changed.schedule](problem.steps)}
        labels = changed.labels(problem)
        rule = hd.hidlr(problem.loss, labels, update_interval=changed.interval, **known)
        tx = optax.chain((changed.base or DIRECTIONS[name])(), rule)
        return jax.jit(lambda key: train(problem, Method(tx), key)[0])

    def execute(seed: int) -> list[Row]:
        return [plain(compiled()(jax.random.key(seed)))]

    return Job({"problem": name, "variant": variant, "steps": steps}, execute)


def table(rows: list[Row]) -> str:
    """Markdown: test and train loss by problem, mean and standard deviation over seeds."""
    problems = [name for name in DIRECTIONS if any(row["problem"] == name for row in rows)]
    lines = []
    for name in VARIANTS:
        cells: list[str] = []
        for problem in problems:
            found = [row for row in rows if (row["problem"], row["variant"]) == (problem, name)]
            for part in ("test", "train"):
                cells.append(mean_sd([row[part] for row in found], ddof=1) if found else "")
        if any(cells):
            lines.append([name, *cells])
    head = [f"{problem}: {part}" for problem in problems for part in ("test", "train")]
    return markdown(["", *head], lines)


def main() -> None:
    """Parses the arguments."""
    quick = "a few steps of two variants"
    args = arguments(__doc__, "ablations.jsonl", full="five seeds", quick=quick)
    problems, names = list(DIRECTIONS), list(VARIANTS)
    steps, seeds = None, 5 if args.full else args.seeds
    if args.quick:
        problems, names, steps, seeds = problems[:1], names[:2], 20, 1
    store = Store(args.out, FIELDS)
    if not args.report:
        store.run([job(p, name, steps) for p in problems for name in names], range(seeds))
    print(table(store.rows()))


if __name__ == "__main__":
    main()
