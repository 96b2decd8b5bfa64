"""What comparisons of modules that are too large for a scan share: the loop, tuning, the report.

Every run is one `Method` on one `Task` with one seed. Baselines are tuned the usual way: a grid of
rates for each family, on seed 0, the best by validation score; the other seeds run that one alone.
Runs that are in the log are not run again.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import hidlr_optax as hd
import hidlr_optax.flax
import hidlr_optax.plot
from benchmarks.kit.loop import SCHEDULES, Method, last
from benchmarks.kit.store import Log
from benchmarks.kit.tables import markdown, score

_NOT_SETTINGS = ("out", "seeds", "methods")  # may change between calls


class Task(NamedTuple):
    """A model to train, and the data to train it on.

    Attributes:
      build: seed -> the model.
      wrt: the nnx filter of the parameters that are trained.
      loss_fn: (model, batch) -> scalar.
      batch: (seed, step) -> a batch; the same at each call, so that runs can be resumed.
      evaluate: (model, "validation" or "test") -> named scores; "score" is what methods are
        chosen by, higher is better.
    """

    build: Callable[[int], nnx.Module]
    wrt: Any
    loss_fn: Callable[[Any, Any], jax.Array]
    batch: Callable[[int, int], Any]
    evaluate: Callable[[Any, str], dict[str, float]]


def given_rates(param_labels: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of each group by `rates[label]`, an argument of `update`.

    The place in the chain that `hidlr` takes otherwise. As arguments, all schedules are compiled
    once.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params
        rates, labels = extra_args["rates"], param_labels(updates)
        return jax.tree.map(lambda label, update: rates[label] * update, labels, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def label_all(params: Any) -> Any:
    """One group."""
    return jax.tree.map(lambda _: "all", params)


def baselines(
    grid: Sequence[float],
    steps: int,
    tx: optax.GradientTransformationExtraArgs,
    factors: Mapping[str, float],
) -> list[Method]:
    """AdamW at every rate of the grid with every schedule; arguments as those of `tuned`."""
    names = {schedule: f"AdamW, {schedule}" for schedule in SCHEDULES}
    families = [tuned(names[key], key, grid, steps, tx, factors) for key in SCHEDULES]
    return [method for family in families for method in family]


def tuned(
    name: str,
    schedule: str,
    grid: Sequence[float],
    steps: int,
    tx: optax.GradientTransformationExtraArgs,
    factors: Mapping[str, float],
) -> list[Method]:
    """One method for each rate of a grid.

    Args:
      name: of the family.
      schedule: a key of `SCHEDULES`.
      grid: the rates.
      steps: of a run.
      tx: ends with `given_rates`.
      factors: label -> what the rate of that group is multiplied by.
    """
    curve = SCHEDULES[schedule](steps)

    def rates(rate: float, step: int) -> dict[str, float]:
        factor = float(np.asarray(curve(step)))
        return {label: rate * factor * times for label, times in factors.items()}

    return [
        Method(tx, last, f"{name} {rate:g}", name, lambda step, rate=rate: rates(rate, step))
        for rate in grid
    ]


def untuned(rules: Mapping[str, optax.GradientTransformationExtraArgs]) -> list[Method]:
    """AdamW's direction with rules that find their own rates."""
    chains = {name: optax.chain(optax.adamw(1.0), rule) for name, rule in rules.items()}
    return [Method(chain, last, name, name) for name, chain in chains.items()]


def make_step(task: Task) -> Callable[..., dict[str, jax.Array]]:
    """The training step, compiled once for each optimizer."""

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Any, rates: Any) -> Any:
        value_fn = hidlr_optax.flax.value_fn_for(model, task.loss_fn, batch, wrt=task.wrt)
        gradient = nnx.value_and_grad(task.loss_fn, argnums=nnx.DiffState(0, task.wrt))
        loss, grads = gradient(model, batch)
        optimizer.update(
            model, grads, value_fn=value_fn, value=loss, grad=grads, batch=batch, rates=rates
        )
        has_rates = bool(optax.tree.get_all_with_path(optimizer.opt_state, "group_learning_rates"))
        return {"loss": loss} | (hd.metrics(optimizer.opt_state) if has_rates else {})

    return step


def train(
    task: Task, method: Method, seed: int, step: Callable[..., Any], steps: int, log: Log
) -> None:
    """One run, to its rows in the log: one for each step, and one for its end."""
    model = task.build(seed)
    optimizer = nnx.Optimizer(model, method.tx, wrt=task.wrt)
    run, rows = {"method": method.name, "seed": seed}, []
    bar = tqdm(range(steps), f"{method.name}, seed {seed}", disable=None)
    for n in bar:
        start = time.perf_counter()
        row = step(model, optimizer, task.batch(seed, n), dict(method.rates(n)))
        row = jax.tree.map(float, jax.device_get(row))
        rows.append(run | {"step": n, "seconds": time.perf_counter() - start} | row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    trained = nnx.state(model, task.wrt)
    leaves = jax.tree.leaves(method.evaluated(optimizer.opt_state, trained))
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(trained), leaves))
    scores = {part: task.evaluate(model, part) for part in ("validation", "test")}
    # The first step compiles.
    end = {
        "train_loss": float(np.mean([row["loss"] for row in rows[-steps // 10 :]])),
        "seconds": sum(row["seconds"] for row in rows[1:]),
    }
    log.write([*rows, run | scores | end])


def best(methods: Sequence[Method], log: Log) -> list[Method]:
    """Of each family, the method with the best validation score on seed 0."""
    families: dict[str, list[Method]] = {}
    for method in methods:
        families.setdefault(method.family, []).append(method)

    def score(method: Method) -> float:
        result = log.result(method.name, 0)
        assert result is not None
        return float(np.nan_to_num(result["validation"]["score"], nan=-np.inf))

    return [max(family, key=score) for family in families.values()]


def compare(task: Task, methods: Sequence[Method], args: Any, log: Log) -> list[Method]:
    """Everything with seed 0, then the best of each family with the other seeds; returns those."""
    step = make_step(task)

    def missing(candidates: Sequence[Method], seed: int) -> None:
        for method in candidates:
            if log.result(method.name, seed) is None:
                train(task, method, seed, step, args.steps, log)

    missing(methods, 0)
    chosen = best(methods, log)
    for seed in range(1, args.seeds):
        missing(chosen, seed)
    return chosen


def epoch_rows(seed: int, step: int, size: int, batch_size: int) -> np.ndarray:
    """(batch_size,) rows for a step: every epoch in an order of its own."""
    epoch, place = divmod(step, max(size // batch_size, 1))
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[place * batch_size :][:batch_size]


def logits_of(predict: Callable[[np.ndarray], Any], size: int, batch_size: int = 64) -> np.ndarray:
    """(size, classes) of `predict`, rows -> logits, in batches of one shape."""
    batches = np.arange(-(-size // batch_size) * batch_size).reshape(-1, batch_size) % size
    return np.concatenate([predict(rows) for rows in batches])[:size]


def classified(logits: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """(n, classes) logits and (n,) classes -> (n,) guesses, and the mean cross-entropy."""
    logits = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, truth[:, None], 1)[:, 0]
    return logits.argmax(1), float(losses.mean())


def table(methods: Sequence[Method], seeds: int, log: Log) -> str:
    """Test scores over the seeds that each method has run with, as Markdown."""
    rows, names = [], []
    for method in methods:
        found = [log.result(method.name, seed) for seed in range(seeds)]
        results = [result for result in found if result is not None]
        names = [name for name in results[0]["test"] if name != "score"]
        tests = [score(name, [result["test"][name] for result in results]) for name in names]
        train_loss = score("loss", [result["train_loss"] for result in results])
        seconds = np.median([result["seconds"] for result in results])
        rows.append([method.name, len(results), *tests, train_loss, f"{seconds:.0f}"])
    head = ["method", "seeds", *(f"test {name}" for name in names), "train loss", "seconds"]
    return markdown(head, rows)


def draw(chosen: Sequence[Method], log: Log, out: Path) -> None:
    """Losses of the chosen methods; rates and influences of the first that has some."""
    histories = {method.name: log.history(method.name, 0) for method in chosen}
    hidlr_optax.plot.losses(histories).savefig(out / "losses.png", dpi=120)
    for name, history in histories.items():
        if sum(key.startswith("learning_rate/") for key in history[0]) > 1:
            slug = name.replace(", ", "-").replace(" ", "-").replace("/", "-")
            hidlr_optax.plot.learning_rates(history).savefig(out / f"rates-{slug}.png", dpi=120)
            last = {k: x for k, x in history[-1].items() if k.startswith("ppi/")}
            if max(last.values()) > 0:  # short runs have not measured it
                hidlr_optax.plot.influence(history).savefig(out / f"influence-{slug}.png", dpi=120)


def parse(parser: argparse.ArgumentParser) -> Any:
    """The arguments; those of a smoke run with --quick."""
    args = parser.parse_args()
    for name in ("steps", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.quick:
        args.steps, args.seeds = min(args.steps, 4), 1
    return args


@contextlib.contextmanager
def bad_input(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What is wrong with the data, in one line and without a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def offered(args: Any, methods: Sequence[Method]) -> list[Method]:
    """Those that --methods names; with --quick, one baseline and one rule of them."""
    wanted = args.methods or [method.name for method in methods]
    chosen = [method for method in methods if {method.name, method.family} & {*wanted}]
    unknown = {*wanted} - {name for method in chosen for name in (method.name, method.family)}
    if unknown:
        known = ", ".join(f"'{method.name}'" for method in methods)
        raise SystemExit(f"no method {sorted(unknown)}; there are {known}, and their families")
    return [chosen[0], chosen[-1]] if args.quick else chosen


def main(task: Task, methods: Sequence[Method], args: Any) -> None:
    """Trains, prints the tables and draws the figures."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    start = time.perf_counter()
    log = Log(args.out / "log.jsonl", settings)
    chosen = compare(task, methods, args, log)
    print("\nThe best of each family:", table(chosen, args.seeds, log), sep="\n\n")
    others = [method for method in methods if method not in chosen]
    if others:
        print("\nThe rest of the grids, seed 0:", table(others, 1, log), sep="\n\n")
    draw(chosen, log, args.out)
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes; log and figures: {args.out}")


def arguments(description: str | None, out: str, steps: int) -> argparse.ArgumentParser:
    """The options that they share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=steps, help="of each run")
    parser.add_argument("--seeds", type=int, default=1, help="for the best of each family")
    parser.add_argument("--methods", nargs="+", help="these alone, or all of a family")
    parser.add_argument("--out", type=Path, default=Path(out), help="log and figures")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    return parser
