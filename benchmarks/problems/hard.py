"""What kills a run: small problems as people report them, and the optimizer that is usual.

Others are elsewhere: a physics-informed network and batch norm with dropout among the public
scripts, a Gaussian process among the problems with units.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.kit.loop import Problem, descend
from benchmarks.problems import small
from benchmarks.problems.small import apply, first_key


class Report(NamedTuple):
    """A problem, and what is usual there.

    Attributes:
      problem: judged by its training loss on all the data.
      optimizer: the name and rate of the usual one.
      rate: that is usual.
      runs: the rows of the table: seeds, or initial rates of `hidlr` where `of_rates`.
      of_rates: whether they are.
    """

    problem: Problem
    optimizer: str
    rate: float
    runs: tuple[Any, ...] = (0, 1, 2)
    of_rates: bool = False


def small_batch_lora() -> Report:
    """Rank 4, B = 0, four examples a step: the noise is as large as the signal."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    w1, w2 = normal(16, 64) / 4, normal(64, 5) / 8
    change = normal(16, 2) @ normal(2, 64) / 6
    x = normal(1024, 16)
    y = jnp.argmax(jax.nn.gelu(x @ (w1 + change)) @ w2 + 0.3 * normal(1024, 5), 1)
    x, y = x[:768], y[:768]

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = jax.nn.gelu(batch[0] @ (w1 + 2 * params["A"] @ params["B"])) @ w2
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = Problem(
        init=lambda key: {"A": jax.random.normal(key, (16, 4)) / 4, "B": jnp.zeros((4, 64))},
        loss=loss,
        steps=300,
        splits={"train": (x, y)},
        batch_size=4,
        groupings={"": first_key},
        direction=optax.adamw,
    )
    return Report(problem, "AdamW 1e-2", 1e-2, runs=tuple(range(8)))


def rosenbrock() -> Report:
    """Full gradients from the origin; the initial rate should hardly matter."""

    def loss(params: Any, batch: Any = None) -> jax.Array:
        del batch
        return (1 - params["x"]) ** 2 + 100 * (params["y"] - params["x"] ** 2) ** 2

    problem = Problem(
        init=lambda _: {"x": jnp.zeros(()), "y": jnp.zeros(())},
        loss=loss,
        steps=3000,
        groupings={"": first_key},
        direction=optax.sgd,
    )
    return Report(
        problem, "SGD 1e-3", 1e-3, runs=(None, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), of_rates=True
    )


def language_model() -> Report:
    """The transformer of `small.text`, for twice as long."""
    text = small.text()
    labels = {"": text.groupings["roles"]}
    problem = text._replace(steps=600, groupings=labels, direction=optax.adamw)
    return Report(problem, "AdamW 3e-3", 3e-3)


def plateau() -> Report:
    """A deep tanh network that starts small: flat for 60 steps, and then sharply curved."""
    digits = small.PROBLEMS["digits"]()
    depth, shrunk = 6, 0.4

    def model(params: Any, x: jax.Array) -> jax.Array:
        for n in range(depth - 1):
            x = jnp.tanh(apply(params[f"layer{n}"], x))
        return apply(params[f"layer{depth - 1}"], x)

    def init(key: jax.Array) -> Any:
        params = small.mlp_init((64, *(48,) * (depth - 1), 10), key)
        return jax.tree.map(lambda w: shrunk * w, params)

    loss = functools.partial(small.cross_entropy, model)
    momentum = functools.partial(optax.sgd, momentum=0.9)
    problem = digits._replace(init=init, loss=loss, groupings={"": first_key}, direction=momentum)
    return Report(problem, "momentum 1e-1", 1e-1)


def turned_digits() -> Report:
    """LoRA in both layers of a trained MLP, whose images are then turned by 90 degrees."""
    digits = small.PROBLEMS["digits"]()
    hidden = "layer0", "layer1"

    def model(params: Any, x: jax.Array) -> jax.Array:
        for name in hidden:
            x = jax.nn.relu(apply(params[name], x))
        return apply(params["layer2"], x)

    upright = functools.partial(small.cross_entropy, model)
    start = small.mlp_init((64, 128, 64, 10), jax.random.key(0))
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 300))
    keys = jax.random.split(jax.random.key(1), 300)
    task = digits._replace(loss=upright)
    trained = jax.jit(lambda: descend(task, tx, (start, tx.init(start)), keys)[0][0])()
    images, labels = digits.splits["train"]
    images = jnp.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

    def adapted(params: Any) -> Any:
        layers = {
            n: trained[n] | {"kernel": trained[n]["kernel"] + params["A"][n] @ params["B"][n]}
            for n in hidden
        }
        return layers | {"layer2": params["head"]}

    def init(key: jax.Array) -> Any:
        keys = dict(zip(hidden, jax.random.split(key), strict=True))
        sizes = {n: trained[n]["kernel"].shape for n in hidden}
        scale = jax.nn.initializers.he_uniform()
        return {
            "A": {n: scale(keys[n], (sizes[n][0], 8)) for n in hidden},
            "B": {n: jnp.zeros((8, sizes[n][1])) for n in hidden},
            "head": trained["layer2"],
        }

    def loss(params: Any, batch: Any) -> jax.Array:
        return upright(adapted(params), batch)

    problem = Problem(
        init=init,
        loss=loss,
        steps=300,
        splits={"train": (images, labels)},
        batch_size=64,
        groupings={"": first_key},
        direction=optax.adamw,
    )
    return Report(problem, "AdamW 3e-2", 3e-2)


CASES: dict[str, Callable[[], Report]] = {
    "turned digits": turned_digits,
    "LoRA": small_batch_lora,
    "Rosenbrock": rosenbrock,
    "language model": language_model,
    "plateau": plateau,
}
