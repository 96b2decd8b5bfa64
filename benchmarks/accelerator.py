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
from pathlib import Path
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import optax
from costs import Problem, Program, bare, behind_adamw, milliseconds, program
from flax import nnx
from models import gpt
from tables import markdown

import hidlr_optax as hd

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


def language_model(config: gpt.Config, size: int) -> Problem:
    """Parameters in float32, arithmetic in bfloat16, the loss in float32."""
    graph, params = nnx.split(gpt.GPT(config, nnx.Rngs(0)))

    def outputs(params: Any, tokens: jax.Array) -> jax.Array:
        low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return nnx.merge(graph, low)(tokens[:, :-1]).astype(jnp.float32)

    def output_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tokens = jnp.asarray(data.help_bytes(16, size, config.positions))
    return Problem(nnx.to_pure_dict(params), outputs, output_loss, tokens)


def compiled(setting: Setting, problem: Problem) -> Program:
    """AdamW's step, with the rule after it where there is one."""
    if setting.groups == 0:
        return program(bare(), problem)
    labels = hd.label_by_depth(problem.params, setting.groups) if setting.groups > 1 else "all"
    rule = hd.hidlr(problem.loss, labels, update_interval=setting.interval, **setting.arguments)
    return program(behind_adamw(rule), problem)


def side_by_side(settings: list[Setting], problem: Problem) -> dict[int, Program]:
    """The programs by the place of their setting."""
    first, *others = range(len(settings))
    found = {first: compiled(settings[first], problem)}  # alone: the kernels it chooses are cached
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = {n: pool.submit(compiled, settings[n], problem) for n in others}
        return found | {n: job.result() for n, job in jobs.items()}


def rows_of(settings: list[Setting], problem: Problem, repeats: int, save: Any) -> Any:
    """One row per setting; `save` is called with all of them after each."""
    programs = side_by_side(settings, problem)
    base = programs[0]
    rows: list[dict[str, Any]] = []
    before = milliseconds(base, problem, repeats, CYCLE)
    for n, setting in enumerate(settings):
        own = milliseconds(programs[n], problem, repeats, CYCLE)
        after = milliseconds(base, problem, repeats, CYCLE)
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
                "temporaries_mib": programs[n].temporaries,
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

    rows = rows_of(settings, language_model(config, size), repeats, save)
    print(machine, table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
