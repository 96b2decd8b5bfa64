"""Estimators: from losses along the group steps to the quadratic in the learning rates.

An estimator is a frozen, hashable value with a method `estimate(loss, params, direction, groups,
rates, ...) -> Measurement`. It knows nothing of solvers, averages or training loops.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hidlr_optax._derivatives import GaussNewton, Hessian, gauss_newton, hessian
from hidlr_optax._groups import Groups, wide
from hidlr_optax._measurement import Measurement, check_batch_size, evaluate
from hidlr_optax._quadratic import Quadratic, fit_axes, fit_joint

__all__ = [
    "Estimator",
    "GaussNewton",
    "Hessian",
    "Measurement",
    "Probes",
    "gauss_newton",
    "hessian",
    "probes",
]

# How many units in the last place of the loss a change has to be before it is more than rounding.
# A sum over a batch, differently fused for the value and for the probes, is off by a few.
_RESOLUTION = 16.0


@dataclasses.dataclass(frozen=True)
class Probes:
    """The estimator made by `probes`.

    Attributes:
      design: "axis" or "gaussian".
      per_group: probes per group.
      batch_size: probes evaluated at a time, or None for all.
      seed: of the gaussian draws.
    """

    design: Literal["axis", "gaussian"]
    per_group: int
    batch_size: int | None
    seed: int

    couples: ClassVar[bool] = False  # joint draws meet the coupling, but do not fit it

    @property
    def fits_slope(self) -> bool:
        """Whether there are probes enough for two unknowns per group."""
        return self.per_group >= 2

    def forward_passes(self, num_groups: int) -> int:
        """Loss evaluations per refresh, the loss at the parameters not counted."""
        return self.per_group * num_groups

    def _axis_points(self) -> np.ndarray:
        """1, −1, 2, −2, …: `per_group` of them."""
        steps = np.arange(2, self.per_group + 2)
        return (steps // 2 * np.where(steps % 2, -1.0, 1.0)).astype(np.float32)

    def points(self, num_groups: int, step: jax.Array | int) -> jax.Array:
        """(n, K): where to probe, in units of the current learning rates."""
        if self.design == "axis":
            return jnp.asarray(
                np.kron(np.eye(num_groups), self._axis_points()[:, None]), jnp.float32
            )
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return jax.random.normal(key, (self.forward_passes(num_groups), num_groups), jnp.float32)

    def estimate(
        self,
        loss: Callable[[Any], jax.Array],
        params: Any,
        direction: Any,
        groups: Groups,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        value: jax.Array | None = None,
        batch: Any = None,
        step: jax.Array | int = 0,
    ) -> Measurement:
        """Probes the loss at multiples of the current rates and fits slope and curvature.

        Args:
          loss: params -> scalar. Called with parameters in float32 or wider.
          params: w.
          direction: u, like params.
          groups: the K groups.
          rates: η, (K,), the scale of the offsets.
          slope: b, (K,), where known from the gradient; fitted otherwise.
          value: the loss at `params`, where known; evaluated with the probes otherwise.
          batch: not used, `loss` knows it.
          step: changes the gaussian draws from refresh to refresh.

        Returns:
          The measurement.
        """
        del batch
        points = self.points(len(groups), step)
        if value is None:
            points = jnp.concatenate([jnp.zeros_like(points[:1]), points])
        offsets = points * rates
        losses: jax.Array = evaluate(
            lambda offset: loss(groups.step(params, direction, offset)), offsets, self.batch_size
        )
        eps = jnp.finfo(losses.dtype).eps
        losses = losses.astype(wide(losses.dtype))
        if value is None:
            value, losses, points, offsets = losses[0], losses[1:], points[1:], offsets[1:]
        changes = losses - value.astype(losses.dtype)
        scaled = self._fit(points, changes, slope, rates)
        rounding = _RESOLUTION * float(eps) * self._largest(losses, value, len(groups))
        return Measurement(
            quadratic=scaled.scaled(1 / rates),
            resolved=self._largest(changes, jnp.zeros(()), len(groups)) > rounding,
            floor=rounding / rates**2,
            offsets=offsets,
            changes=changes.astype(jnp.float32),
        )

    def _fit(
        self, points: jax.Array, changes: jax.Array, slope: jax.Array | None, rates: jax.Array
    ) -> Quadratic:
        """The quadratic in units of the current rates."""
        dtype = changes.dtype
        known = None if slope is None else slope.astype(dtype) * rates.astype(dtype)
        if self.design == "gaussian":
            fitted = fit_joint(points.astype(dtype), changes, known)
        else:
            axis = jnp.asarray(self._axis_points(), dtype)
            fitted = fit_axes(axis, changes.reshape(-1, self.per_group), known)
        return jax.tree.map(lambda coefficient: coefficient.astype(jnp.float32), fitted)

    def _largest(self, at_probes: jax.Array, value: jax.Array, num_groups: int) -> jax.Array:
        """The largest magnitude that each group's fit had to do with: (K,)."""
        sizes = jnp.abs(at_probes).astype(jnp.float32)
        largest = jnp.max(sizes.reshape(num_groups, -1), axis=1)  # axis probes lie in this order
        if self.design == "gaussian":
            largest = jnp.full(num_groups, jnp.max(largest))
        return jnp.maximum(largest, jnp.abs(value).astype(jnp.float32))


def probes(
    design: Literal["axis", "gaussian"] = "axis",
    per_group: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
) -> Probes:
    """Slope and curvature from `per_group`·K evaluations of the loss, no differentiation.

    Args:
      design: where to evaluate. "axis": one group at a time, at 1, −1, 2, −2, … times its current
        rate; the fit of one group knows nothing of the others. "gaussian": all groups jointly, at
        draws from N(0, η_k²) per group, as in the paper's Algorithm 1. There, the coupling between
        groups is noise in the fit.
      per_group: evaluations per group: 2 or more to fit slope and curvature, 1 suffices where the
        slope is known from the gradient.
      batch_size: how many evaluations run at a time. None: all are vmapped, the fastest on an
        accelerator, at a peak memory of `per_group`·K copies of the parameters. n: n copies.
      seed: of the gaussian draws, which also depend on the step.

    Returns:
      An estimator, for `hidlr(..., curvature=...)`.

    Raises:
      ValueError: an unknown design, or a number below one.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.probes(per_group=2).forward_passes(num_groups=3)
      6
    """
    if design not in ("axis", "gaussian"):
        raise ValueError(f"design must be 'axis' or 'gaussian', got {design!r}")
    if per_group < 1:
        raise ValueError(f"per_group must be 1 or more, got {per_group}")
    check_batch_size(batch_size)
    return Probes(design, per_group, batch_size, seed)


Estimator = Probes | Hessian | GaussNewton
