"""The suite that the default rule is chosen by: many small problems, nothing tuned.

Thirteen problems × {AdamW, momentum, SGD, Lion} × groupings × Φ × initial rates: one case for
every problem and optimizer, the other settings chosen so that every pair of settings occurs. Each
case is trained by `hidlr` and its rivals and compared with the best of a grid, seven rates,
constant and cosine, chosen by validation loss. One JSON line per run; what is there is not run
again.

    python -m benchmarks.rule.robustness --out robustness.jsonl --shard 0/2 &
    python -m benchmarks.rule.robustness --out robustness.jsonl --shard 1/2
    python -m benchmarks.rule.robustness --out robustness.jsonl --report --figure robustness.png
    python -m benchmarks.rule.robustness --suite long --out long.jsonl     # ten times the steps
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.kit.rivals import OTHERS
from benchmarks.kit.store import Job, Store, shard
from benchmarks.problems.small import PROBLEMS
from benchmarks.rule.cases import LONG, LONG_STEPS, OPTIMIZERS, Case, cases
from benchmarks.rule.methods import RULES, case_job, grid_job, other_job
from benchmarks.rule.report import FIELDS, REFERENCE, report

SEEDS = range(3)
BASELINES, LONG_BASELINES = "robustness-baselines.jsonl.gz", "robustness-long-baselines.jsonl.gz"
_EVERYWHERE = ("hidlr, cosine", "hidlr")  # in the suite "paper", with every direction


def jobs(suite: str) -> Iterator[Job]:
    """All of a suite, ordered so that a cut at any time leaves something to compare."""
    if suite == "long":
        yield from long_jobs()
        return
    chosen, rules, others = cases(), list(RULES), list(OTHERS)
    names, steps = list(PROBLEMS), None
    if suite == "smoke":
        names, steps = ["digits", "ellipse"], 20
        chosen = [case for case in chosen if case.workload in names][::3]
        rules, others = ["hidlr", "Algorithm 1, smoothed"], ["Prodigy"]
    for name in names:
        for optimizer, schedule in itertools.product(OPTIMIZERS, REFERENCE):
            yield grid_job(name, optimizer, schedule, steps)
        for schedule in ("linear", "warm-up"):
            yield grid_job(name, "AdamW", schedule, steps)
        for case in chosen:
            if case.workload == name:
                for rule in rules:
                    if suite != "paper" or case.optimizer == "AdamW" or rule in _EVERYWHERE:
                        yield case_job(rule, case, steps)
        for method in others:
            yield other_job(method, name, steps)


def long_jobs() -> Iterator[Job]:
    """Of `LONG`, with Φ = 10 and the first grouping of each problem."""
    for name, optimizer in LONG:
        case = Case(name, optimizer, 0, 10, 1.0)
        for rule in ("hidlr, cosine", "hidlr", "Hi-ULR, cosine", "Hi-ULR"):
            yield case_job(rule, case, LONG_STEPS)
        for schedule in REFERENCE:
            yield grid_job(name, optimizer, schedule, LONG_STEPS)


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=("smoke", "paper", "full", "long"), default="full")
    parser.add_argument("--out", type=Path, default=Path("robustness.jsonl"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--shard", type=shard, default=slice(None), help="i/n: of n parts the i-th")
    parser.add_argument("--methods", nargs="*", help="run these alone; 'grid' is one of them")
    parser.add_argument(
        "--optimizers", nargs="*", choices=OPTIMIZERS, help="these directions alone"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    parser.add_argument("--details", action="store_true", help="report every case")
    args = parser.parse_args()
    store = Store(args.out, FIELDS, LONG_BASELINES if args.suite == "long" else BASELINES)
    if not args.report:
        asked = {"method": args.methods, "optimizer": args.optimizers and [*args.optimizers, None]}
        chosen = [
            job
            for job in jobs(args.suite)
            if all(not names or job.key.get(field) in names for field, names in asked.items())
        ]
        store.run(chosen[args.shard], range(1) if args.suite == "smoke" else SEEDS)
    if args.report or args.shard == slice(None):
        report(store.rows(), args.figure, args.details)


if __name__ == "__main__":
    main()
