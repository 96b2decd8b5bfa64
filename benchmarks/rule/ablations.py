"""What a reviewer of the paper would take away or change, one thing at a time.

On digits (an MLP, one fifth of the labels wrong) with AdamW and on an additive model with SGD,
cosine schedule, three seeds: the design of the probes, the diagonal against the whole matrix, Φ,
K, the batch that slopes come from, averaging, no schedule, momentum and weight decay in the
direction. The first lines are the default rule. The "first version" is `paper.one_step`, which the
parts below it belong to.

    python -m benchmarks.rule.ablations --out ablations.jsonl
    python -m benchmarks.rule.ablations --out ablations.jsonl --report
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.store import Job, Row, Store, arguments
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.problems.small import WORKLOADS, Workload, neighbours, plain, train

FIELDS = ("problem", "variant", "steps")
PROBLEMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "digits, 20 % noise": lambda: optax.adamw(1.0),
    "synthetic NAM": lambda: optax.sgd(1.0),
}


class Variant(NamedTuple):
    """A change.

    Attributes:
      arguments: of the rule.
      grouping: "finest", that of the workload; "all"; "halves"; or "leaves".
      cosine: whether there is a schedule.
      base: in place of the problem's own optimizer.
      rule: (loss, labels, schedule=, **arguments) -> transformation.
    """

    arguments: Mapping[str, Any] = types.MappingProxyType({})
    grouping: str = "finest"
    cosine: bool = True
    base: Callable[[], optax.GradientTransformation] | None = None
    rule: Callable[..., optax.GradientTransformation] = hd.hidlr


def _first(**arguments: Any) -> Variant:
    """The first version's rule, with something changed."""
    probes = {"curvature": hd.paper.probes(batch_size=1)}
    return Variant(probes | arguments, rule=hd.paper.one_step)


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "default, no schedule": Variant(cosine=False),
    "default, one group": Variant(grouping="all"),
    "default, two groups": Variant(grouping="halves"),
    "default, a group for each leaf": Variant(grouping="leaves"),
    **{f"default, Φ = {n}": Variant({"update_interval": n}) for n in (1, 4, 40)},
    "default, momentum in the direction": Variant(base=lambda: optax.sgd(1.0, momentum=0.9)),
    "default, weight decay 0.1 in the direction": Variant(
        base=lambda: optax.adamw(1.0, weight_decay=0.1)
    ),
    "first version": _first(),
    "first version, random probes": _first(
        curvature=hd.paper.probes(design="gaussian", batch_size=1)
    ),
    "first version, the diagonal alone": _first(solver=hd.paper.diagonal()),
    "first version, the whole Hessian": _first(curvature=hd.paper.hessian(batch_size=1)),
    "first version, slope of the same batch": _first(slope="gradient"),
    "first version, no averaging": _first(ema_decay=0.0),
    "first version, Φ = 1": _first(update_interval=1),
}


def labels_of(workload: Workload, grouping: str) -> Any:
    """As `hidlr` takes them."""
    if grouping == "all":
        return "all"
    if grouping == "finest":
        return next(iter(workload.groupings.values()))
    if grouping == "halves":
        return functools.partial(neighbours, groups=2)
    return lambda params: neighbours(params, groups=len(jax.tree.leaves(params)))


def job(problem: str, name: str, steps: int | None) -> Job:
    """One variant; all seeds share a compilation."""
    variant = VARIANTS[name]

    @functools.cache
    def compiled() -> Any:
        workload = WORKLOADS[problem]()
        workload = workload if steps is None else workload._replace(steps=steps)
        decay = optax.cosine_decay_schedule(1.0, workload.steps) if variant.cosine else None
        rule = variant.rule(
            workload.loss,
            labels_of(workload, variant.grouping),
            schedule=decay,
            **variant.arguments,
        )
        tx = optax.chain((variant.base or PROBLEMS[problem])(), rule)
        return jax.jit(lambda key: train(workload, tx, key)[0])

    def execute(seed: int) -> list[Row]:
        return [plain(jax.tree.map(np.asarray, compiled()(jax.random.key(seed))))]

    return Job({"problem": problem, "variant": name, "steps": steps}, execute)


def table(rows: list[Row]) -> str:
    """Markdown: test and train loss by problem, mean and standard deviation over seeds."""
    problems = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
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
    problems, names = list(PROBLEMS), list(VARIANTS)
    steps, seeds = None, 5 if args.full else args.seeds
    if args.quick:
        problems, names, steps, seeds = problems[:1], names[:2], 20, 1
    store = Store(args.out, FIELDS)
    if not args.report:
        store.run([job(p, name, steps) for p in problems for name in names], range(seeds))
    print(table(store.rows()))


if __name__ == "__main__":
    main()
