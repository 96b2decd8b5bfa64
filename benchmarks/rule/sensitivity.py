"""Every constant of the default rule at a half and at twice its value, on small problems.

The constants of `hidlr_optax/_rule/` are read when the rule is traced. Here they are arrays, so
that all variants of a case are lanes of one compiled program. Cosine schedule, K rates, Φ = 10,
nothing given; losses over those of the rule as it is, on the same seeds.

    pip install -e '.[bench]'
    python -m benchmarks.rule.sensitivity --out sensitivity.jsonl
    python -m benchmarks.rule.sensitivity --report --out sensitivity.jsonl
"""

import argparse
import collections
import contextlib
import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import SCHEDULES, Method, plain, train
from benchmarks.kit.store import Job, Row, Store
from benchmarks.kit.tables import markdown
from benchmarks.problems.small import PROBLEMS
from benchmarks.rule.cases import OPTIMIZERS
from hidlr_optax._rule import guard, measure, rate, record, shape

CASES = (
    ("digits", "AdamW"),
    ("digits", "SGD"),
    ("digits, 20 % noise", "momentum"),
    ("MNIST MLP", "Lion"),
    ("synthetic NAM", "SGD"),
    ("sentiment", "AdamW"),
    ("synthetic NAM", "AdamW"),
    ("LoRA", "Lion"),
)
SEEDS = 1
CHECKS = 10
MODULES = (measure, rate, shape, guard, record)
ARGUMENTS = {"warmup": 20.0}
DECAYS = ("FIND", "HOLD", "CURVATURES")  # memories of averages
FACTORS = ("GROW", "FALL", "RECOVER")  # halved and doubled as logarithms
FIELDS = ("workload", "optimizer", "constant", "times")


def constants() -> dict[str, float]:
    """Name -> value, those of the modules and of the arguments that are numbers."""
    found = {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, float) and name != "TINY"
    }
    return found | ARGUMENTS


def scaled(name: str, value: float, times: float) -> float:
    """A constant at a half or at twice its value; of a decay, the memory of 1/(1 − decay) terms."""
    if name in DECAYS:
        return 1 - (1 - value) / times
    return value**times if name in FACTORS else value * times


def variants() -> list[tuple[str, float, dict[str, float]]]:
    """(constant, times, all constants): first the rule as it is."""
    known = constants()
    changed = [
        (name, times, known | {name: scaled(name, value, times)})
        for name, value in known.items()
        for times in (0.5, 2.0)
    ]
    return [("none", 1.0, known), *changed]


@contextlib.contextmanager
def given(values: dict[str, Any]) -> Iterator[None]:
    """The constants of the rule, which may be traced, inside."""
    traceable = types.SimpleNamespace(log=lambda x: jnp.log(jnp.float32(x)))
    inside = {name: value for name, value in values.items() if name not in ARGUMENTS}
    with contextlib.ExitStack() as stack:
        for module in MODULES:  # one may have imported the constant of another
            for name, value in (inside | {"math": traceable}).items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


def runs(name: str, optimizer: str) -> Any:
    """Seed -> the results of every variant, one lane each."""
    problem = PROBLEMS[name]()
    lanes = [values for _, _, values in variants()]
    stacked = {name: jnp.array([lane[name] for lane in lanes]) for name in lanes[0]}

    def run(values: dict[str, jax.Array], key: jax.Array) -> Any:
        with given(values):
            rule = hd.hidlr(
                problem.loss,
                problem.labels,
                schedule=SCHEDULES["cosine"](problem.steps),
                warmup=values["warmup"].astype(jnp.int32),  # pyright: ignore[reportArgumentType]
            )
            tx = optax.chain(OPTIMIZERS[optimizer](), rule)
            return train(problem, Method(tx), key, CHECKS)[0]

    compiled = jax.jit(jax.vmap(run, in_axes=(0, None)))
    return lambda seed: compiled(stacked, jax.random.key(seed))


def job(name: str, optimizer: str) -> Job:
    """A case, all variants."""
    compiled = functools.cache(lambda: runs(name, optimizer))

    def execute(seed: int) -> list[Row]:
        found = jax.tree.map(np.asarray, compiled()(seed))
        return [
            {"constant": constant, "times": times} | plain({k: v[i] for k, v in found.items()})
            for i, (constant, times, _) in enumerate(variants())
        ]

    return Job(
        {"workload": name, "optimizer": optimizer, "constant": "none", "times": 1.0}, execute
    )


def report(rows: list[Row]) -> str:
    """Markdown, one line per constant: test loss over that of the rule as it is."""
    losses: Any = collections.defaultdict(list)
    for row in rows:
        case = row["workload"], row["optimizer"]
        losses[row["constant"], row["times"], case].append(row["test"])
    cases = list(dict.fromkeys(case for *_, case in losses))

    def cell(name: str, times: float) -> str:
        mean = {c: np.mean(losses[name, times, c]) / np.mean(losses["none", 1.0, c]) for c in cases}
        worst = max(mean, key=lambda case: mean[case])
        average = np.exp(np.mean(np.log(list(mean.values()))))
        return f"{average:.2f}, {mean[worst]:.2f} ({worst[0]}, {worst[1]})"

    head = ["constant", "value", "at a half: mean, worst", "at twice: mean, worst"]
    lines = [[n, f"{x:g}", cell(n, 0.5), cell(n, 2.0)] for n, x in constants().items()]
    return markdown(head, lines)


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("sensitivity.jsonl"))
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    args = parser.parse_args()
    store = Store(args.out, FIELDS)
    if not args.report:
        store.run([job(*case) for case in CASES], range(SEEDS))
    print(report(store.rows()))


if __name__ == "__main__":
    main()
