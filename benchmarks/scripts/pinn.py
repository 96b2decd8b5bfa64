"""A physics-informed network for the heat equation, whose solution is known; plain JAX.

u_t = u_xx / 16 on [0, 1]², u = 0 at both sides, and u = sin πx + ½ sin 3πx at the start. Points are
drawn again for every step.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.problems.small import apply, mlp_init
from benchmarks.scripts.script import Loop, Script

DIFFUSIVITY = 1 / 16
WAVES = {1: 1.0, 3: 0.5}


def net(params: Any, t: Any, x: Any) -> jax.Array:
    """The value at one point."""
    hidden = jnp.stack([t, x])
    *inner, last = (params[name] for name in sorted(params))
    for layer in inner:
        hidden = jnp.tanh(apply(layer, hidden))
    return apply(last, hidden)[0]


def exact(t: Any, x: Any) -> Any:
    """Every sine decays by itself."""
    decay = {k: jnp.exp(-DIFFUSIVITY * (k * jnp.pi) ** 2 * t) for k in WAVES}
    return sum(size * decay[k] * jnp.sin(k * jnp.pi * x) for k, size in WAVES.items())


def residual(params: Any, t: Any, x: Any) -> jax.Array:
    """What the equation leaves over at one point."""
    u_xx = jax.grad(jax.grad(net, 2), 2)(params, t, x)
    return jax.grad(net, 1)(params, t, x) - DIFFUSIVITY * u_xx


def loss_fn(params: Any, points: Any) -> jax.Array:
    """Equation, start and sides at (n, 2) points of time and place."""
    t, x = points.T
    u = jax.vmap(net, (None, 0, 0))
    inside = jax.vmap(residual, (None, 0, 0))(params, t, x)
    start = u(params, jnp.zeros_like(t), x) - exact(0.0, x)
    sides = u(params, t, jnp.zeros_like(x)), u(params, t, jnp.ones_like(x))
    return jnp.mean(inside**2) + jnp.mean(start**2) + sum(jnp.mean(side**2) for side in sides)


def usual(learning_rate: Any) -> Loop:
    """As most of them are written."""
    tx = optax.adam(learning_rate)

    def start(seed: int) -> Any:
        params = mlp_init((2, 48, 48, 48, 1), jax.random.key(seed))
        return params, tx.init(params)

    @jax.jit
    def train_step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, loss

    return Loop(start, train_step)


def with_hidlr(labels: Any, schedule: Any) -> Loop:
    """The same with `hidlr`."""
    tx = optax.chain(optax.adam(1.0), hd.hidlr(None, labels, schedule=schedule))

    def start(seed: int) -> Any:
        params = mlp_init((2, 48, 48, 48, 1), jax.random.key(seed))
        return params, tx.init(params)

    @jax.jit
    def train_step(params: Any, state: Any, batch: Any) -> Any:
        return hd.take_step(tx, loss_fn, params, state, batch)

    return Loop(start, train_step)


def batches(seed: int) -> Iterator[Any]:
    """256 points."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.uniform(size=(256, 2)).astype(np.float32)


def evaluate(params: Any, state: Any) -> float:
    """Error in percent of the solution, both as root mean squares over a grid."""
    del state
    axis = jnp.linspace(0, 1, 65)
    t, x = map(jnp.ravel, jnp.meshgrid(axis, axis))
    truth = exact(t, x)
    error = jax.jit(jax.vmap(net, (None, 0, 0)))(params, t, x) - truth
    return 100 * float(jnp.linalg.norm(error) / jnp.linalg.norm(truth))


SCRIPT = Script(
    optimizer="Adam 1e-3",
    rate=1e-3,
    updates=2000,
    metric="error of the solution, %",
    usual=usual,
    with_hidlr=with_hidlr,
    batches=batches,
    evaluate=evaluate,
)
