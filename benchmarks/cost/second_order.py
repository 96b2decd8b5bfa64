"""What a step costs with other second-order rules, each beside its own base step.

One perceptron, 784–512–512–10, cross-entropy, batches of 256 MNIST images, float32: `hiulr` and
`hidlr` beside AdamW in JAX; kfac-jax, whose step is a natural gradient with its own damping and
rate, beside SGD with momentum in JAX; gen-optim, the authors' one rate from three forward passes
(K = 1, PyTorch), beside AdamW in PyTorch. All refresh every ten steps but kfac-jax, which has its
own settings (as in its README). Seconds of different frameworks are not compared, only ratios.

    pip install -e '.[second-order]'
    python -m benchmarks.cost.second_order --out second_order.json
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import stepper
from benchmarks.kit.tables import markdown
from benchmarks.problems import data, small

SIZES, BATCH, INTERVAL = (784, 512, 512, 10), 256, 10

Advance = Callable[[], None]  # does so many steps as a cycle has, and waits for the last


def images() -> tuple[np.ndarray, np.ndarray]:
    """MNIST-5k in an order of chance."""
    images, digits = data.mnist()
    order = np.random.default_rng(0).permutation(len(digits))
    return images.reshape(len(images), -1)[order], digits[order]


def batches(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Over and over."""
    places = itertools.cycle(range(0, len(x) - BATCH, BATCH))
    return ((x[n : n + BATCH], y[n : n + BATCH]) for n in places)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Cross-entropy."""
    return small.cross_entropy(small.mlp, params, batch)


def in_optax(tx: optax.GradientTransformation, batches: Any, cycle: int) -> Advance:
    """A jitted step of an Optax chain."""
    step = jax.jit(stepper(loss_fn, tx), donate_argnums=(0, 1))
    params = small.mlp_init(SIZES, jax.random.key(0))
    carry, known = (params, tx.init(params)), [jax.device_put(next(batches)) for _ in range(cycle)]

    def advance() -> None:
        nonlocal carry
        for batch in known:
            carry = step(*carry, batch)[:2]
        jax.block_until_ready(carry)

    return advance


def in_kfac(batches: Any, cycle: int) -> Advance:
    """kfac-jax with the adaptive rate, momentum and damping of its README."""
    import kfac_jax  # pyright: ignore[reportMissingImports]

    def registered(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = small.mlp(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(registered),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        num_burnin_steps=0,
    )
    key, known = jax.random.key(0), [jax.device_put(next(batches)) for _ in range(cycle)]
    params = small.mlp_init(SIZES, key)
    state = optimizer.init(params, key, known[0])

    def advance() -> None:
        nonlocal params, state
        for batch in known:
            params, state, _ = optimizer.step(params, state, key, batch=batch)
        jax.block_until_ready(params)

    return advance


def in_torch(with_gen: bool, batches: Any, cycle: int) -> Advance:
    """AdamW in PyTorch, and gen-optim's call before every tenth step."""
    import torch  # pyright: ignore[reportMissingImports]
    from GeN import lr_parabola  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    layers = [(torch.nn.Linear(n, m), torch.nn.ReLU()) for n, m in itertools.pairwise(SIZES)]
    net = torch.nn.Sequential(*[part for pair in layers for part in pair][:-1])
    optimizer, loss = torch.optim.AdamW(net.parameters(), lr=1e-3), torch.nn.CrossEntropyLoss()
    known = [(torch.tensor(x), torch.tensor(y).long()) for x, y in itertools.islice(batches, cycle)]
    endless, told = itertools.cycle(known), {"task": "image_cls", "device": "cpu"}

    def advance() -> None:
        for n, (x, y) in enumerate(known):
            loss(net(x), y).backward()
            if with_gen and n % INTERVAL == 0:
                lr_parabola(net, optimizer, tr_iter=endless, **told)
            optimizer.step()
            optimizer.zero_grad()

    return advance


def pairs(cycle: int) -> dict[str, tuple[str, Advance, Advance]]:
    """Rule -> the name of its base, its step and that of the base."""
    endless = batches(*images())
    adamw, momentum = optax.adamw(1e-3), optax.sgd(1e-2, momentum=0.9)
    one = hd.hiulr(loss_fn, update_interval=INTERVAL)
    several = hd.hidlr(loss_fn, small.first_key, update_interval=INTERVAL)

    def behind_adamw(rule: Any) -> tuple[str, Advance, Advance]:
        own = in_optax(optax.chain(optax.adamw(1.0), rule), endless, cycle)
        return "AdamW, JAX", own, in_optax(adamw, endless, cycle)

    return {
        "hiulr": behind_adamw(one),
        "hidlr, K = 3": behind_adamw(several),
        "kfac-jax": ("momentum, JAX", in_kfac(endless, cycle), in_optax(momentum, endless, cycle)),
        "gen-optim": (
            "AdamW, PyTorch",
            in_torch(True, endless, cycle),
            in_torch(False, endless, cycle),
        ),
    }


def seconds(advance: Advance) -> float:
    """Of one cycle."""
    start = time.perf_counter()
    advance()
    return time.perf_counter() - start


def measure(cycle: int, repeats: int) -> list[dict[str, Any]]:
    """Rows: each rule and its base in turn, after cycles that compile and find rates."""
    rows = []
    for name, (base_name, own, base) in pairs(cycle).items():
        for advance in (own, own, base):
            advance()
        times = [(seconds(own), seconds(base)) for _ in range(repeats)]
        ratios = sorted(b / a for a, b in times)
        rows.append(
            {
                "rule": name,
                "base": base_name,
                "base_ms": 1e3 * statistics.median(b for _, b in times) / cycle,
                "speed": statistics.median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        [
            row["rule"],
            f"{row['base']}: {row['base_ms']:.2f} ms",
            f"{row['speed']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
        ]
        for row in rows
    ]
    return markdown(["rule", "base step", "speed over its base's"], lines)


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("second_order.json"))
    parser.add_argument("--cycle", type=int, default=20, help="steps that are timed at once")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rows = measure(args.cycle, args.repeats)
    machine = {"jax": jax.__version__, "processor": platform.processor() or platform.machine()}
    args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
