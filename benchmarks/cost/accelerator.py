"""What `hidlr` costs on an accelerator: a transformer of twelve layers, AdamW.

Python's help texts byte by byte, parameters in float32, activations in bfloat16 or float32. Every
setting is timed over whole cycles of its refreshes, after the warm-up, and compared with steps of
AdamW before and after it in the same process. "One program" asks at every step whether a refresh
is due; of "two programs", the loop knows, and steps between refreshes have no branch.

    python -m benchmarks.cost.accelerator --out accelerator.json
    python -m benchmarks.cost.accelerator --quick --out accelerator.json     # small, on any machine
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hidlr_optax as hd
from benchmarks.kit.costs import Program, bare, behind_adamw, milliseconds, program
from benchmarks.kit.loop import Problem
from benchmarks.kit.tables import markdown
from benchmarks.problems import data
from benchmarks.problems.models import gpt

CYCLE = 40  # steps that are timed: at Φ = 10 four refreshes


class Setting(NamedTuple):
    """A line of the table.

    Attributes:
      name: of the rule.
      groups: K; 0 for AdamW alone.
      interval: Φ.
      programs: 2 for a step of its own between refreshes.
      rule: (loss, labels, update_interval=) -> transformation.
    """

    name: str
    groups: int
    interval: int
    programs: int
    rule: Callable[..., Any] = hd.hidlr


BASE = Setting("AdamW", 0, 0, 1)
HIDLR = [
    Setting("hidlr", *sizes)
    for sizes in ((1, 10, 1), (1, 10, 2), (12, 10, 1), (12, 10, 2), (12, 4, 2), (12, 1, 1))
]
OTHERS = [
    Setting(
        f"first version, probes {how}",
        3,
        10,
        1,
        functools.partial(hd.paper.one_step, curvature=hd.paper.probes(batch_size=size)),
    )
    for how, size in (("at once", None), ("one at a time", 1))
]


def language_model(config: gpt.Config, size: int, dtype: Any) -> Problem:
    """Parameters and the loss in float32, activations in `dtype`."""
    params, loss = gpt.as_functions(config, dtype=dtype)
    tokens = jnp.asarray(data.help_bytes(16, size, config.positions))
    return Problem(lambda _: params, loss, CYCLE, {"train": tokens})


def compiled(setting: Setting, problem: Problem) -> tuple[Program, Program | None]:
    """AdamW's step with the rule after it where there is one, and the step between refreshes.

    One after the other: XLA times kernels to choose among them, and programs that are compiled
    beside each other come out up to a half slower.
    """
    if setting.groups == 0:
        return program(bare(), problem), None
    params = problem.init(jax.random.key(0))
    labels = hd.label_by_depth(params, setting.groups) if setting.groups > 1 else "all"
    rule = setting.rule(problem.loss, labels, update_interval=setting.interval)
    tx = behind_adamw(rule)
    between = program(tx, problem, refresh=False) if setting.programs == 2 else None
    return program(tx, problem), between


def rows_of(settings: list[Setting], problem: Problem, repeats: int, save: Any) -> Any:
    """One row per setting; `save` is called with all of them after each."""
    base, _ = compiled(BASE, problem)
    rows: list[dict[str, Any]] = []
    for setting in (BASE, *settings):
        own, between = (base, None) if setting == BASE else compiled(setting, problem)
        before = milliseconds(base, problem, repeats, CYCLE)
        times = milliseconds(own, problem, repeats, CYCLE, between, setting.interval)
        usual = statistics.median([*before, *milliseconds(base, problem, repeats, CYCLE)])
        rows.append(
            {
                "name": setting.name,
                "groups": setting.groups,
                "interval": setting.interval,
                "programs": setting.programs,
                "milliseconds": statistics.median(times),
                "relative_speed": usual / statistics.median(times),
                "lowest": usual / max(times),
                "highest": usual / min(times),
                "temporaries_mib": own.temporaries,
                "arguments_mib": own.step.memory_analysis().argument_size_in_bytes / 2**20,
                "compilation": own.seconds / base.seconds,
            }
        )
        save(rows)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["rule", "K", "Φ", "programs", "ms a step", "relative speed", "temporaries, MiB"]
    head += ["state, MiB", "compilation"]
    lines = [
        [
            row["name"],
            row["groups"] or "",
            row["interval"] or "",
            row["programs"],
            f"{row['milliseconds']:.2f}",
            f"{row['relative_speed']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})",
            f"{row['temporaries_mib']:.0f}",
            f"{row['arguments_mib']:.0f}",
            f"{row['compilation']:.1f}",
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
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", type=int, nargs="*", help="of the table, these alone; 1 is first")
    parser.add_argument("--quick", action="store_true", help="one small layer, K = 1")
    args = parser.parse_args()
    config = gpt.Config(256, 512, 768, 12, 12)
    settings, size, repeats = [*HIDLR, *OTHERS], args.batch_size, args.repeats
    if args.quick:
        config, size, repeats = gpt.Config(256, 32, 64, 1, 2), 4, 1
        settings = settings[:2]
    if args.rows:
        settings = [settings[row - 1] for row in args.rows]
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": args.dtype}

    def save(rows: list[dict[str, Any]]) -> None:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))

    rows = rows_of(settings, language_model(config, size, jnp.dtype(args.dtype)), repeats, save)
    print(machine, table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
