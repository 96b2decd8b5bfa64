"""Fine-tuning pretrained models: `hidlr` with nothing tuned, its rivals, and tuned AdamW.

The cases are those of `problems.pretrained`. AdamW is tuned by the validation score: cosine,
constant and warmed-up rates, and a family with two rates (LoRA+, or a faster head). With seed 0,
each family runs with three neighbouring rates of six, and with further ones as long as its best
lies at an end. The three best settings run with seed 1, and the two best of these with all seeds.

One JSON line per run; what is there is not run again.

    python -m benchmarks.finetune.frozen --data-dir GLUE --e2e-dir E2E --fashion-dir FASHION
    python -m benchmarks.finetune.frozen --report
"""

import argparse
import collections
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit.loop import (
    AVERAGED,
    SCHEDULES,
    Method,
    Problem,
    averaging,
    plain,
    train,
)
from benchmarks.kit.rivals import OTHERS
from benchmarks.kit.store import Job, Row, Store, shard
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.problems.pretrained import HELD_BACK, UNSCORED, Source, available

BASELINE = "AdamW, tuned"
CHECKS = 4  # how often a run is evaluated
FINALISTS = (3, 2)  # settings that run with seed 1, and with all others after it
FIELDS = ("method", "case", "rate")
WHEN = {"last": "", "best validation": "best "}  # the step to judge by, and its prefix in the rows

Factory = Callable[[Problem, Any], Any]  # (problem, labels) -> transformation


def _hidlr(schedule: str = "constant", one: bool = False, **settings: Any) -> Factory:
    def make(problem: Problem, labels: Any) -> Any:
        defaults: dict[str, Any] = {"schedule": SCHEDULES[schedule](problem.steps)}
        return hd.hidlr(problem.loss, "all" if one else labels, **defaults | settings)

    return make


# Behind AdamW at rate one.
RULES: dict[str, Factory] = {
    "hidlr": _hidlr(),
    "hidlr" + AVERAGED: _hidlr(),
    "hidlr, cosine": _hidlr("cosine"),
    "hidlr, warm-up": _hidlr("warm-up"),
    "hidlr, one rate": _hidlr(one=True),
    "hidlr, one rate" + AVERAGED: _hidlr(one=True),
    "hidlr, one rate, cosine": _hidlr("cosine", one=True),
}


class Family(NamedTuple):
    """A way of setting AdamW's rates up to a factor.

    Attributes:
      method: its name.
      schedule: a key of `SCHEDULES`.
      group: whose rate is multiplied.
      times: by what.
    """

    method: str
    schedule: str
    group: str = ""
    times: float = 1.0


FAMILIES = (
    Family("AdamW, cosine", "cosine"),
    Family("AdamW, constant", "constant"),
    Family("AdamW, warm-up", "warm-up"),
)
LORA_PLUS = Family("LoRA+, warm-up", "warm-up", "lora_B", 16.0)
FAST_HEAD = Family("AdamW, cosine, faster head", "cosine", "head", 5.0)
TUNED = {family.method: family for family in (*FAMILIES, LORA_PLUS, FAST_HEAD)}


class Bench(NamedTuple):
    """The workloads and where their runs are kept; each is made when it is first asked for.

    Attributes:
      load: name of a case -> the problem.
      rates: name of a case -> AdamW's.
      store: of the runs.
      seeds: how many.
    """

    load: Callable[[str], Problem]
    rates: dict[str, tuple[float, ...]]
    store: Store
    seeds: int


def given_rates(labels: Any, rates: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Multiplies each group's update by its (steps,) rates."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        scaled = jax.tree.map(lambda name, u: rates[name][state] * u, labels(updates), updates)
        return scaled, state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def trained(problem: Problem, make: Callable[..., Method]) -> Any:
    """A compiled run, (key, *args) -> its results; `make` builds the optimizer from the args."""

    @jax.jit
    def run(splits: Any, key: jax.Array, *args: Any) -> Any:
        here = problem._replace(splits=splits)  # as an argument, not as a constant of the program
        return train(here, make(*args), key, CHECKS, ("validation", "test"))[0]

    return lambda key, *args: plain(run(problem.splits, key, *args))


def tuner(bench: Bench) -> Callable[[str, str, float], Job]:
    """(case, method, rate) -> the job; all of a case share one compilation."""

    @functools.cache
    def compiled(case: str) -> tuple[Problem, Any, list[str]]:
        problem = bench.load(case)
        labels = problem.labels
        shapes = jax.eval_shape(problem.init, jax.random.key(0))
        names = sorted(set(jax.tree.leaves(labels(shapes))))

        def make(rates: dict[str, jax.Array]) -> Method:
            return Method(optax.chain(optax.adamw(1.0), given_rates(labels, rates)))

        return problem, trained(problem, make), names

    def job(case: str, method: str, rate: float) -> Job:
        family = TUNED[method]

        def execute(seed: int) -> list[Row]:
            problem, run, names = compiled(case)
            schedule = SCHEDULES[family.schedule](problem.steps)
            curve = rate * jax.vmap(lambda n: jnp.asarray(schedule(n)))(jnp.arange(problem.steps))
            curves = {n: curve * (family.times if n == family.group else 1) for n in names}
            return [run(jax.random.key(seed), curves)]

        key = {"method": method, "case": case, "rate": rate}
        return Job(key, execute)

    return job


def families(case: str) -> tuple[Family, ...]:
    """What is tuned on a case."""
    return (*FAMILIES, LORA_PLUS if case.endswith("LoRA") else FAST_HEAD)


def merit(rows: list[Row], prefix: str = "") -> tuple[float, float]:
    """By what a setting is chosen: the mean validation score, and of equal ones the least loss."""
    score = np.mean([row[f"{prefix}validation score"] for row in rows])
    loss = np.mean([row[f"{prefix}validation"] for row in rows])
    return (float(score), -float(loss)) if np.isfinite(loss) else (-np.inf, -np.inf)


def climb(count: int, start: int, value: Callable[[int], Any]) -> int:
    """The best of the places around `start`, and of as many more as it takes to enclose it."""
    low, high = max(start - 1, 0), min(start + 1, count - 1)
    while True:
        best = max(range(low, high + 1), key=value)
        if best == low > 0:
            low -= 1
        elif best == high < count - 1:
            high += 1
        else:
            return best


def explore(bench: Bench, job: Callable[[str, str, float], Job], case: str) -> None:
    """Every family with seed 0, the first from the middle and the others from its best rate."""
    rates = bench.rates[case]

    def value(method: str, place: int) -> tuple[float, float]:
        return merit(bench.store.result(job(case, method, rates[place]), 0))

    start = len(rates) // 2
    for family in families(case):
        best = climb(len(rates), start, functools.partial(value, family.method))
        start = best if family == FAMILIES[0] else start


Setting = tuple[str, float]  # method, rate


def settings(rows: list[Row], case: str, seeds: int) -> dict[Setting, list[Row]]:
    """The tuned runs of a case by setting: the first `seeds` of those that have as many."""
    found = collections.defaultdict(list)
    for row in rows:
        if row["case"] == case and row["method"] in TUNED and row["seed"] < seeds:
            found[row["method"], row["rate"]].append(row)
    return {setting: runs for setting, runs in found.items() if len(runs) == seeds}


def finalists(rows: list[Row], case: str, seed: int) -> list[Setting]:
    """What runs with a seed after the first, the best first."""
    known = min(seed, len(FINALISTS))
    found = {setting: merit(runs) for setting, runs in settings(rows, case, known).items()}
    return sorted(found, key=lambda s: found[s], reverse=True)[: FINALISTS[known - 1]]


def tune(bench: Bench, cases: list[str]) -> None:
    """All of AdamW, first seed 0 of every case."""
    job = tuner(bench)
    for case in tqdm(cases, "tuned, seed 0", disable=None):
        explore(bench, job, case)
    for seed in range(1, bench.seeds):
        for case in tqdm(cases, f"tuned, seed {seed}", disable=None):
            for setting in finalists(bench.store.rows(), case, seed):
                bench.store.result(job(case, *setting), seed)


def untuned_job(bench: Bench, case: str, method: str) -> Job:
    """A rule, or an optimizer without a learning rate, on a case."""

    @functools.cache
    def compiled() -> Any:
        problem = bench.load(case)
        if method in OTHERS:
            return trained(problem, lambda: OTHERS[method](problem.steps))
        rule = RULES[method](problem, problem.labels)
        made = Method(optax.chain(optax.adamw(1.0), rule))
        return trained(problem, lambda: averaging(made) if method.endswith(AVERAGED) else made)

    def execute(seed: int) -> list[Row]:
        return [compiled()(jax.random.key(seed))]

    return Job({"method": method, "case": case}, execute)


def untuned(bench: Bench, cases: list[str], methods: list[str] | None) -> Iterator[Job]:
    """Rules and rivals."""
    for case in cases:
        for name in (*RULES, *OTHERS):
            if methods is None or name in methods:
                yield untuned_job(bench, case, name)


def run(bench: Bench, cases: list[str], methods: list[str] | None, part: slice) -> None:
    """Everything that is missing; a part of n is every n-th case of AdamW, and every n-th job."""
    if methods is None or "tuned" in methods:
        tune(bench, cases[part])
    jobs = list(untuned(bench, cases, methods))[part]
    for seed in range(bench.seeds) if jobs else ():
        bench.store.run(jobs, [seed], f"seed {seed}")


class Result(NamedTuple):
    """A method on a case over seeds, of the last step or of the best; the score in percent."""

    scores: np.ndarray
    loss: float


def _result(rows: list[Row], prefix: str) -> Result:
    scores = 100 * np.array([row[f"{prefix}test score"] for row in rows])
    losses = np.array([row[f"{prefix}test"] for row in rows])
    return Result(scores, float(losses.mean()) if np.all(np.isfinite(losses)) else np.inf)


def best_setting(rows: list[Row], case: str, prefix: str) -> tuple[Setting, list[Row]] | None:
    """The best of the settings that have run with the most seeds, by their validation scores."""
    counts = range(1 + max((row["seed"] for row in rows if row["case"] == case), default=-1), 0, -1)
    full = next((found for n in counts if (found := settings(rows, case, n))), {})
    return max(full.items(), key=lambda item: merit(item[1], prefix), default=None)


def results(rows: list[Row], case: str, prefix: str) -> dict[str, Result]:
    """Method -> its result on a case, first "AdamW, tuned"; nothing where that is missing."""
    tuned = best_setting(rows, case, prefix)
    if tuned is None:
        return {}
    here = [row for row in rows if row["case"] == case]
    runs = {name: [row for row in here if row["method"] == name] for name in (*RULES, *OTHERS)}
    found = {BASELINE: tuned[1]} | {name: same for name, same in runs.items() if same}
    return {name: _result(same, prefix) for name, same in found.items()}


def _named(found: dict[str, dict[str, Result]]) -> list[str]:
    """The methods that there are results of, in the order of the tables."""
    names = {name for here in found.values() for name in here}
    return [name for name in (BASELINE, *RULES, *OTHERS) if name in names]


def summary(found: dict[str, dict[str, Result]]) -> str:
    """Markdown, one line per method: over the cases, against tuned AdamW."""
    gaps, ratios = collections.defaultdict(list), collections.defaultdict(list)
    for case, here in found.items():
        for name, result in here.items():
            if case not in UNSCORED:
                gaps[name].append(result.scores.mean() - here[BASELINE].scores.mean())
            ratios[name].append(result.loss / here[BASELINE].loss)
    head = ["method", "cases", "score: mean", "worst", "test loss: median", "worst"]
    lines = [
        [
            name,
            len(ratios[name]),
            f"{np.mean(gaps[name] or [np.nan]):+.2f}",
            f"{min(gaps[name] or [np.nan]):+.2f}",
            f"{np.median(ratios[name]):.3g}",
            f"{max(ratios[name]):.3g}",
        ]
        for name in _named(found)
    ]
    return markdown(head, lines)


def by_case(found: dict[str, dict[str, Result]]) -> str:
    """Markdown, one line per method and one column per case: mean ± standard deviation."""

    def cell(case: str, result: Result | None) -> str:
        if result is None:
            return ""
        factor, digits = (-0.01, 3) if case in UNSCORED else (1, 1)
        return mean_sd(factor * result.scores, digits)

    lines = [
        [name, *(cell(case, here.get(name)) for case, here in found.items())]
        for name in _named(found)
    ]
    return markdown(["method", *found], lines)


def chosen_settings(rows: list[Row], cases: list[str]) -> str:
    """Markdown: what "AdamW, tuned" is, of the last step and of the best."""
    lines = []
    for case in cases:
        best = [best_setting(rows, case, prefix) for prefix in WHEN.values()]
        lines.append([case, *(f"{x[0][0]} {x[0][1]:g}, {len(x[1])} seeds" for x in best if x)])
    return markdown(["case", *(f"by the {when} step" for when in WHEN)], lines)


def report(rows: list[Row]) -> None:
    """Prints the tables."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for when, prefix in WHEN.items():
        found = {case: results(rows, case, prefix) for case in cases}
        found = {case: here for case, here in found.items() if here}
        print(f"\nStep: {when}. Test score less that of tuned AdamW, in points;")
        print("test loss over its:\n", summary(found), sep="\n")
        print("\nTest score in percent; E2E: test loss:\n", by_case(found), sep="\n")
        fresh = {case: found[case] for case in HELD_BACK if case in found}
        if fresh:
            print("\nThe cases that were held back alone:\n", summary(fresh), sep="\n")
    print("\nThe rates that were chosen:\n", chosen_settings(rows, cases), sep="\n")


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="a folder in GLUE's layout")
    parser.add_argument("--e2e-dir", type=Path, help="with devset.csv and testset_w_refs.csv")
    parser.add_argument("--fashion-dir", type=Path, help="with Fashion-MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("finetuning.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="these alone")
    parser.add_argument("--methods", nargs="*", help="these alone; 'tuned' is all of AdamW")
    parser.add_argument("--shard", type=shard, default=slice(None), help="i/n: of n parts the i-th")
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    limit = 32 if args.quick else None
    source = Source(args.data_dir, args.fashion_dir, args.e2e_dir, limit)
    cases = {n: c for n, c in available(source).items() if args.cases is None or n in args.cases}

    @functools.cache
    def load(name: str) -> Problem:
        problem = cases[name].make(source)
        return problem._replace(steps=2 * CHECKS) if args.quick else problem

    store = Store(args.out, FIELDS, "finetuning-baselines.jsonl.gz")
    rates = {name: case.rates for name, case in cases.items()}
    if not args.report:
        bench = Bench(load, rates, store, 2 if args.quick else args.seeds)
        run(bench, list(cases), args.methods, args.shard)
    report(store.rows())


if __name__ == "__main__":
    main()
