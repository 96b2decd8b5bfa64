"""What keeps a run from harm: where rates begin, what is too small, what is too large.

Arrays only. Everything is measured against the loss itself, so no scale has to be known.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax._quadratic import Quadratic

_START_PART = 1e-2  # of the loss: what the first step, by its slope alone, is to change it by
_START_RANGE = 10.0  # how far from there an initial rate that was asked for may lie
_LEAST_PART = 1e-6  # of the loss: a step that changes it by less is lost in float32


def first_rates(rates: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """The rates to begin with, (K,), whatever was asked for.

    At one rate for all, the first step changes the loss by Σ|b_k| η to first order. The rate at
    which that is a hundredth of the loss is small, but not lost in rounding: rates of zero become
    it, others are brought within a factor ten of it.

    Args:
      rates: (K,), as asked for; zero where nothing was.
      value: the loss.
      slope: b, (K,).
    """
    steep = jnp.sum(jnp.abs(slope)).astype(jnp.float32)
    found = _START_PART * jnp.abs(value).astype(jnp.float32) / steep
    usable = jnp.isfinite(found) & (found > 0)
    nearest = jnp.clip(rates, found / _START_RANGE, found * _START_RANGE)
    begun = jnp.where(usable, jnp.where(rates > 0, nearest, found), rates)
    return jnp.where(begun > 0, begun, 1e-3)


def afloat(found: jax.Array, rates: jax.Array, quadratic: Quadratic, value: jax.Array) -> jax.Array:
    """The rates found, (K,); not less than those before where these do nothing already.

    A step that is to change the loss by less than a millionth of it, Σ |b_k| η_k + ½ |a_k| η_k², is
    lost in float32. Smaller ones would teach nothing, and all rates together could sink for good.

    Args:
      found: (K,), by the solver.
      rates: η, (K,), before.
      quadratic: in learning rates of one.
      value: (), the loss.
    """
    slope, curvature, _ = quadratic
    effect = jnp.sum(jnp.abs(slope) * rates + jnp.abs(curvature) * rates**2 / 2)
    sunk = effect < _LEAST_PART * jnp.abs(value).astype(jnp.float32)
    return jnp.where(sunk, jnp.maximum(found, rates), found)


def cut(rates: jax.Array, change: jax.Array, value: jax.Array, slope: Any, limit: float) -> Any:
    """What the guard multiplies the rates by, (): one, unless the step raises the loss too much.

    Then the minimum B/2C of the parabola −Bx + Cx² that has this slope, and at x = 1 this change,
    within [0.1, 0.5]. Along a step that ascends there is none: a half; where the loss is not finite
    any more, a tenth.

    Args:
      rates: η, (K,).
      change: (), the loss after the step minus the loss.
      value: (), the loss.
      slope: b, (K,), along the step; None where it is not known.
      limit: the rise, as a part of the loss, that is let pass.
    """
    descent = jnp.float32(0) if slope is None else slope.astype(jnp.float32) @ rates
    curve = change + descent
    best = descent / (2 * jnp.where(curve > 0, curve, 1))
    best = jnp.where((descent > 0) & (curve > 0), jnp.clip(best, 0.1, 0.5), 0.5)
    best = jnp.where(change <= limit * jnp.abs(value), 1.0, best)
    return jnp.where(jnp.isfinite(change), best, 0.1)
