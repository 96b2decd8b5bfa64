"""The guard: no step promises too much, and a step that has done harm is taken back.

Harm is what one batch says: the loss at the end of the last step lies far above that at its start.
A rise of the running loss is none, since objectives move.
"""

import jax
import jax.numpy as jnp

from hidlr_optax._rule.measure import TINY
from hidlr_optax._rule.rate import FALL

JUMP = 0.3  # of the loss: a rise by more is harm, and calls for a look at once
ALARM = 4.0  # times the usual distance from the running loss, of one that calls for a look
USUAL = 10.0  # times what steps promise on average, that a step may promise
RECOVER = 2 ** (1 / 70)  # a halved factor is whole again after 70 updates


def harms(won: jax.Array, size: jax.Array) -> jax.Array:
    """Whether the last step has raised the loss of a batch that it has not seen by 30 %."""
    return won < -JUMP * size


def jumped(value: jax.Array, usual: jax.Array, spread: jax.Array) -> jax.Array:
    """Whether the loss calls for a look at once. One that finds no harm changes nothing.

    Args:
      value: the loss.
      usual: the running loss.
      spread: how far losses lie from it on average.
    """
    return value - usual > jnp.maximum(JUMP * jnp.abs(usual), ALARM * spread)


def recovered(factor: jax.Array, harmed: jax.Array) -> jax.Array:
    """The factor of the guard for the next update, at most 1."""
    return jnp.minimum(factor * jnp.where(harmed, FALL, RECOVER), 1)


def cap(promise: jax.Array, promised: jax.Array, size: jax.Array) -> jax.Array:
    """The part of the coming step to take, by what it promises to win by its slope: ().

    It may promise the loss, or ten times what steps promise on average if that is more: Polyak's
    step as an upper bound. Where a plateau ends, gradients grow from step to step.
    """
    most = jnp.maximum(size, USUAL * promised)
    caps = (promise > most) & (most > 0)  # a loss of zero says nothing
    return jnp.where(caps, most / jnp.maximum(promise, TINY), 1.0)
