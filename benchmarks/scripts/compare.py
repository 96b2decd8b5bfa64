"""Public training scripts as they are written, beside the same ones with `hidlr`: is it worth it?

Three of them, in `scripts/`: a CNN with batch norm and dropout (nnx), a small GPT with clipping,
accumulation and sharding (nnx), a physics-informed network (plain JAX).
Each has its usual optimizer and rate, constant and by its schedule (cosine where none is
published), and `hidlr` with groups by role or one rate for all; nothing is tuned. Three times the
usual rate is there because the runs are shorter than those that it was published for. One table
says who is ahead on data that is not trained on. Runs that are in the file are not run again.

    python -m benchmarks.scripts.compare --out real_scripts.jsonl
    python -m benchmarks.scripts.compare --scripts pinn --seeds 1
"""

import argparse
import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit.store import Job, Row, Store
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.scripts import mnist_cnn, pinn, small_gpt
from benchmarks.scripts.script import Loop, Script

SCRIPTS: dict[str, Script] = {
    "mnist_cnn": mnist_cnn.SCRIPT,
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


def trained(loop: Loop, script: Script, updates: int, seed: int) -> float:
    """The score of a run."""
    batches, state = script.batches(seed), loop.start(seed)
    for _ in tqdm(range(updates * script.accumulated), leave=False, disable=None):
        out = loop.step(*state, next(batches))
        state = out[:-1] if isinstance(out, tuple) else state
    return script.evaluate(*state)


def jobs(name: str, quick: bool) -> Iterator[Job]:
    """Every method; each is compiled once."""
    script = SCRIPTS[name]
    updates = 2 if quick else script.updates
    for method in ("usual", "hidlr") if quick else METHODS:
        loop = functools.cache(functools.partial(METHODS[method], script, updates))

        def train(seed: int, loop: Callable[[], Loop] = loop) -> list[Row]:
            return [{"score": trained(loop(), script, updates, seed)}]

        yield Job({"script": name, "method": method, "updates": updates}, train)


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


def line(name: str, rows: Sequence[Row]) -> list[str]:
    """The cells of one script; bold is the best of it."""
    script, scores = SCRIPTS[name], collections.defaultdict(list)
    for row in rows:
        if "score" in row:  # rows of an earlier version may have times alone
            scores[row["method"]].append(row["score"])
    best = min(scores, key=lambda method: float(np.mean(scores[method])))
    cells = {method: mean_sd(values, script.digits) for method, values in scores.items()}
    cells[best] = f"**{cells[best]}**"
    described = [name, script.metric, script.optimizer]
    return [*described, *(cells.get(method, "") for method in METHODS), verdicts(scores)]


def report(rows: Sequence[Row]) -> str:
    """Markdown, one line per script."""
    names = dict.fromkeys(row["script"] for row in rows)
    lines = [line(name, [row for row in rows if row["script"] == name]) for name in names]
    return markdown(["script", "what is measured", "usual optimizer", *METHODS, "ahead"], lines)


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
    store = Store(args.out, FIELDS)
    for name in args.scripts:
        store.run(jobs(name, args.quick), range(1 if args.quick else args.seeds), name)
    updates = {name: 2 if args.quick else SCRIPTS[name].updates for name in args.scripts}
    print(report([row for row in store.rows() if row["updates"] == updates.get(row["script"])]))


if __name__ == "__main__":
    main()
