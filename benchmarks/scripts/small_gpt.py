"""A GPT on the characters of Python's help texts, in nnx: nanoGPT's settings for a small machine.

Clipping, four mini-batches an update, warm-up and cosine; batches, parameters and the optimizer's
state are spread over all devices.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hidlr_optax as hd
import hidlr_optax.flax as hdf
from benchmarks.problems.models.gpt import GPT, Config
from benchmarks.scripts.script import Loop, Script

MINI_STEPS, WINDOW = 4, 64


@functools.cache
def text() -> tuple[np.ndarray, int]:
    """The help texts as places in their alphabet, and its size."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    alphabet, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    return codes.astype(np.int32), len(alphabet)


@functools.cache
def mesh() -> Mesh:
    """All devices in a row."""
    return Mesh(np.array(jax.devices()), ("data",))


def spread(node: Any) -> None:
    """Cuts every array along its first axis where that is possible."""

    def place(x: jax.Array) -> NamedSharding:
        divides = x.ndim > 0 and len(x) % mesh().size == 0
        return NamedSharding(mesh(), PartitionSpec("data") if divides else PartitionSpec())

    state = nnx.state(node)
    nnx.update(node, jax.device_put(state, jax.tree.map(place, state)))


def build(seed: int) -> GPT:
    """Two blocks, 64 wide."""
    config = Config(vocabulary=text()[1], positions=WINDOW, width=64, layers=2, heads=4)
    return GPT(config, nnx.Rngs(seed))


def loss_fn(model: GPT, batch: Any) -> jax.Array:
    """Cross-entropy of the next character."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def usual(learning_rate: Any) -> Loop:
    """As nanoGPT has it."""
    adamw = optax.adamw(learning_rate, b2=0.99, weight_decay=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    tx = optax.MultiSteps(tx, MINI_STEPS).gradient_transformation()

    def start(seed: int) -> Any:
        model = build(seed)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        spread((model, optimizer))
        return model, optimizer

    @nnx.jit
    def train_step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    return Loop(start, train_step)


def with_hidlr(labels: Any, schedule: Any) -> Loop:
    """The same with `hidlr`."""
    adamw = optax.adamw(1.0, b2=0.99, weight_decay=0.1)
    rates = hd.hidlr(None, labels, schedule=schedule)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw, rates)
    tx = hd.multi_steps(tx, MINI_STEPS)

    def start(seed: int) -> Any:
        model = build(seed)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        spread((model, optimizer))
        return model, optimizer

    @nnx.jit
    def train_step(model: Any, optimizer: Any, batch: Any) -> Any:
        return hdf.take_step(model, optimizer, loss_fn, batch)

    return Loop(start, train_step)


def windows(rng: np.random.Generator, codes: np.ndarray, size: int) -> np.ndarray:
    """Pieces of the text, and of each the character that follows."""
    begins = rng.integers(0, len(codes) - WINDOW, size)
    return codes[begins[:, None] + np.arange(WINDOW + 1)]


def batches(seed: int) -> Iterator[Any]:
    """Eight pieces of the first nine tenths."""
    rng, codes = np.random.default_rng(seed), text()[0]
    place = NamedSharding(mesh(), PartitionSpec("data"))
    while True:
        yield jax.device_put(windows(rng, codes[: len(codes) * 9 // 10], 8), place)


_loss = nnx.jit(loss_fn)


def evaluate(model: GPT, *others: Any) -> float:
    """Loss on pieces of the last tenth."""
    del others
    codes = text()[0]
    return float(
        _loss(model, windows(np.random.default_rng(0), codes[len(codes) * 9 // 10 :], 256))
    )


def published(rate: float, updates: int) -> optax.Schedule:
    """A twentieth of the updates up, and a tenth of the rate at the end."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, updates // 20, updates, 0.1 * rate)


SCRIPT = Script(
    optimizer="AdamW 1e-3",
    rate=1e-3,
    updates=200,
    metric="test loss",
    usual=usual,
    with_hidlr=with_hidlr,
    batches=batches,
    evaluate=evaluate,
    digits=3,
    accumulated=MINI_STEPS,
    schedule=published,
)
