"""A GPT of six layers trained from nothing on Python's help texts for thousands of steps.

AdamW at four rates with warm-up and cosine, and `hidlr` by cosine with one rate and one per layer.
The texts are short, so all runs learn them by heart: it is the training loss that counts here.

    python -m benchmarks.rule.gpt_from_scratch --out gpt.jsonl              # minutes a run on a GPU
    python -m benchmarks.rule.gpt_from_scratch --quick --out gpt.jsonl      # small, on any machine
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import hidlr_optax as hd
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


def rules(size: Size) -> dict[str, Callable[[Any, Any], Any]]:
    """Method -> (loss, parameters) -> what follows AdamW."""
    decay = optax.cosine_decay_schedule(1.0, size.steps)

    def fixed(rate: float) -> Any:
        def schedule(step: Any) -> Any:
            return decay(step) * jnp.minimum(1.0, (step + 1) / WARM_UP)

        return optax.chain(optax.scale_by_schedule(schedule), optax.scale(rate))

    layers = size.config.layers
    return {f"AdamW, {rate:g}": lambda *_, rate=rate: fixed(rate) for rate in RATES} | {
        "hidlr, one rate": lambda loss, _: hd.hiulr(loss, schedule=decay),
        "hidlr, one per layer": lambda loss, params: hd.hidlr(
            loss, hd.label_by_depth(params, layers), schedule=decay
        ),
    }


def trained(size: Size, rule: Callable[[Any, Any], Any], seed: int) -> Row:
    """The mean loss of the last twentieth of the steps, that of held-out text, and the rate."""
    text, length = data.help_text().astype(np.int32), size.config.positions
    train, test = map(jnp.asarray, np.split(text, [int(len(text) * 0.9)]))
    graph, state = nnx.split(gpt.GPT(size.config, nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)

    def rows(text: jax.Array, starts: Any) -> jax.Array:
        return text[starts[:, None] + jnp.arange(length + 1)]

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tx = optax.chain(optax.adamw(1.0), rule(loss, params))

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        starts = jax.random.randint(key, (size.batch_size,), 0, len(train) - length)
        params, state, value = hd.take_step(tx, loss, params, state, rows(train, starts))
        return (params, state), value

    chunk = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys), donate_argnums=0)
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
