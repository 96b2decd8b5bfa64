"""Public training scripts as they are written, beside the same ones with `hidlr`: is it worth it?

Five of them, in `scripts/`: a CNN with batch norm and dropout (nnx), a VAE and an LSTM (linen), a
small GPT with clipping, accumulation and sharding (nnx), a physics-informed network (plain JAX).
Each has its usual optimizer and rate, constant and by its schedule (cosine where none is
published), and `hidlr` with groups by role or one rate for all; nothing is tuned. Three times the
usual rate is there because the runs are shorter than those that it was published for. One table
says who is ahead on data that is not trained on, how many lines differ, and what steps and
compilation cost. Runs that are in the file are not run again.

    python -m benchmarks.scripts.compare --out real_scripts.jsonl
    python -m benchmarks.scripts.compare --scripts pinn vae --seeds 1
"""

import argparse
import ast
import collections
import difflib
import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit.store import Job, Row, Store
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.scripts import mnist_cnn, pinn, seq2seq, small_gpt, vae
from benchmarks.scripts.script import Loop, Script

SCRIPTS: dict[str, Script] = {
    "mnist_cnn": mnist_cnn.SCRIPT,
    "vae": vae.SCRIPT,
    "seq2seq": seq2seq.SCRIPT,
    "small_gpt": small_gpt.SCRIPT,
    "pinn": pinn.SCRIPT,
}
FIELDS = ("script", "method", "updates")

Method = Callable[[Script, int], Loop]


def _usual(script: Script, updates: int) -> Loop:
    del updates
    return script.usual(script.rate)


def _usual_by_schedule(script: Script, updates: int, times: float = 1.0) -> Loop:
    schedule = script.schedule or optax.cosine_decay_schedule
    return script.usual(schedule(times * script.rate, updates))


def _hidlr(labels: Any, script: Script, updates: int) -> Loop:
    del updates
    return script.with_hidlr(labels, None)


def _hidlr_by_cosine(labels: Any, script: Script, updates: int) -> Loop:
    return script.with_hidlr(labels, optax.cosine_decay_schedule(1.0, updates))


METHODS: dict[str, Method] = {
    "usual": _usual,
    "usual, schedule": _usual_by_schedule,
    "usual × 3, schedule": functools.partial(_usual_by_schedule, times=3.0),
    "hidlr": functools.partial(_hidlr, hd.label_by_role),
    "hidlr, cosine": functools.partial(_hidlr_by_cosine, hd.label_by_role),
    "one rate": functools.partial(_hidlr, "all"),
    "one rate, cosine": functools.partial(_hidlr_by_cosine, "all"),
}


class Run:
    """A loop on its way."""

    def __init__(self, loop: Loop, script: Script, seed: int):
        self._step, self._batches = loop.step, script.batches(seed)
        self.state = loop.start(seed)

    def advance(self, steps: int) -> float:
        """Takes some steps; returns the seconds they took, batches not counted."""
        batches = [next(self._batches) for _ in range(steps)]
        start = time.perf_counter()
        log = None
        for batch in batches:
            out = self._step(*self.state, batch)
            *self.state, log = out if isinstance(out, tuple) else (*self.state, out)
        jax.block_until_ready(log)
        return time.perf_counter() - start


class Plan(NamedTuple):
    """How much of it is run.

    Attributes:
      methods: their names.
      timed: those whose steps are timed, the usual one first.
      updates: script -> updates of a run.
      block: updates that are timed at once, or a multiple of it.
      block_seconds: the least that they take.
      pairs: how often a block of each is timed, in turn.
    """

    methods: Sequence[str]
    timed: Sequence[str]
    updates: Callable[[Script], int]
    block: int
    block_seconds: float
    pairs: int


# In forty updates, each look of hidlr is due at its place. While rates are found, all of them are.
FULL = Plan(list(METHODS), ("usual", "hidlr", "one rate"), lambda script: script.updates, 40, 1, 5)
QUICK = Plan(("usual", "hidlr"), ("usual", "hidlr"), lambda script: 2, 1, 0, 1)


def jobs(name: str, plan: Plan) -> Iterator[Job]:
    """Every method, and the speed of those that are timed; each is compiled once."""
    script, updates = SCRIPTS[name], plan.updates(SCRIPTS[name])
    loops: dict[str, Loop] = {}

    def run_of(method: str, seed: int) -> Run:
        if method not in loops:
            loops[method] = METHODS[method](script, updates)
        return Run(loops[method], script, seed)

    def train(method: str, seed: int) -> list[Row]:
        compiles = method not in loops
        run = run_of(method, seed)
        first = run.advance(1)
        run.advance(script.accumulated - 1)
        for _ in tqdm(range(1, updates), leave=False, disable=None):
            run.advance(script.accumulated)
        score = {"score": script.evaluate(*run.state)}
        return [score | {"first_step": first} if compiles else score]

    def time_steps(seed: int) -> list[Row]:
        runs = {method: run_of(method, seed) for method in plan.timed}
        found = speeds(runs, script.accumulated, plan)
        groups = sum(key.startswith("learning_rate/") for key in hd.metrics(runs["hidlr"].state))
        return [{"speeds": found, "groups": groups}]

    for method in plan.methods:
        key = {"script": name, "method": method, "updates": updates}
        yield Job(key, functools.partial(train, method))
    yield Job({"script": name, "method": "speed", "updates": updates}, time_steps)


def speeds(runs: dict[str, Run], accumulated: int, plan: Plan) -> dict[str, list[float]]:
    """Steps per second of each, over those of the usual one, in blocks in turn."""
    block = plan.block * accumulated
    for run in runs.values():
        run.advance(block)
    block *= max(1, math.ceil(plan.block_seconds / runs["usual"].advance(block)))
    blocks = [{n: run.advance(block) for n, run in runs.items()} for _ in range(plan.pairs)]
    return {name: [each["usual"] / each[name] for each in blocks] for name in runs}


def program(source: str, kept: str, dropped: str) -> list[str]:
    """The lines of a script that one of two functions makes: its body, and the imports in use.

    Args:
      source: of a module that has both.
      kept: the name of the function that the script consists of.
      dropped: that of the function which is not part of it.

    Returns:
      The lines, without the function's own docstring.
    """
    lines, tree = source.splitlines(), ast.parse(source)
    nodes = [node for node in tree.body if getattr(node, "name", None) != dropped]
    used = {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}
    chosen: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            part = node.lineno if bound & used else None
        elif isinstance(node, ast.FunctionDef) and node.name == kept:
            part = node.body[ast.get_docstring(node) is not None].lineno
        else:
            part = None
        if part is not None:
            chosen += lines[part - 1 : node.end_lineno]
    return chosen


def difference(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """How many lines come, and how many go."""
    marks = [line[:1] for line in difflib.ndiff(before, after)]
    return marks.count("+"), marks.count("-")


def lines_of_difference(script: Script) -> str:
    """Those that come and those that go with `hidlr`."""
    module = inspect.getmodule(script.usual)
    assert module is not None
    source, names = inspect.getsource(module), ("usual", "with_hidlr")
    came, went = difference(program(source, *names), program(source, *reversed(names)))
    return f"+{came} −{went}"


def ahead(usual: Sequence[float], ours: Sequence[float]) -> str:
    """Who is better with every seed: they have the start and the batches in common."""
    if all(a < b for a, b in zip(ours, usual, strict=True)):
        return "hidlr"
    return "usual" if all(a > b for a, b in zip(ours, usual, strict=True)) else "even"


def verdicts(scores: dict[str, list[float]]) -> str:
    """Who is ahead without and with a schedule."""
    pairs = ("usual", "hidlr"), ("usual, schedule", "hidlr, cosine")
    found = [ahead(scores[a], scores[b]) for a, b in pairs if {a, b} <= scores.keys()]
    return ", ".join(found)


def _first_step(rows: Sequence[Row], *methods: str) -> float:
    """Seconds: the least, which is the least disturbed, or 0 where there is none."""
    found = [row["first_step"] for row in rows if row["method"] in methods and "first_step" in row]
    return min(found, default=0.0)


def _cost_cells(rows: Sequence[Row]) -> list[str]:
    (ratios,) = [row["speeds"] for row in rows if row["method"] == "speed"]
    usual, *ours = (
        _first_step(rows, method, f"{method}, {tail}")
        for method, tail in (("usual", "schedule"), ("hidlr", "cosine"), ("one rate", "cosine"))
    )
    return [
        ", ".join(f"{statistics.median(ratios[n]):.2f}" for n in ratios if n != "usual"),
        ", ".join(f"{seconds:.1f}" for seconds in (usual, *ours) if seconds),
        ", ".join(f"{seconds / usual:.1f}" for seconds in ours if usual and seconds),
    ]


def line(name: str, rows: Sequence[Row]) -> list[str]:
    """The cells of one script; bold is the best of it."""
    script, scores = SCRIPTS[name], collections.defaultdict(list)
    for row in rows:
        if "score" in row:
            scores[row["method"]].append(row["score"])
    best = min(scores, key=lambda method: float(np.mean(scores[method])))
    cells = {method: mean_sd(values, script.digits) for method, values in scores.items()}
    cells[best] = f"**{cells[best]}**"
    (groups,) = [str(row["groups"]) for row in rows if "groups" in row]
    described = [name, script.metric, script.optimizer, groups]
    found = [cells.get(method, "") for method in METHODS]
    return [*described, *found, verdicts(scores), lines_of_difference(script), *_cost_cells(rows)]


def report(rows: Sequence[Row]) -> str:
    """Markdown, one line per script."""
    names = dict.fromkeys(row["script"] for row in rows)
    lines = [line(name, [row for row in rows if row["script"] == name]) for name in names]
    head = ["script", "what is measured", "usual optimizer", "K", *METHODS]
    costs = ["speed: K rates, one", "first step, s: usual, K rates, one", "over the usual: K, one"]
    return markdown([*head, "ahead", "lines", *costs], lines)


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", nargs="*", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--seeds", type=int, default=3, help="of start and batches")
    parser.add_argument("--out", type=Path, default=Path("real_scripts.jsonl"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    # The GPT is spread over both. What is not sent anywhere stays on the first.
    jax.config.update("jax_num_cpu_devices", 2)
    if args.quick:
        jax.config.update("jax_disable_most_optimizations", True)
    plan, seeds = (QUICK, 1) if args.quick else (FULL, args.seeds)
    store = Store(args.out, FIELDS)
    for name in args.scripts:
        *training, timing = jobs(name, plan)
        store.run(training, range(seeds), name)
        store.run([timing], [0], f"{name}: speed")
    updates = {name: plan.updates(SCRIPTS[name]) for name in args.scripts}
    print(report([row for row in store.rows() if row["updates"] == updates.get(row["script"])]))


if __name__ == "__main__":
    main()
