"""Steps and work to a target, by AlgoPerf's rules, from rows of `robustness`: AdamW's direction.

The target of a workload is the validation loss that the worst of four tuned schedules ends at:
constant, linear, cosine, and cosine after a warm-up, each with the best of seven rates by its last
validation loss. What counts is the first of twenty checks that meets it, as a part of the run; of
seeds the median, and a run that never does counts as infinite. A profile says on which share of the
workloads a method needs no more than τ times the steps of the fastest; its score is the mean of
that share over τ from 1 to 4. In forward passes, a step is worth three, and a rule's looks at the
loss come on top.
"""

import collections
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.kit.costs import STEP
from benchmarks.kit.store import Row
from benchmarks.kit.tables import markdown

FACTORS = np.linspace(1, 4, 301)  # τ
TUNED = "AdamW, {}, tuned"

Runs = dict[str, dict[str, list[Row]]]  # workload -> method -> the rows of its seeds


def _last(rows: list[Row]) -> float:
    """The mean of the last validation losses; infinite where one is not finite."""
    losses = [row["curve"][-1] for row in rows]
    return float(np.mean(losses)) if np.all(np.isfinite(losses)) else np.inf


def tuned(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Workload -> schedule -> the runs of its best rate."""
    settings = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        settings[row["workload"], row["schedule"]][row["rate"]].append(row)
    best = collections.defaultdict(dict)
    for (workload, schedule), rates in settings.items():
        best[workload][schedule] = min(rates.values(), key=_last)
    return best


def runs(rows: list[Row], methods: Collection[str]) -> tuple[Runs, dict[str, float]]:
    """The tuned schedules and these methods, and the target of each workload."""
    known = [row for row in rows if "curve" in row]
    adamw = [row for row in known if row.get("optimizer", "AdamW") == "AdamW"]
    grids = tuned([row for row in adamw if row["method"] == "grid"])
    found: Runs = {
        workload: {TUNED.format(name): same for name, same in schedules.items()}
        for workload, schedules in grids.items()
    }
    targets = {workload: max(map(_last, same.values())) for workload, same in found.items()}
    for row in adamw:
        if row["method"] in methods and row["workload"] in found:
            found[row["workload"]].setdefault(row["method"], []).append(row)
    return found, targets


def part(row: Row, target: float) -> float:
    """The part of a run after which its validation loss meets the target; infinite if never."""
    met = np.flatnonzero(np.array(row["curve"]) <= target)
    return (met[0] + 1) / len(row["curve"]) if len(met) else np.inf


def steps(row: Row) -> float:
    """What a step of a run costs, in steps."""
    del row
    return 1.0


def forward_passes(row: Row) -> float:
    """What a step of a run costs, in forward passes."""
    return row.get("forwards a step", STEP)


def parts(
    found: Runs, targets: dict[str, float], price: Callable[[Row], float] = steps
) -> dict[str, np.ndarray]:
    """Method -> the median part on each workload times its price; infinite where it has not run."""
    methods = dict.fromkeys(method for here in found.values() for method in here)

    def median(workload: str, method: str) -> float:
        same = found[workload].get(method, [])
        seeds = [part(row, targets[workload]) * price(row) for row in same]
        return float(np.median(seeds)) if seeds else np.inf

    return {method: np.array([median(name, method) for name in found]) for method in methods}


def profile(all_parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Method -> the share of workloads that it meets within each τ of the fastest."""
    fastest = np.min(list(all_parts.values()), axis=0)
    # A workload that nobody meets says nothing of anyone: no share counts it.
    return {
        method: np.array([np.mean((x <= factor * fastest) & np.isfinite(x)) for factor in FACTORS])
        for method, x in all_parts.items()
    }


def table(found: Runs, targets: dict[str, float]) -> str:
    """Markdown, the best score first; a part per workload, in percent."""
    all_parts = parts(found, targets)
    shares, by_work = profile(all_parts), profile(parts(found, targets, forward_passes))
    order = sorted(all_parts, key=lambda method: -shares[method].mean())

    def told(x: float) -> str:
        return f"{100 * x:.0f}" if np.isfinite(x) else "–"

    lines = [
        [
            method,
            f"{shares[method].mean():.2f}",
            f"{by_work[method].mean():.2f}",
            f"{np.isfinite(all_parts[method]).sum()} of {len(found)}",
            *map(told, all_parts[method]),
        ]
        for method in order
    ]
    return markdown(["method", "score", "by forward passes", "met", *found], lines)


def draw(shares: dict[str, np.ndarray], path: Path) -> None:
    """The profiles, the best of them in the legend first."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for n, method in enumerate(sorted(shares, key=lambda name: -shares[name].mean())):
        ours = method.startswith("hidlr")
        axis.plot(
            FACTORS,
            shares[method],
            label=f"{method}: {shares[method].mean():.2f}",
            color=colours[n % len(colours)],
            linewidth=2.5 if ours else 1.3,
            linestyle="-" if ours else "--",
        )
    axis.set(xlabel="τ: steps to the target over those of the fastest", ylabel="share of workloads")
    axis.set(xlim=(1, 4), ylim=(0, 1.02))
    figure.legend(loc="outside right", fontsize=8)  # pyright: ignore[reportArgumentType]
    figure.savefig(path, dpi=150)
