"""The suite that the default rule is chosen by: many small problems, nothing tuned.

Thirteen workloads × {AdamW, momentum, SGD, Lion} × groupings × Φ × initial rates: one case for
every workload and optimizer, the other settings chosen so that every pair of settings occurs. Each
case is trained by `hidlr` and its rivals and compared with the best of a grid, seven rates,
constant and cosine, chosen by validation loss. One JSON line per run; what is there is not run
again.

    python -m benchmarks.rule.robustness --out robustness.jsonl --shard 0/2 &
    python -m benchmarks.rule.robustness --out robustness.jsonl --shard 1/2
    python -m benchmarks.rule.robustness --out robustness.jsonl --report --figure robustness.png
    python -m benchmarks.rule.robustness --suite long --out long.jsonl     # ten times the steps
"""

import argparse
import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.figure import Figure

import hidlr_optax as hd
from benchmarks.kit.costs import FINDING, STEP, Looks, looks, probe_looks
from benchmarks.kit.rivals import AVERAGED, OTHERS, gen_hidlr, keeping_average
from benchmarks.kit.store import Job, Store, identity, shard
from benchmarks.kit.tables import finite_mean
from benchmarks.kit.training import SCHEDULES
from benchmarks.problems.small import WORKLOADS, Workload, plain, train
from benchmarks.rule import targets

TOYS = ("ellipse", "Beale + Rosenbrock")
INTERVALS = (1, 4, 10, 20)
SCALES = (0.01, 1.0, 100.0)  # how far off the initial rate is
SEEDS = range(3)
CHECKS = 20  # how often a run is evaluated
REFERENCE = ("constant", "cosine")  # the schedules that "tuned" is chosen from

FIELDS = ("method", "workload", "optimizer", "schedule", "grouping", "interval", "scale")
BASELINES, LONG_BASELINES = "robustness-baselines.jsonl.gz", "robustness-long-baselines.jsonl.gz"

# Runs ten times as long. The images are learnt by heart in them; the others are not.
LONG_STEPS = 4000
LONG = (
    ("MNIST CNN", "AdamW"),
    ("MNIST CNN", "momentum"),
    ("digits, 20 % noise", "momentum"),
    ("LoRA", "AdamW"),
    ("synthetic NAM", "SGD"),
    ("housing NAM", "AdamW"),
    ("text", "AdamW"),
    ("text", "SGD"),
)

# The direction at unit rate, what an experienced user would begin with, and the middle of the grid.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": lambda: optax.adamw(1.0),
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
    "SGD": lambda: optax.sgd(1.0),
    "Lion": lambda: optax.lion(1.0),
}
USUAL = {"AdamW": 1e-3, "momentum": 1e-2, "SGD": 1e-1, "Lion": 1e-4}
CENTRES = {"AdamW": 10**-2.5, "momentum": 1e-2, "SGD": 1e-1, "Lion": 10**-3.5}
TOY_CENTRES = {"AdamW": 10**-0.5, "momentum": 1e-4, "SGD": 10**-3.5, "Lion": 10**-0.5}


class Case(NamedTuple):
    """One setting of the suite; `grouping` is an index into the workload's groupings."""

    workload: str
    optimizer: str
    grouping: int
    interval: int
    scale: float


@functools.cache
def cases() -> list[Case]:
    """A case for each workload and optimizer; every pair of settings occurs in one of them."""
    choices = (tuple(WORKLOADS), tuple(OPTIMIZERS), (0, 1), INTERVALS, SCALES)
    pairs = set().union(*(_pairs(case) for case in itertools.product(*choices)))
    for seed in itertools.count():
        rng, seen, chosen = np.random.default_rng(seed), set(), []
        for place in itertools.product(*choices[:2]):
            options = [(*place, *setting) for setting in itertools.product(*choices[2:])]
            gains = [len(_pairs(option) - seen) + 0.1 * rng.random() for option in options]
            chosen.append(Case(*options[int(np.argmax(gains))]))
            seen |= _pairs(chosen[-1])
        if seen == pairs:
            return chosen
    raise AssertionError  # the loop does not end before


def _pairs(case: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def decay(name: str | None, steps: int) -> optax.Schedule | None:
    """From one to zero over a run, "restarts" twice."""
    if name == "restarts":
        cycle = optax.cosine_decay_schedule(1.0, steps // 2)
        return optax.join_schedules([cycle, cycle], [steps // 2])
    if name == "linear":
        return optax.linear_schedule(1.0, 0.0, steps)
    return None if name in (None, "constant") else SCHEDULES[name](steps)


Factory = Callable[..., Any]  # (workload, labels, rate, interval, schedule) -> transformation


class Method(NamedTuple):
    """A rule for the rates of a case's optimizer.

    Attributes:
      factory: of the rule.
      schedule: that it is given.
      looks: (groups, interval, steps) -> at the loss, by which its steps are weighed.
    """

    factory: Factory
    schedule: str | None = None
    looks: Callable[[int, int, int], Looks] = looks


def _hidlr(one: bool = False) -> Factory:
    def make(workload: Workload, labels: Any, rate: Any, interval: Any, schedule: Any) -> Any:
        return hd.hidlr(
            workload.loss,
            "all" if one else labels,
            init_learning_rate=rate,
            update_interval=interval,
            schedule=schedule,
        )

    return make


def _first(workload: Workload, labels: Any, rate: Any, interval: Any, schedule: Any) -> Any:
    """Lagged slopes, two probes of each group, a box around the minimum."""
    return hd.paper.one_step(
        workload.loss,
        labels,
        init_learning_rate=rate,
        update_interval=interval,
        schedule=schedule,
        curvature=hd.paper.probes(batch_size=1),
    )


def _paper(workload: Workload, labels: Any, rate: Any, interval: Any, schedule: Any) -> Any:
    return hd.paper_hidlr(
        workload.loss,
        labels,
        init_learning_rate=rate,
        update_interval=interval,
        schedule=schedule,
        batch_size=1,
    )


def _gen(workload: Workload, labels: Any, rate: Any, interval: Any, schedule: Any) -> Any:
    del schedule
    return gen_hidlr(workload.loss, labels, init_learning_rate=rate, update_interval=interval)


_DEFAULT, _ONE = _hidlr(), _hidlr(one=True)
_FIRST_LOOKS = functools.partial(probe_looks, hd.paper.probes(), FINDING)
_PAPER_LOOKS = functools.partial(probe_looks, hd.paper.probes("gaussian", per_group=4), 0)

# Every rule that takes the direction of the case's optimizer and its other settings.
RULES: dict[str, Method] = {
    "hidlr, cosine": Method(_DEFAULT, "cosine"),
    "hidlr": Method(_DEFAULT),
    "Hi-ULR, cosine": Method(_ONE, "cosine"),
    "Hi-ULR": Method(_ONE),
    "first version, cosine": Method(_first, "cosine", _FIRST_LOOKS),
    "first version": Method(_first, None, _FIRST_LOOKS),
    "Algorithm 1": Method(_paper, None, _PAPER_LOOKS),
    "Algorithm 1, smoothed": Method(_gen, None, _PAPER_LOOKS),
}
_EVERYWHERE = ("hidlr, cosine", "hidlr")  # in the suite "paper", with every direction
_OF_AVERAGE = "averaged "  # prefix of the losses of averaged parameters, in a row beside the others


@functools.cache
def load(name: str, steps: int | None) -> Workload:
    """A workload, its runs cut to `steps` where that is a number."""
    workload = WORKLOADS[name]()
    return workload if steps is None else workload._replace(steps=steps)


def grid(name: str, optimizer: str) -> np.ndarray:
    """Seven rates, half a decade apart."""
    centre = (TOY_CENTRES if name in TOYS else CENTRES)[optimizer]
    return centre * np.logspace(-1.5, 1.5, 7)


def grid_job(name: str, optimizer: str, schedule: str, steps: int | None) -> Job:
    """The seven rates of one schedule, vmapped."""
    rates = grid(name, optimizer)

    @functools.cache
    def compiled() -> Any:
        workload = load(name, steps)
        shape = decay(schedule, workload.steps) or optax.constant_schedule(1.0)

        def run(rate: jax.Array, key: jax.Array) -> Any:
            parts = OPTIMIZERS[optimizer](), optax.scale_by_schedule(shape), optax.scale(rate)
            return train(workload, optax.chain(*parts), key, checks=CHECKS)[0]

        return jax.jit(jax.vmap(run, in_axes=(0, None)))

    def execute(seed: int) -> list[dict[str, Any]]:
        losses = compiled()(jnp.asarray(rates, jnp.float32), jax.random.key(seed))
        per_rate = [{k: v[i] for k, v in losses.items()} for i in range(len(rates))]
        return [plain(x) | {"rate": float(r)} for x, r in zip(per_rate, rates, strict=True)]

    key = {"method": "grid", "workload": name, "optimizer": optimizer, "schedule": schedule}
    return Job(key, execute)


@functools.lru_cache(maxsize=2)  # those of a whole suite do not fit into the memory of a process
def case_runner(factory: Factory, case: Case, steps: int | None) -> Callable[..., Any]:
    """(rate, the schedule's factors, key) -> losses, and the last metrics.

    The schedule is an argument, so that all of them share one compilation.
    """
    workload = load(case.workload, steps)
    groupings = list(workload.groupings.values())
    labels = groupings[case.grouping % len(groupings)]

    def run(rate: jax.Array, curve: jax.Array, key: jax.Array) -> Any:
        rule = factory(workload, labels, rate, case.interval, lambda step: curve[step])
        tx = optax.chain(OPTIMIZERS[case.optimizer](), rule)
        losses, (state, average) = train(workload, keeping_average(tx), key, checks=CHECKS)
        for name, batch in workload.splits.items():
            losses[_OF_AVERAGE + name] = workload.loss(average.params, batch)
        rates = optax.tree.get(state, "group_learning_rates", {"all": jnp.zeros(())})
        peak = jnp.exp(jnp.mean(jnp.log(jnp.stack(list(rates.values())))))
        return losses | {"rate": peak}, hd.metrics(state)

    return jax.jit(run)


def case_job(name: str, method: Method, case: Case, steps: int | None) -> Job:
    """A rule on a case."""

    def execute(seed: int) -> list[dict[str, Any]]:
        length = load(case.workload, steps).steps
        shape = decay(method.schedule, length) or optax.constant_schedule(1.0)
        curve = jnp.stack([jnp.float32(shape(step)) for step in range(length)])
        rate = jnp.float32(USUAL[case.optimizer] * case.scale)
        runner = case_runner(method.factory, case, steps)
        losses, metrics = runner(rate, curve, jax.random.key(seed))
        groups = sum(name.startswith("learning_rate/") for name in metrics)
        looked = method.looks(groups, case.interval, length)
        forwards = STEP + looked.forward_passes / length
        # Of each group: rate, slope, curvature, influence, and what became of its last refresh.
        return [plain(losses) | {"metrics": plain(metrics), "forwards a step": forwards}]

    return Job({"method": name} | case._asdict(), execute)


def other_job(method: str, name: str, steps: int | None) -> Job:
    """An optimizer without a learning rate on a workload."""

    @functools.cache
    def compiled() -> Any:
        workload = load(name, steps)
        rival = OTHERS[method]
        tx = rival.make(workload.steps)
        return jax.jit(lambda key: train(workload, tx, key, rival.evaluated, CHECKS)[0])

    def execute(seed: int) -> list[dict[str, Any]]:
        return [plain(compiled()(jax.random.key(seed)))]

    return Job({"method": method, "workload": name}, execute)


def jobs(suite: str) -> Iterator[Job]:
    """All of a suite, ordered so that a cut at any time leaves something to compare."""
    if suite == "long":
        yield from long_jobs()
        return
    chosen = cases()
    rules = dict(RULES)
    names, steps = list(WORKLOADS), None
    if suite == "smoke":
        names, steps = ["digits", "ellipse"], 20
        chosen = [case for case in chosen if case.workload in names][::3]
        rules = {name: RULES[name] for name in ("hidlr", "Algorithm 1, smoothed")}
    for name in names:
        for optimizer, schedule in itertools.product(OPTIMIZERS, REFERENCE):
            yield grid_job(name, optimizer, schedule, steps)
        for schedule in ("linear", "warm-up"):
            yield grid_job(name, "AdamW", schedule, steps)
        for case in chosen:
            if case.workload == name:
                for method, rule in rules.items():
                    if suite != "paper" or case.optimizer == "AdamW" or method in _EVERYWHERE:
                        yield case_job(method, rule, case, steps)
        for method in OTHERS if suite != "smoke" else ["Prodigy"]:
            yield other_job(method, name, steps)


def long_jobs() -> Iterator[Job]:
    """Of `LONG`, with Φ = 10 and the first grouping of each workload."""
    for name, optimizer in LONG:
        case = Case(name, optimizer, 0, 10, 1.0)
        for method in ("hidlr, cosine", "hidlr", "Hi-ULR, cosine", "Hi-ULR"):
            yield case_job(method, RULES[method], case, LONG_STEPS)
        for schedule in REFERENCE:
            yield grid_job(name, optimizer, schedule, LONG_STEPS)


def _mean(rows: list[dict[str, Any]], split: str) -> float:
    return finite_mean(row[split] for row in rows)


Runs = dict[Any, list[dict[str, Any]]]


def _chosen(runs: Runs, split: str) -> Any:
    """The setting of least loss on a split."""
    return min(runs, key=lambda setting: _mean(runs[setting], split))


def best_of_grid(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
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
    case: tuple[Any, ...], repeats: list[dict[str, Any]], tuned: dict[str, Any], prefix: str
) -> Outcome:
    test = _mean(repeats, prefix + "test")
    return Outcome(
        case,
        train=_mean(repeats, prefix + "train") / tuned["train"],
        test=test / tuned["test"],
        constant=test / tuned["constant"],
        stopped=_mean(repeats, "best test") / tuned["stopped"],
    )


def outcomes(rows: list[dict[str, Any]]) -> dict[str, list[Outcome]]:
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
            average = _outcome(key[1:], repeats, tuned, _OF_AVERAGE)
            found[method + AVERAGED].append(average)
    return found


COLUMNS = {  # field of an outcome -> its title, and the quantiles that are shown
    "test": ("test", (0.5, 0.9, 1.0)),
    "train": ("train", (0.5, 0.9, 1.0)),
    "constant": ("test over best constant", (0.5, 0.9)),
    "stopped": ("test at best step", (0.5, 0.9)),
}
_QUANTILES = {0.5: "median", 0.9: "90 %", 1.0: "worst"}


def table(found: dict[str, list[Outcome]], rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per method."""
    broken = collections.Counter(row["method"] for row in rows if not row["finite"])
    heads = [
        f"{title}: {_QUANTILES[q]}" if q == quantiles[0] else _QUANTILES[q]
        for title, quantiles in COLUMNS.values()
        for q in quantiles
    ]
    table_rows = []
    for method, results in found.items():
        cells = [method, len(results)]
        for field, (_, quantiles) in COLUMNS.items():
            ratios = np.array([getattr(outcome, field) for outcome in results])
            cells += [f"{np.quantile(ratios, q, method='higher'):.3g}" for q in quantiles]
        table_rows.append([*cells, broken[method]])
    head = ["method", "cases", *heads, "runs not finite"]
    lines = [head, ["---"] * len(head), *table_rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


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
    lines = ["| workload | K rates over one rate: median | least | most |", "|---|---|---|---|"]
    for name, values in ratios.items():
        lines.append(
            f"| {name} | {np.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |"
        )
    return "\n".join(lines)


def by_case(rows: list[dict[str, Any]], found: dict[str, list[Outcome]]) -> str:
    """Markdown, one line per case: the default rule, one rate, and the grid's choice."""
    best = best_of_grid(rows)
    methods = [name for name in RULES if name in found]
    lines = [
        "| workload | optimizer | Φ | initial rate | tuned | " + " | ".join(methods) + " |",
        "|---" * (5 + len(methods)) + "|",
    ]
    ratios = {name: {x.case: x for x in found[name]} for name in methods}
    for case in ratios[methods[0]]:
        workload, optimizer, _, _, interval, scale = case
        rate, schedule = best[workload, optimizer]["setting"]
        cells = [workload, optimizer, str(interval), f"{scale:g}×", f"{rate:.2g} {schedule}"]
        here = [ratios[name].get(case) for name in methods]
        cells += [f"{_short(x.test)} ({_short(x.train)})" if x else "" for x in here]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def toys(rows: list[dict[str, Any]]) -> str:
    """Markdown: the loss at the end of the two functions of two variables, which may be zero."""
    best = best_of_grid(rows)
    runs = collections.defaultdict(list)
    for row in rows:
        if row["workload"] in TOYS and row["method"] in RULES:
            runs[row["workload"], row["optimizer"], row["method"]].append(row)
    lines = ["| function | direction | tuned | " + " | ".join(RULES) + " |"]
    lines.append("|---" * (3 + len(RULES)) + "|")
    for name, optimizer in itertools.product(TOYS, OPTIMIZERS):
        if (name, optimizer) in best:
            repeats = [runs[name, optimizer, method] for method in RULES]
            losses = [f"{_mean(same, 'train'):.3g}" if same else "" for same in repeats]
            cells = [name, optimizer, f"{best[name, optimizer]['train']:.3g}", *losses]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], figure: Path | None, details: bool) -> None:
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
