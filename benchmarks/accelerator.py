"""What `hidlr` costs on an accelerator: a transformer of twelve layers in bfloat16, AdamW.

Python's help texts byte by byte, parameters in float32 and arithmetic in bfloat16. Every setting is
timed over whole cycles of its refreshes, after the warm-up, and compared with steps of AdamW before
and after it in the same process.

    python benchmarks/accelerator.py --out accelerator.json
    python benchmarks/accelerator.py --quick --out accelerator.json     # small, on any machine
"""

import argparse
import concurrent.futures
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from models import gpt
from tables import markdown

import hidlr_optax as hd

WARM = 21  # steps before the clock starts: the rates are found, and every branch has run
CYCLE = 40  # steps that are timed: at Φ = 10 four refreshes, of which one is a split


class Setting(NamedTuple):
    """A line of the table.

    Attributes:
      name: of the rule.
      groups: K; 0 for AdamW alone.
      interval: Φ.
      arguments: of `hidlr`, beside.
    """

    name: str
    groups: int
    interval: int
    arguments: dict[str, Any]


_LATER = 10**6  # a refresh that never comes
BASE = Setting("AdamW", 0, 0, {})
HOLD = [Setting("hidlr", *sizes, {}) for sizes in ((1, 10), (3, 10), (12, 10), (12, 4), (12, 1))]
OTHERS = [
    Setting("hidlr, direction in bfloat16", 12, 10, {"lagged_dtype": jnp.bfloat16}),
    Setting("hidlr between refreshes", 12, _LATER, {"warmup": 0}),
    *(
        Setting(
            f"first version, probes {how}",
            groups,
            10,
            {"solver": hd.coupled(), "curvature": hd.probes(batch_size=size)},
        )
        for groups in (3, 12)
        for how, size in (("at once", None), ("one at a time", 1))
    ),
]


def language_model(config: gpt.Config) -> tuple[Any, Callable[[Any, Any], jax.Array]]:
    """The parameters, float32, and the loss with arithmetic in bfloat16."""
    graph, params = nnx.split(gpt.GPT(config, nnx.Rngs(0)))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        logits = nnx.merge(graph, low)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return nnx.to_pure_dict(params), loss


def batches(count: int, size: int, length: int) -> jax.Array:
    """Bytes of Python's help texts: (count, size, length + 1) int32."""
    from pydoc_data.topics import topics

    text = np.frombuffer(" ".join(map(str, topics.values())).encode("ascii", "ignore"), np.uint8)
    starts = np.random.default_rng(0).integers(0, len(text) - length - 1, (count, size, 1))
    return jnp.asarray(text[starts + np.arange(length + 1)].astype(np.int32))


def transformation(setting: Setting, params: Any, loss: Any) -> Any:
    """AdamW, with the rule after it where there is one."""
    if setting.groups == 0:
        return optax.with_extra_args_support(optax.adamw(1e-4))
    labels = hd.label_by_depth(params, setting.groups) if setting.groups > 1 else "all"
    rule = hd.hidlr(loss, labels, update_interval=setting.interval, **setting.arguments)
    return optax.chain(optax.adamw(1.0), rule)


class Program(NamedTuple):
    """A compiled training step, and the state that it begins with."""

    step: Any
    state: Any


def program(setting: Setting, params: Any, loss: Any, batch: Any) -> Program:
    """Compiles the step of a setting."""
    tx = transformation(setting, params, loss)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return Program(jitted.lower(params, state, batch).compile(), state)


def milliseconds(compiled: Program, params: Any, data: jax.Array, repeats: int) -> list[float]:
    """Of a step, the mean over whole cycles after the warm-up."""
    params, state = jax.tree.map(jnp.copy, (params, compiled.state))  # they are donated
    rows = [data[n] for n in range(len(data))]  # slicing is not part of a step
    found, value = [], jnp.zeros(())
    for cycle in range(repeats + 1):
        jax.block_until_ready((params, state))
        start = time.perf_counter()
        steps = WARM if cycle == 0 else CYCLE
        for n in range(steps):
            params, state, value = compiled.step(params, state, rows[n % len(rows)])
        jax.block_until_ready((params, state))
        found.append(1e3 * (time.perf_counter() - start) / steps)
        assert np.isfinite(value)
    return found[1:]


def compiled(settings: list[Setting], *args: Any) -> dict[int, Program]:
    """The programs by the place of their setting, compiled side by side."""
    first, *others = range(len(settings))
    found = {first: program(settings[first], *args)}  # alone: the kernels it chooses are cached
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = {n: pool.submit(program, settings[n], *args) for n in others}
        return found | {n: job.result() for n, job in jobs.items()}


def rows_of(settings: list[Setting], config: gpt.Config, size: int, repeats: int, save: Any) -> Any:
    """One row per setting; `save` is called with all of them after each."""
    params, loss = language_model(config)
    data = batches(16, size, config.positions)
    programs = compiled(settings, params, loss, data[0])
    base = programs[0]
    rows: list[dict[str, Any]] = []
    before = milliseconds(base, params, data, repeats)
    for n, setting in enumerate(settings):
        own = milliseconds(programs[n], params, data, repeats)
        after = milliseconds(base, params, data, repeats)
        usual = statistics.median([*before, *after])
        before = after
        analysis = programs[n].step.memory_analysis()
        rows.append(
            {
                "name": setting.name,
                "groups": setting.groups,
                "interval": setting.interval,
                "milliseconds": statistics.median(own),
                "relative_speed": usual / statistics.median(own),
                "lowest": usual / max(own),
                "highest": usual / min(own),
                "temporaries_mib": analysis.temp_size_in_bytes / 2**20,
                "arguments_mib": analysis.argument_size_in_bytes / 2**20,
            }
        )
        save(rows)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["rule", "K", "Φ", "ms a step", "relative speed", "temporaries, MiB", "state, MiB"]
    lines = [
        [
            row["name"],
            row["groups"] or "",
            row["interval"] if 0 < row["interval"] < _LATER else "",
            f"{row['milliseconds']:.2f}",
            f"{row['relative_speed']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})",
            f"{row['temporaries_mib']:.0f}",
            f"{row['arguments_mib']:.0f}",
        ]
        for row in rows
    ]
    return markdown(head, lines)


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="one small layer, K = 1")
    args = parser.parse_args()
    config = gpt.Config(256, 512, 768, 12, 12)
    settings, size, repeats = [BASE, *HOLD, *OTHERS], args.batch_size, args.repeats
    if args.quick:
        config, size, repeats = gpt.Config(256, 32, 64, 1, 2), 4, 1
        settings = settings[:2]
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def save(rows: list[dict[str, Any]]) -> None:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))

    rows = rows_of(settings, config, size, repeats, save)
    print(machine, table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
