"""Averaged parameters, for runs of unknown length: what to evaluate where no schedule anneals.

At a constant rate, the last parameters carry the noise of the last batches. Their average over the
later part of the run does not, at any time the run is stopped: it does for them what decaying the
rates would have done. Training is left as it is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Average", "accumulate", "start"]


class Average(NamedTuple):
    """A running average of parameters.

    Attributes:
      params: the average, like params, in float32 or wider. What to evaluate.
      count: () int32, how many it holds.
    """

    params: Any
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def _wide(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    is_narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if is_narrow else leaf


def start(params: Any) -> Average:
    """Starts an average, which holds nothing yet and until then is `params`.

    Args:
      params: a pytree of arrays; in nnx, `nnx.state(model, nnx.Param)`.

    Returns:
      An `Average`, for `accumulate`.

    Example:
      See `accumulate`.
    """
    # Buffers of their own, so that the parameters can be donated.
    copied = jax.tree.map(lambda leaf: jnp.array(_wide(leaf)), params)
    return Average(copied, jnp.zeros((), jnp.int32))


def accumulate(average: Average, params: Any, gamma: float = 8.0) -> Average:
    """Adds the parameters after a step; works inside jit. Call it at every step.

    Polynomial-decay averaging (Shamir & Zhang 2013, https://arxiv.org/abs/1212.1824): the t-th
    parameters come in with weight (γ + 1)/(t + γ), so that at any time about the last 1/γ of the
    run counts.

    Args:
      average: from `start`, or from the step before.
      params: after the step.
      gamma: γ ≥ 0; 0 is the plain mean.

    Returns:
      The new average.

    Raises:
      ValueError: `gamma` is negative.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> average = hd.averaging.start({"w": jnp.zeros(())})
      >>> for value in (1.0, 2.0, 3.0):
      ...     average = hd.averaging.accumulate(average, {"w": jnp.asarray(value)}, gamma=0.0)
      >>> print(average.params["w"])
      2.0
    """
    if gamma < 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    weight = (gamma + 1) / (average.count.astype(jnp.float32) + (1 + gamma))

    def moved(mean: jax.Array, new: Any) -> jax.Array:
        if not jnp.issubdtype(mean.dtype, jnp.inexact):
            return jnp.asarray(new)
        return mean + weight.astype(mean.dtype) * (jnp.asarray(new).astype(mean.dtype) - mean)

    return Average(jax.tree.map(moved, average.params, params), average.count + 1)
