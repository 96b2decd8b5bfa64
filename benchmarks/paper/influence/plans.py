"""Chosen plans: by ψ, and transferred from the first layers to all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import hidlr_optax as hd
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.paper.influence.runs import pretrained
from benchmarks.paper.influence.study import Study

PSIS = (1.0, 1.1, 10.0, 500.0, 1000.0, 2000.0)


def plan_row(study: Study, name: str, plans: Sequence[hd.Plan]) -> list[Any]:
    """One line of Table 3: a plan for each seed, and what it comes to."""
    runs = [study.trained(plan, seed) for seed, plan in zip(study.seeds, plans, strict=True)]
    everything = hd.Plan(plans[0].labels, frozenset())
    full, own = study.cost(everything), study.cost(plans[0])
    groups = [", ".join(sorted(plan.trainable)) for plan in plans]
    kinds = "; ".join(sorted(set(groups), key=groups.index))
    # Not the plan's own sizes, which are those of the model that it was made on.
    share = sum(study.sizes[k] for k in plans[0].trainable) / sum(study.sizes.values())
    quality = [name for name in runs[0]["test"] if name not in ("score", "loss")]
    return [
        name,
        "all" if plans[0].trainable == plans[0].labels else kinds,
        f"{100 * share:.2f} %",
        *(mean_sd([run["test"][key] for run in runs]) for key in (*quality, "loss")),
        f"{own['flops'] / full['flops']:.2f}",
        f"{own['bytes'] / full['bytes']:.2f}",
        f"{np.mean([run['seconds'] for run in runs]):.3f}",
    ]


def plan_table(study: Study, rows: Sequence[tuple[str, Sequence[hd.Plan]]]) -> str:
    """Table 3's form."""
    run = study.trained(rows[0][1][0], 0)
    quality = [f"test {name}" for name in run["test"] if name not in ("score", "loss")]
    head = ["chosen by", "trains", "parameters", *quality, "test loss"]
    head += ["FLOPs / full", "memory / full", "seconds a step"]
    return markdown(head, [plan_row(study, *row) for row in rows])


def by_psi(study: Study) -> list[tuple[str, list[hd.Plan]]]:
    """The plans of all ψ that leave a group in each seed."""
    rows = []
    for psi in PSIS:
        plans = [study.select(psi, seed) for seed in study.seeds]
        if all(plans):
            rows.append((f"ψ = {psi:g}", [plan for plan in plans if plan]))
    return rows


def transferred(study: Study, psi: float) -> list[tuple[str, list[hd.Plan]]]:
    """Plans made on smaller models, applied to the whole one by their rules."""
    rows = []
    for small in study.problem.small:
        plans = []
        for seed in study.seeds:
            plan = study.select(psi, seed, small)
            assert plan is not None
            plan.label(pretrained(study.problem.task, seed)[1])  # raises where a rule finds nothing
            plans.append(plan)
        rows.append((f"ψ = {psi:g}, {small}", plans))
    return rows
