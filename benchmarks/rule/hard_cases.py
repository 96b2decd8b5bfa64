"""Hard cases: problems that have killed runs, nothing tuned.

Each is trained by the usual optimizer at the rate it is published with, by `hidlr` with the labels
one would give and by `hiulr`, with and without cosine, and judged by its training loss at the end.
Bold is worse than the untrained model, or not finite.

    python -m benchmarks.rule.hard_cases --out hard.md
    python -m benchmarks.rule.hard_cases --cases LoRA plateau --seeds 2
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit.loop import SCHEDULES, run
from benchmarks.kit.tables import markdown
from benchmarks.problems.hard import CASES, Report

USED = ("constant", "cosine")  # of the schedules


def usual(case: Report, schedule: str, rate: Any) -> Any:
    """The published setting; `rate` is of `hidlr` alone."""
    del rate
    shape = SCHEDULES[schedule](case.problem.steps)
    return case.problem.direction(lambda count: case.rate * shape(count))


def ours(labels: str | None, case: Report, schedule: str, rate: Any) -> Any:
    """`hidlr` with its defaults, and labels that are given or those of the problem."""
    problem = case.problem
    settings: dict[str, Any] = {"init_learning_rate": rate} if case.of_rates else {}
    if schedule != "constant":
        settings["schedule"] = SCHEDULES[schedule](problem.steps)
    rule = hd.hidlr(problem.loss, labels or problem.labels, **settings)
    return optax.chain(problem.direction(1.0), rule)


METHODS: dict[str, Callable[..., Any]] = {
    "usual": usual,
    "hidlr": functools.partial(ours, None),
    "hiulr": functools.partial(ours, "all"),
}
COLUMNS = [f"{name}{tail}" for name in METHODS for tail in ("", ", cosine")]


def results(case: Report, make: Any, schedule: str, runs: Any) -> Iterator[tuple[float, float]]:
    """The losses of one method, before and after, for each run of the problem."""
    problem = case.problem

    @functools.cache
    def compiled(found: bool) -> Any:
        def trained(key: jax.Array, rate: jax.Array) -> Any:
            tx = make(case, schedule, None if found else rate)
            start = problem.init(jax.random.split(key)[0])
            return problem.judged(start), problem.judged(run(problem, tx, key)[0])

        return jax.jit(trained)

    for one in runs:
        seed, rate = (0, one) if case.of_rates else (one, None)
        before, after = compiled(rate is None)(jax.random.key(seed), jnp.float32(rate or 0.0))
        yield float(before), float(after)


def _cell(before: float, after: float) -> str:
    return f"{after:.3g}" if after <= before else f"**{after:.3g}**"


def rows(name: str, limit: int | None, progress: Any) -> list[list[str]]:
    """The cells of one problem."""
    case = CASES[name]()
    runs, columns = case.runs[:limit], []
    for method, make in METHODS.items():
        for schedule in USED:
            progress.set_postfix_str(f"{name}: {method}, {schedule}")
            columns.append(list(results(case, make, schedule, runs)))
            progress.update()
    lines = []
    for one, losses in zip(runs, zip(*columns, strict=True), strict=True):
        label = f"{one:g}" if one is not None else "found"
        row = f"from {label}" if case.of_rates else f"seed {label}"
        told = (_cell(*pair) for pair in losses)
        lines.append([name, row, case.optimizer, f"{losses[0][0]:.3g}", *told])
    return lines


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, help="rows per case, all of them where left out")
    parser.add_argument("--out", type=Path, help="the table goes there too")
    args = parser.parse_args()
    head, lines = ["case", "run", "usual optimizer", "untrained", *COLUMNS], []
    with tqdm(total=len(args.cases) * len(COLUMNS), disable=None) as progress:
        for name in args.cases:
            lines += rows(name, args.seeds, progress)
            if args.out is not None:
                args.out.write_text(markdown(head, lines) + "\n")
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
