"""Functions to minimise, and what the contracts of both families of rules are checked with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Target(NamedTuple):
    """A function to minimise, where to start, where the minimum is, and the groups."""

    loss: Callable[[Any], jax.Array]
    initial: Any
    final: Any
    labels: Any


def squared_distance(final):
    def loss(params):
        def distance(param, at):
            return jnp.sum((param - at.astype(param.dtype)) ** 2)

        return sum(jax.tree.leaves(jax.tree.map(distance, params, final)))

    return loss


def parabola(dtype=jnp.float32):
    final = jnp.array([1.0, -1.0, 1.0], dtype)
    return Target(squared_distance(final), jnp.array([-1.0, 10.0, 1.0], dtype), final, "all")


def rosenbrock(dtype=jnp.float32):
    def loss(params):
        return (1 - params["x"]) ** 2 + 100 * (params["y"] - params["x"] ** 2) ** 2

    initial, final = ({"x": jnp.array(at, dtype), "y": jnp.array(at, dtype)} for at in (0.0, 1.0))
    return Target(loss, initial, final, {"x": "x", "y": "y"})


def rosenbrock_in_one_group(dtype=jnp.float32):
    return rosenbrock(dtype)._replace(labels="all")


def matrix(dtype=jnp.float32):
    final = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return Target(squared_distance(final), jnp.zeros((2, 2), dtype), final, "all")


def mixed(dtype=jnp.float32):
    final = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))
    initial = jax.tree.map(jnp.zeros_like, final)
    return Target(squared_distance(final), initial, final, ("vector", "matrix"))


def train_step(tx, loss, **extra):
    """A step on a loss without data, with all the information that `update` can be given."""

    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, state, params, value_fn=loss, value=value, grad=grad, **extra
        )
        return optax.apply_updates(params, updates), state

    return step


def leaf_types(tree):
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


def assert_all_equal(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)
