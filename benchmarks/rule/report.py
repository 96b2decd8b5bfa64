"""What the runs of the suite come to: losses over those of the tuned grid, tables, and a figure."""

import collections
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.kit.loop import AVERAGED
from benchmarks.kit.rivals import OTHERS
from benchmarks.kit.store import Row, identity
from benchmarks.kit.tables import finite_mean, markdown
from benchmarks.rule import targets
from benchmarks.rule.cases import OPTIMIZERS, TOYS
from benchmarks.rule.methods import OF_AVERAGE, RULES

FIELDS = ("method", "workload", "optimizer", "schedule", "grouping", "interval", "scale")
REFERENCE = ("constant", "cosine")  # the schedules that "tuned" is chosen from


def _mean(rows: list[Row], split: str) -> float:
    return finite_mean(row[split] for row in rows)


Runs = dict[Any, list[Row]]


def _chosen(runs: Runs, split: str) -> Any:
    """The setting of least loss on a split."""
    return min(runs, key=lambda setting: _mean(runs[setting], split))


def best_of_grid(rows: list[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """(workload, optimizer) -> mean losses at the setting of least validation loss.

    Of all rates and schedules by the last step, "train" and "test"; of the constant rates alone,
    "constant"; and by the best step of each, "stopped".
    """
    settings: Any = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if row["method"] == "grid" and row["schedule"] in REFERENCE:
            place = row["workload"], row["optimizer"]
            settings[place][row["rate"], row["schedule"]].append(row)
    best = {}
    for place, runs in settings.items():
        chosen = _chosen(runs, "validation")
        constant: Runs = {key: runs[key] for key in runs if key[1] == "constant"}
        best[place] = {split: _mean(runs[chosen], split) for split in ("train", "test")} | {
            "setting": chosen,
            "constant": _mean(constant[_chosen(constant, "validation")], "test"),
            "stopped": _mean(runs[_chosen(runs, "best validation")], "best test"),
        }
    return best


class Outcome(NamedTuple):
    """One method on one case, over the best of the grid.

    Attributes:
      case: which.
      train: loss after the last step.
      test: the same.
      constant: the test loss over that of the best constant rate.
      stopped: the test loss at the best validation step of both.
    """

    case: tuple[Any, ...]
    train: float
    test: float
    constant: float
    stopped: float


def _outcome(
    case: tuple[Any, ...], repeats: list[Row], tuned: dict[str, Any], prefix: str
) -> Outcome:
    test = _mean(repeats, prefix + "test")
    return Outcome(
        case,
        train=_mean(repeats, prefix + "train") / tuned["train"],
        test=test / tuned["test"],
        constant=test / tuned["constant"],
        stopped=_mean(repeats, "best test") / tuned["stopped"],
    )


def outcomes(rows: list[Row]) -> dict[str, list[Outcome]]:
    """Method -> its ratios, the toys left out; the others against AdamW's grid."""
    best = best_of_grid(rows)
    runs = collections.defaultdict(list)
    for row in rows:
        if row["method"] != "grid" and row["workload"] not in TOYS:
            runs[identity(row, FIELDS)[:-1]].append(row)
    found = collections.defaultdict(list)
    for key, repeats in runs.items():
        method, workload, optimizer, *_ = key
        tuned = best[workload, optimizer or "AdamW"]
        found[method].append(_outcome(key[1:], repeats, tuned, ""))
        if method in ("hidlr", "Hi-ULR"):
            average = _outcome(key[1:], repeats, tuned, OF_AVERAGE)
            found[method + AVERAGED].append(average)
    return found


COLUMNS = {  # field of an outcome -> its title, and the quantiles that are shown
    "test": ("test", (0.5, 0.9, 1.0)),
    "train": ("train", (0.5, 0.9, 1.0)),
    "constant": ("test over best constant", (0.5, 0.9)),
    "stopped": ("test at best step", (0.5, 0.9)),
}
_QUANTILES = {0.5: "median", 0.9: "90 %", 1.0: "worst"}


def table(found: dict[str, list[Outcome]], rows: list[Row]) -> str:
    """Markdown, one line per method."""
    broken = collections.Counter(row["method"] for row in rows if not row["finite"])
    heads = [
        f"{title}: {_QUANTILES[q]}" if q == quantiles[0] else _QUANTILES[q]
        for title, quantiles in COLUMNS.values()
        for q in quantiles
    ]
    lines = []
    for method, results in found.items():
        cells = [method, len(results)]
        for field, (_, quantiles) in COLUMNS.items():
            ratios = np.array([getattr(outcome, field) for outcome in results])
            cells += [f"{np.quantile(ratios, q, method='higher'):.3g}" for q in quantiles]
        lines.append([*cells, broken[method]])
    return markdown(["method", "cases", *heads, "runs not finite"], lines)


def on(found: dict[str, list[Outcome]], keep: Callable[[tuple[Any, ...]], bool]) -> Any:
    """The outcomes of some cases."""
    chosen = {method: [x for x in results if keep(x.case)] for method, results in found.items()}
    return {method: results for method, results in chosen.items() if results}


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}" if np.isfinite(ratio) else "∞"


def against_one_rate(found: dict[str, list[Outcome]]) -> str:
    """Markdown: the test loss with K rates over that with one, cosine, per workload."""
    one = {outcome.case: outcome.test for outcome in found["Hi-ULR, cosine"]}
    ratios = collections.defaultdict(list)
    for outcome in found["hidlr, cosine"]:
        if outcome.case in one:
            for name in (outcome.case[0], "all"):
                ratios[name].append(outcome.test / one[outcome.case])
    lines = [
        [name, *(f"{of(values):.2f}" for of in (np.median, min, max))]
        for name, values in ratios.items()
    ]
    return markdown(["workload", "K rates over one rate: median", "least", "most"], lines)


def by_case(rows: list[Row], found: dict[str, list[Outcome]]) -> str:
    """Markdown, one line per case: the default rule, one rate, and the grid's choice."""
    best, methods = best_of_grid(rows), [name for name in RULES if name in found]
    ratios = {name: {x.case: x for x in found[name]} for name in methods}
    lines = []
    for case in ratios[methods[0]]:
        workload, optimizer, _, _, interval, scale = case
        rate, schedule = best[workload, optimizer]["setting"]
        here = [ratios[name].get(case) for name in methods]
        losses = [f"{_short(x.test)} ({_short(x.train)})" if x else "" for x in here]
        told = f"{scale:g}×", f"{rate:.2g} {schedule}"
        lines.append([workload, optimizer, interval, *told, *losses])
    return markdown(["workload", "optimizer", "Φ", "initial rate", "tuned", *methods], lines)


def profile(panels: dict[str, dict[str, list[Outcome]]]) -> Figure:
    """The share of cases whose test loss is within a factor of the tuned one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    factors = np.logspace(np.log10(0.7), np.log10(5), 300)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))  # pyright: ignore[reportCallIssue, reportArgumentType]
    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        for method, results in found.items():
            ratios = np.array([outcome.test for outcome in results])
            ours = method.startswith("hidlr")
            axis.plot(
                factors,
                [np.mean(ratios <= factor) for factor in factors],
                label=method,
                color=colours[names.index(method)],
                linewidth=2.5 if ours else 1.3,
                linestyle="-" if ours else "--",
            )
        axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="test loss over that of the tuned grid", title=title)
        axis.set_xticks([0.7, 1, 1.5, 2, 3, 5], ["0.7", "1", "1.5", "2", "3", "5"])
        axis.minorticks_off()
    axes[0].set_ylabel("share of the cases")
    lines = {line.get_label(): line for axis in axes for line in axis.lines[: len(names)]}
    lines = {name: lines[name] for name in names}
    figure.legend(lines.values(), lines.keys(), loc="outside right", fontsize=8)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return figure


def toys(rows: list[Row]) -> str:
    """Markdown: the loss at the end of the two functions of two variables, which may be zero."""
    best, runs = best_of_grid(rows), collections.defaultdict(list)
    for row in rows:
        if row["workload"] in TOYS and row["method"] in RULES:
            runs[row["workload"], row["optimizer"], row["method"]].append(row)
    lines = []
    for name, optimizer in itertools.product(TOYS, OPTIMIZERS):
        if (name, optimizer) in best:
            repeats = [runs[name, optimizer, method] for method in RULES]
            losses = [f"{_mean(same, 'train'):.3g}" if same else "" for same in repeats]
            lines.append([name, optimizer, f"{best[name, optimizer]['train']:.3g}", *losses])
    return markdown(["function", "direction", "tuned", *RULES], lines)


def report(rows: list[Row], figure: Path | None, details: bool) -> None:
    """Prints the tables and draws the profile."""
    found = outcomes(rows)
    averaged = [name for name in found if name.endswith(AVERAGED)]
    rules = {name: found[name] for name in (*RULES, *averaged) if name in found}
    most = max(map(len, rules.values()), default=0)
    everywhere = {name: those for name, those in rules.items() if len(those) == most}
    print("All cases, loss over that of the tuned grid:\n")
    real = [row for row in rows if row["workload"] not in TOYS]
    print(table(everywhere, real))
    adamw = on(found, lambda case: case[1] in (None, "AdamW"))
    adamw = {name: adamw[name] for name in (*rules, *OTHERS) if name in adamw}
    print("\nAdamW as the direction, beside what needs no learning rate:\n")
    adamw_rows = [row for row in real if row.get("optimizer", "AdamW") == "AdamW"]
    print(table(adamw, adamw_rows))
    met = targets.runs(adamw_rows, (*RULES, *OTHERS))
    if met[0]:
        print("\nThe part of a run, in percent, after which AdamW's direction meets a target:\n")
        print(targets.table(*met))
    if details:
        print("\n" + against_one_rate(found), toys(rows), by_case(rows, found), sep="\n\n")
    if figure is not None:
        profile({f"all {most} cases": everywhere, "AdamW alone": adamw}).savefig(figure, dpi=150)
        if met[0]:
            shares = targets.profile(targets.parts(*met))
            targets.draw(shares, figure.with_stem(f"{figure.stem}-targets"))
