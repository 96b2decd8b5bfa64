"""The suite that the default rule is chosen by: many small problems, nothing tuned.

Thirteen workloads × {AdamW, momentum, SGD, Lion} × groupings × Φ × initial rates: one case for
every workload and optimizer, the other settings chosen so that every pair of settings occurs. Each
case is trained by `hidlr` and its rivals and compared with the best of a grid, seven rates,
constant and cosine, chosen by validation loss. One JSON line per run; what is there is not run
again.

    python benchmarks/robustness.py --out robustness.jsonl --shard 0/2 &
    python benchmarks/robustness.py --out robustness.jsonl --shard 1/2
    python benchmarks/robustness.py --out robustness.jsonl --report --figure robustness.png
"""

import argparse
import collections
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.figure import Figure
from rivals import gen_hidlr
from tqdm import tqdm
from workloads import WORKLOADS, Workload

import hidlr_optax as hd

TOYS = ("ellipse", "Beale + Rosenbrock")
INTERVALS = (1, 4, 10, 20)
SCALES = (0.01, 1.0, 100.0)  # how far off the initial rate is
SEEDS = range(3)

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
    return optax.cosine_decay_schedule(1.0, steps) if name == "cosine" else None


Factory = Callable[..., Any]  # (workload, labels, init_learning_rate, interval) -> transformation


def _hidlr(schedule: str | None = None, one: bool = False, **settings: Any) -> Factory:
    def make(workload: Workload, labels: Any, rate: Any, interval: Any) -> Any:
        defaults: dict[str, Any] = {
            "init_learning_rate": rate,
            "update_interval": interval,
            "schedule": decay(schedule, workload.steps),
            "curvature": hd.probes(batch_size=1),  # one at a time is faster on a CPU
        }
        return hd.hidlr(workload.loss, "all" if one else labels, **defaults | settings)

    return make


def _held_out(workload: Workload, labels: Any, rate: Any, interval: Any) -> Any:
    """Slope and curvature from probes of validation batches, by which the grid is chosen too."""
    rule = _hidlr(slope="probes")(workload, labels, rate, interval)
    held_out = workload._replace(splits={"train": workload.splits["validation"]})

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        batch = held_out.sample(jax.random.fold_in(jax.random.key(0), state.count))
        return rule.update(updates, state, params, batch=batch, grad=extra["grad"])

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _paper(workload: Workload, labels: Any, rate: Any, interval: Any) -> Any:
    return hd.paper_hidlr(
        workload.loss, labels, init_learning_rate=rate, update_interval=interval, batch_size=1
    )


def _gen(workload: Workload, labels: Any, rate: Any, interval: Any) -> Any:
    return gen_hidlr(workload.loss, labels, init_learning_rate=rate, update_interval=interval)


# Every rule that takes the direction of the case's optimizer and its other settings.
RULES: dict[str, Factory] = {
    "hidlr": _hidlr(),
    "hidlr, linear": _hidlr("linear"),
    "hidlr, cosine": _hidlr("cosine"),
    "hidlr, held-out batches": _held_out,
    "Hi-ULR": _hidlr(one=True),
    "Algorithm 1": _paper,
    "Algorithm 1, smoothed": _gen,
}
ABLATIONS: dict[str, Factory] = {
    "without guard": _hidlr(solver=hd.coupled(max_rise=None)),
    "without shrinkage": _hidlr(solver=hd.coupled(shrinkage=0.0)),
    "without averaging": _hidlr(solver=hd.coupled(averaging=0.0)),
    "max_change 10": _hidlr(solver=hd.coupled(max_change=10.0)),
    "shrinkage 1": _hidlr(solver=hd.coupled(shrinkage=1.0)),
    "without warm-up": _hidlr(warmup=0),
    "warm-up of 10": _hidlr(warmup=10),
    "diagonal()": _hidlr(solver=hd.diagonal()),
    "slope from the gradient": _hidlr(slope="gradient"),
    "Hessian": _hidlr(curvature=hd.hessian(batch_size=1)),
    "initial rates found": _hidlr(init_learning_rate=None),
    "cosine, one restart": _hidlr("restarts"),
    "direction in bfloat16": _hidlr(lagged_dtype=jnp.bfloat16),
}
# What brings its own step. Schedule-free AdamW is not free of a rate: it is given the usual one.
OTHERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "Prodigy": lambda: optax.contrib.prodigy(1.0),
    "D-Adaptation": lambda: optax.contrib.dadapt_adamw(1.0),
    "DoG": lambda: optax.contrib.dog(1.0),
    "schedule-free AdamW": lambda: optax.contrib.schedule_free_adamw(2.5e-3),
}


class Job(NamedTuple):
    """Some runs that share one compilation."""

    key: dict[str, Any]  # what their lines have in common, beside the seed
    execute: Callable[[int], list[dict[str, Any]]]  # seed -> results


@functools.cache
def load(name: str, steps: int | None) -> Workload:
    """A workload, its runs cut to `steps` where that is a number."""
    workload = WORKLOADS[name]()
    return workload if steps is None else workload._replace(steps=steps)


def last(state: Any, params: Any) -> Any:
    """The parameters of the last step, which all but schedule-free optimizers are judged by."""
    del state
    return params


def train(
    workload: Workload, tx: Any, key: jax.Array, evaluated: Callable[[Any, Any], Any] = last
) -> tuple[dict[str, jax.Array], Any]:
    """One run -> the loss on each split and the optimizer state."""
    tx = optax.with_extra_args_support(tx)
    init_key, batch_key = jax.random.split(key)
    params = workload.init(init_key)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        batch = workload.sample(key)
        loss, grads = jax.value_and_grad(workload.loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=loss, grad=grads)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batch_key, workload.steps)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    final = evaluated(state, params)
    losses = {name: workload.loss(final, batch) for name, batch in workload.splits.items()}
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
    return losses | {"finite": finite}, state


def _plain(losses: dict[str, jax.Array]) -> dict[str, Any]:
    return {name: bool(x) if name == "finite" else float(x) for name, x in losses.items()}


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
            return train(workload, optax.chain(*parts), key)[0]

        return jax.jit(jax.vmap(run, in_axes=(0, None)))

    def execute(seed: int) -> list[dict[str, Any]]:
        losses = compiled()(jnp.asarray(rates, jnp.float32), jax.random.key(seed))
        per_rate = [{k: v[i] for k, v in losses.items()} for i in range(len(rates))]
        return [_plain(x) | {"rate": float(r)} for x, r in zip(per_rate, rates, strict=True)]

    key = {"method": "grid", "workload": name, "optimizer": optimizer, "schedule": schedule}
    return Job(key, execute)


def case_job(method: str, factory: Factory, case: Case, steps: int | None) -> Job:
    """A rule on a case."""

    @functools.cache
    def compiled() -> Any:
        workload = load(case.workload, steps)
        groupings = list(workload.groupings.values())
        labels = groupings[case.grouping % len(groupings)]

        def run(rate: jax.Array, key: jax.Array) -> Any:
            rule = factory(workload, labels, rate, case.interval)
            tx = optax.chain(OPTIMIZERS[case.optimizer](), rule)
            losses, state = train(workload, tx, key)
            return losses, optax.tree.get(state, "cuts", jnp.zeros((), jnp.int32))

        return jax.jit(run)

    def execute(seed: int) -> list[dict[str, Any]]:
        rate = jnp.float32(USUAL[case.optimizer] * case.scale)
        losses, cuts = compiled()(rate, jax.random.key(seed))
        return [_plain(losses) | {"cuts": int(cuts)}]

    return Job({"method": method} | case._asdict(), execute)


def other_job(method: str, name: str, steps: int | None) -> Job:
    """An optimizer without a learning rate on a workload."""

    @functools.cache
    def compiled() -> Any:
        workload = load(name, steps)
        averaged = "schedule-free" in method
        evaluated = optax.contrib.schedule_free_eval_params if averaged else last
        return jax.jit(lambda key: train(workload, OTHERS[method](), key, evaluated)[0])

    def execute(seed: int) -> list[dict[str, Any]]:
        return [_plain(compiled()(jax.random.key(seed)))]

    return Job({"method": method, "workload": name}, execute)


def jobs(suite: str) -> Iterator[Job]:
    """All of a suite, ordered so that a cut at any time leaves something to compare."""
    chosen = cases()
    rules = dict(RULES)
    names, steps = list(WORKLOADS), None
    if suite == "smoke":
        names, steps = ["digits", "ellipse"], 20
        chosen = [case for case in chosen if case.workload in names][::3]
        rules = {name: RULES[name] for name in ("hidlr", "Algorithm 1, smoothed")}
    for name in names:
        for optimizer, schedule in itertools.product(OPTIMIZERS, ("constant", "cosine")):
            yield grid_job(name, optimizer, schedule, steps)
        for case in chosen:
            if case.workload == name:
                for method, factory in rules.items():
                    yield case_job(method, factory, case, steps)
        for method in OTHERS if suite != "smoke" else ["Prodigy"]:
            yield other_job(method, name, steps)
    if suite != "full":
        return
    for case in half(chosen):
        for method, factory in ABLATIONS.items():
            yield case_job(method, factory, case, steps)


def half(chosen: list[Case]) -> list[Case]:
    """Every second case in a chessboard of workloads and optimizers, the toys left out."""
    places = itertools.product(range(len(WORKLOADS)), range(len(OPTIMIZERS)))
    board = zip(places, chosen, strict=True)
    return [case for (i, j), case in board if (i + j) % 2 == 0 and case.workload not in TOYS]


def read(path: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(
    suite: str, path: Path, shard: tuple[int, int], seeds: range, methods: list[str] | None
) -> None:
    """Runs what is missing and appends it."""
    done = {_identity(row) for row in read(path)}
    index, count = shard
    chosen = [job for job in jobs(suite) if methods is None or job.key["method"] in methods]
    mine = chosen[index::count]
    for job in tqdm(mine, desc=f"shard {index}/{count}"):
        for seed in seeds:
            key = job.key | {"seed": seed}
            if _identity(key) in done:
                continue
            start = time.perf_counter()
            results = job.execute(seed)
            seconds = {"seconds": round(time.perf_counter() - start, 2)}
            with path.open("a") as file:
                file.writelines(json.dumps(key | x | seconds) + "\n" for x in results)


_KEY = ("method", "workload", "optimizer", "schedule", "grouping", "interval", "scale", "seed")


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


def _mean(rows: list[dict[str, Any]], split: str) -> float:
    """Over seeds; one run that is not finite makes it infinite."""
    values = [row[split] for row in rows]
    return float(np.mean(values)) if np.all(np.isfinite(values)) else np.inf


def best_of_grid(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(workload, optimizer) -> mean losses at the rate and schedule of least validation loss."""
    settings = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if row["method"] == "grid":
            place = row["workload"], row["optimizer"]
            settings[place][row["rate"], row["schedule"]].append(row)
    best = {}
    for place, runs in settings.items():
        chosen = min(runs, key=lambda setting: _mean(runs[setting], "validation"))
        best[place] = {split: _mean(runs[chosen], split) for split in ("train", "test")}
        best[place]["setting"] = chosen
    return best


class Outcome(NamedTuple):
    """One method on one case, over the best of the grid."""

    case: tuple[Any, ...]
    train: float
    test: float


def outcomes(rows: list[dict[str, Any]]) -> dict[str, list[Outcome]]:
    """Method -> its ratios, the toys left out; the others against AdamW's grid."""
    best = best_of_grid(rows)
    runs = collections.defaultdict(list)
    for row in rows:
        if row["method"] != "grid" and row["workload"] not in TOYS:
            runs[_identity(row)[:-1]].append(row)
    found = collections.defaultdict(list)
    for identity, repeats in runs.items():
        method, workload, optimizer, *_ = identity
        tuned = best[workload, optimizer or "AdamW"]
        ratios = [_mean(repeats, split) / tuned[split] for split in ("train", "test")]
        found[method].append(Outcome(identity[1:], *ratios))
    return found


def table(found: dict[str, list[Outcome]], rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per method."""
    broken = collections.Counter(row["method"] for row in rows if not row["finite"])
    lines = [
        "| method | cases | test: median | 90 % | worst | train: median | 90 % | worst "
        "| runs not finite |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, results in found.items():
        cells = [method, str(len(results))]
        for split in ("test", "train"):
            ratios = np.array([getattr(outcome, split) for outcome in results])
            ninety = np.quantile(ratios, 0.9, method="higher")
            cells += [f"{x:.3g}" for x in (np.median(ratios), ninety, ratios.max())]
        lines.append("| " + " | ".join([*cells, str(broken[method])]) + " |")
    return "\n".join(lines)


def on(found: dict[str, list[Outcome]], keep: Callable[[tuple[Any, ...]], bool]) -> Any:
    """The outcomes of some cases."""
    chosen = {method: [x for x in results if keep(x.case)] for method, results in found.items()}
    return {method: results for method, results in chosen.items() if results}


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}" if np.isfinite(ratio) else "∞"


def against_one_rate(found: dict[str, list[Outcome]]) -> str:
    """Markdown: the test loss with K rates over that with one, per workload."""
    one = {outcome.case: outcome.test for outcome in found["Hi-ULR"]}
    ratios = collections.defaultdict(list)
    for outcome in found["hidlr"]:
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
    for case in ratios["hidlr"]:
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


def report(path: Path, figure: Path | None, details: bool) -> None:
    """Prints the tables and draws the profile."""
    rows = read(path)
    found = outcomes(rows)
    rules = {name: found[name] for name in RULES if name in found}
    print("All cases, loss over that of the tuned grid:\n")
    real = [row for row in rows if row["workload"] not in TOYS]
    print(table(rules, real))
    adamw = on(found, lambda case: case[1] in (None, "AdamW"))
    adamw = {name: adamw[name] for name in (*RULES, *OTHERS) if name in adamw}
    print("\nAdamW as the direction, beside what needs no learning rate:\n")
    print(table(adamw, [row for row in real if row.get("optimizer", "AdamW") == "AdamW"]))
    ablated = {x.case for name in ABLATIONS for x in found.get(name, [])}
    if ablated:
        whole = ("hidlr", "hidlr, linear", "hidlr, cosine")
        names = [name for name in (*whole, *ABLATIONS) if name in found]
        print("\nThe half of the cases on which one part at a time was taken away or changed:\n")
        same = [row for row in rows if _identity(row)[1:-1] in ablated]
        print(table(on({n: found[n] for n in names}, ablated.__contains__), same))
    if details:
        print("\n" + against_one_rate(found), toys(rows), by_case(rows, found), sep="\n\n")
    if figure is not None:
        profile({f"all {len(rules['hidlr'])} cases": rules, "AdamW alone": adamw}).savefig(
            figure, dpi=150
        )


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=("smoke", "full"), default="full")
    parser.add_argument("--out", type=Path, default=Path("robustness.jsonl"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    parser.add_argument("--methods", nargs="*", help="run these alone; 'grid' is one of them")
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    parser.add_argument("--details", action="store_true", help="report every case")
    args = parser.parse_args()
    index, count = map(int, args.shard.split("/"))
    if not args.report:
        seeds = SEEDS if args.suite == "full" else range(1)
        run(args.suite, args.out, (index, count), seeds, args.methods)
    if count == 1 or args.report:
        report(args.out, args.figure, args.details)


if __name__ == "__main__":
    main()
