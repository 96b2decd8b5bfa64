"""What every estimator returns, and how it evaluates many points."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hidlr_optax._quadratic import Quadratic

# How many units in the last place of the loss a change has to be before it is more than rounding.
# A sum over a batch, differently fused for the value and for the probes, is off by a few.
RESOLUTION = 16.0


class Measurement(NamedTuple):
    """What one estimate saw.

    Attributes:
      quadratic: slope and curvature in learning rates of one.
      resolved: (K,) bool, where the change of the loss stands above its rounding.
      floor: (K,), the smallest curvature that could have been told from none: what moves the loss
        by its rounding at the current rate.
      offsets: ξ, (n, K), the learning rates at which the loss was probed.
      changes: (n,), loss at the offsets minus loss at the parameters.
    """

    quadratic: Quadratic
    resolved: jax.Array
    floor: jax.Array
    offsets: jax.Array
    changes: jax.Array


def evaluate(fn: Callable[[jax.Array], Any], offsets: jax.Array, batch_size: int | None) -> Any:
    """`fn` of each row of `offsets`, stacked: all at once, or `batch_size` at a time."""
    if batch_size is None:
        return jax.vmap(fn)(offsets)
    return jax.lax.map(fn, offsets, batch_size=batch_size)


def check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, or None for all, got {batch_size}")
