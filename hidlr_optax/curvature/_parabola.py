"""The estimator that evaluates the joint step alone: one forward pass, whatever the loss is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax._groups import wide
from hidlr_optax._quadratic import Quadratic
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.curvature._measurement import RESOLUTION, Measurement


@dataclasses.dataclass(frozen=True)
class Parabola:
    """The estimator made by `parabola`."""

    couples = False
    separates = False

    def estimate(
        self,
        step_loss: StepLoss,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        value: jax.Array | None = None,
        **unused: Any,
    ) -> Measurement:
        """ηᵀAη = 2(L(w + Σ η_k u_k) − L(w) + bᵀη), divided among the groups as bᵀη is.

        Args:
          step_loss: ℓ, the loss along the K group steps.
          rates: η, (K,), of the step.
          slope: b, (K,), where known from the gradient. Otherwise bᵀη is measured by a step to the
            other side, and divided evenly.
          value: ℓ(0), where known; evaluated otherwise.
          **unused: what other estimators ask for.

        Returns:
          The measurement.
        """
        del unused
        if value is None:
            value = step_loss.start()
        offsets = rates[None] if slope is not None else jnp.stack([rates, -rates])
        losses = jnp.stack([step_loss(offset) for offset in offsets])
        dtype = wide(losses.dtype)
        changes = (losses.astype(dtype) - value.astype(dtype)).astype(jnp.float32)
        if slope is None:
            slope = jnp.full(len(rates), (changes[1] - changes[0]) / 2 / len(rates)) / rates
        parts = slope.astype(jnp.float32) * rates
        whole = 2 * (changes[0] + jnp.sum(parts))
        sizes = jnp.abs(parts)
        shares = sizes / jnp.where(jnp.any(sizes > 0), jnp.sum(sizes), 1)
        largest = jnp.maximum(jnp.max(jnp.abs(losses)), jnp.abs(value)).astype(jnp.float32)
        rounding = RESOLUTION * float(jnp.finfo(losses.dtype).eps) * largest
        moved = jnp.maximum(jnp.max(jnp.abs(changes)), jnp.abs(jnp.sum(parts)))
        return Measurement(
            quadratic=Quadratic(parts / rates, shares * whole / rates**2),
            resolved=jnp.broadcast_to(moved > rounding, rates.shape),
            least_curvature=shares * rounding / rates**2,
            offsets=offsets,
            changes=changes,
        )


def parabola() -> Parabola:
    """The curvature of the joint step, from one forward pass at its end: any loss, any K.

    With the slopes known, the loss after the step gives ηᵀAη = 2(L(w + Σ η_k u_k) − L(w) + bᵀη),
    exactly where the loss is quadratic. The groups are not told apart: each has the part of it that
    it has of the slope, so that b_k/a_k is the present rate times one factor, and the rates keep
    their proportions. For losses that cannot be differentiated, and where no gradient more is to be
    spent on the split of the groups.

    Returns:
      An estimator, for `hidlr(..., curvature=...)`.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.parabola()
      Parabola()
    """
    return Parabola()
