"""A GPT of six layers trained from nothing on Python's help texts for thousands of steps.

AdamW at four rates with warm-up and cosine, and `hidlr` with a cosine schedule, with one rate and
with one per layer. The texts are short, so all runs memorise them: the training loss counts here.

    python -m benchmarks.rule.gpt_from_scratch --out gpt.jsonl              # minutes a run on a GPU
    python -m benchmarks.rule.gpt_from_scratch --quick --out gpt.jsonl      # small, on any machine
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import Problem, descend
from benchmarks.kit.store import Job, Row, Store, arguments
from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.problems import data
from benchmarks.problems.models import gpt

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WARM_UP = 100  # steps of the fixed rates
CHUNKS = 20  # of a run, each one program
FIELDS = ("method", "steps")


class Size(NamedTuple):
    """Of a run."""

    config: gpt.Config
    batch_size: int
    steps: int


FULL = Size(gpt.Config(256, 256, 384, 6, 12), 32, 3000)
QUICK = Size(gpt.Config(256, 32, 64, 2, 2), 4, 100)


def rules(size: Size) -> dict[str, Callable[[Any], Any]]:
    """Method -> parameters -> what follows AdamW."""
    decay = optax.cosine_decay_schedule(1.0, size.steps)

    def fixed(rate: float) -> Any:
        def schedule(step: Any) -> Any:
            return decay(step) * jnp.minimum(1.0, (step + 1) / WARM_UP)

        return optax.chain(optax.scale_by_schedule(schedule), optax.scale(rate))

    def by_layer(params: Any) -> Any:
        return hd.hidlr(None, hd.label_by_depth(params, size.config.layers), schedule=decay)

    return {f"AdamW, {rate:g}": lambda _, rate=rate: fixed(rate) for rate in RATES} | {
        "hidlr, one rate": lambda _: hd.hiulr(None, schedule=decay),
        "hidlr, one per layer": by_layer,
    }


def trained(size: Size, rule: Callable[[Any], Any], seed: int) -> Row:
    """The mean loss of the last twentieth of the steps, that of held-out text, and the rate."""
    text, length = data.help_text().astype(np.int32), size.config.positions
    train, test = map(jnp.asarray, np.split(text, [int(len(text) * 0.9)]))
    params, loss = gpt.as_functions(size.config, seed)

    def rows(text: jax.Array, starts: Any) -> jax.Array:
        return text[starts[:, None] + jnp.arange(length + 1)]

    def sample(key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (size.batch_size,), 0, len(train) - length)
        return rows(train, starts)

    problem = Problem(lambda _: params, loss, size.steps, sample=sample)
    tx = optax.chain(optax.adamw(1.0), rule(params))
    chunk = jax.jit(functools.partial(descend, problem, tx), donate_argnums=0)
    carry, losses = (params, tx.init(params)), jnp.zeros(())
    for keys in jax.random.split(jax.random.key(100 + seed), (CHUNKS, size.steps // CHUNKS)):
        carry, losses = chunk(carry, keys)
    params, state = carry
    starts = np.linspace(0, len(test) - length - 1, 4 * size.batch_size, dtype=np.int32)
    held_out = [jax.jit(loss)(params, rows(test, part)) for part in np.split(starts, 4)]
    rates = optax.tree.get(state, "group_learning_rates", {})
    return {
        "train": float(losses.mean()),
        "test": float(np.mean(held_out)),
        "rates": {name: float(rate) for name, rate in rates.items()},
    }


def jobs(size: Size) -> Iterator[Job]:
    """One for each method."""
    for name, rule in rules(size).items():
        key = {"method": name, "steps": size.steps}
        yield Job(key, lambda seed, rule=rule: [trained(size, rule, seed)])


def main() -> None:
    """Parses the arguments."""
    args = arguments(__doc__, "gpt.jsonl", quick="a small model, few steps")
    size = QUICK if args.quick else FULL
    store = Store(args.out, FIELDS)
    if not args.report:
        store.run(jobs(size), range(args.seeds))
    found = [row for row in store.rows() if row["steps"] == size.steps]
    lines = []
    for name in rules(size):
        own = [row for row in found if row["method"] == name]
        if own:
            losses = [mean_sd([row[split] for row in own], 3) for split in ("train", "test")]
            lines.append([name, len(own), *losses])
    print(markdown(["method", "seeds", "train loss", "test loss"], lines))


if __name__ == "__main__":
    main()
