"""The estimator that only evaluates the loss: probes group by group, or the paper's joint draws."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hidlr_optax._groups import wide
from hidlr_optax._quadratic import Quadratic
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.paper._fit import fit_axes, fit_joint
from hidlr_optax.paper._measurement import (
    RESOLUTION,
    Measurement,
    check_batch_size,
    check_sharding,
    evaluate,
)

Design = Literal["axis", "gaussian"]
Scale = Literal["resolved", "rate", "root"]

_EVEN_PART = 2e-3  # of the loss: what a pair of probes at ±h is to change it by, 2·½ a h²
_LINEAR_PART = 1e-2  # of the loss, by the slope, where the curvature is not known yet
_SHORTEST, _LONGEST = 10.0, 30.0  # how much nearer or further than the current rate
_UNKNOWN_SCALE = 1e6  # the same, by the slope


@dataclasses.dataclass(frozen=True)
class Probes:
    """The estimator made by `probes`, whose arguments it keeps."""

    design: Design
    scale: Scale
    per_group: int
    batch_size: int | None
    seed: int
    sharding: NamedSharding | None = None

    couples = False  # joint draws meet the coupling, but do not fit it

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
        """(n, K): where to probe, in units of the probe scale."""
        if self.design == "axis":
            return jnp.asarray(
                np.kron(np.eye(num_groups), self._axis_points()[:, None]), jnp.float32
            )
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return jax.random.normal(key, (self.forward_passes(num_groups), num_groups), jnp.float32)

    def probe_scale(
        self,
        rates: jax.Array,
        slope: jax.Array | None,
        value: jax.Array,
        expected: Quadratic | None,
    ) -> jax.Array:
        """The unit of the offsets, (K,): |η|, √|η|, or where the loss changes by a small part.

        The even part of the loss at ±h is a h²: h = √(0.002 |L|/a) by the curvature found so far.
        Before one is found, h = 0.01 |L|/|b| by the slope, or else the current rate.
        """
        rates = jnp.abs(rates)  # offsets lie to either side
        if self.scale == "root":
            return jnp.sqrt(rates)
        if self.scale == "rate" or expected is None:
            return rates
        size = jnp.abs(value).astype(jnp.float32)
        by_slope = rates
        if slope is not None:
            steep = jnp.abs(slope).astype(jnp.float32)
            linear = _LINEAR_PART * size / jnp.where(steep > 0, steep, 1)
            linear = jnp.clip(linear, rates / _UNKNOWN_SCALE, rates * _UNKNOWN_SCALE)
            by_slope = jnp.where(steep > 0, linear, rates)
        curved = expected.curvature > 0
        even = jnp.sqrt(_EVEN_PART * size / jnp.where(curved, expected.curvature, 1))
        even = jnp.clip(even, rates / _SHORTEST, rates * _LONGEST)
        return jnp.where(size > 0, jnp.where(curved, even, by_slope), rates)

    def estimate(
        self,
        step_loss: StepLoss,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        value: jax.Array | None = None,
        expected: Quadratic | None = None,
        batch: Any = None,
        step: jax.Array | int = 0,
    ) -> Measurement:
        """Probes the loss group by group, or jointly, and fits slope and curvature."""
        del batch
        if value is None:
            value = step_loss.start()
        scale = self.probe_scale(rates, slope, value, expected)
        points = self.points(len(rates), step)
        offsets = points * scale[None]
        losses = evaluate(step_loss, offsets, self.batch_size, self.sharding)
        eps = jnp.finfo(losses.dtype).eps
        losses = losses.astype(wide(losses.dtype))
        changes = losses - value.astype(losses.dtype)
        scaled = self._fit(points, changes, slope, scale)
        rounding = RESOLUTION * float(eps) * self._largest(losses, value, len(rates))
        return Measurement(
            quadratic=scaled.scaled(1 / scale),
            resolved=self._largest(changes, jnp.zeros(()), len(rates)) > rounding,
            least_curvature=rounding / scale**2,
            offsets=offsets,
            changes=changes.astype(jnp.float32),
        )

    def _fit(
        self, points: jax.Array, changes: jax.Array, slope: jax.Array | None, scale: jax.Array
    ) -> Quadratic:
        """The quadratic in units of the probe scale."""
        dtype = changes.dtype
        slope = None if slope is None else slope.astype(dtype) * scale.astype(dtype)
        if self.design == "gaussian":
            fitted = fit_joint(points.astype(dtype), changes, slope)
        else:
            axis = jnp.asarray(self._axis_points(), dtype)
            fitted = fit_axes(axis, changes.reshape(-1, self.per_group), slope)
        return jax.tree.map(lambda coefficient: coefficient.astype(jnp.float32), fitted)

    def _largest(self, at_probes: jax.Array, value: jax.Array, num_groups: int) -> jax.Array:
        """The largest magnitude that each group's fit had to do with: (K,)."""
        sizes = jnp.abs(at_probes).astype(jnp.float32)
        largest = jnp.max(sizes.reshape(num_groups, -1), axis=1)  # axis probes lie in this order
        if self.design == "gaussian":
            largest = jnp.full(num_groups, jnp.max(largest))
        return jnp.maximum(largest, jnp.abs(value).astype(jnp.float32))


def probes(
    design: Design = "axis",
    per_group: int = 2,
    batch_size: int | None = None,
    seed: int = 0,
    sharding: NamedSharding | None = None,
    scale: Scale | None = None,
) -> Probes:
    """Slope and curvature from `per_group`·K evaluations of the loss, no differentiation.

    The paper writes its draws as ξ_j ~ N(0, diag(η)). That is a covariance, so by the letter their
    standard deviation is √η_k: `scale="root"`. The code of GeN, on which the paper builds, has
    draws of standard deviation η_k: `scale="rate"`. At rates below one, √η lies further out. And
    only η has the unit of a learning rate: √η changes its meaning with the unit of the parameters.

    Args:
      design: where to evaluate. "axis": one group at a time, at 1, −1, 2, −2, … times the scale;
        the fit of one group knows nothing of the others. "gaussian": all groups jointly, at
        standard normal draws times the scale, as in the paper's Algorithm 1. There, the coupling
        between groups is noise in the fit.
      per_group: evaluations per group: 2 or more to fit slope and curvature, 1 suffices where the
        slope is known from the gradient. The pair ±1 is free of the cubic error. 4 in the paper.
      batch_size: how many evaluations run at a time. None: all are vmapped, the fastest on an
        accelerator, at a peak memory of `per_group`·K copies of the parameters. n: n copies.
      seed: of the gaussian draws, which also depend on the step.
      sharding: how the evaluations are spread over a mesh, `NamedSharding(mesh, P("x"))`: each
        device along the axis "x" does its share. Worth it for an axis along which parameters and
        batch are replicated; an axis that shards the batch shares out the work by itself. Then
        `batch_size` must be None.
      scale: the unit of the offsets. "resolved": where the loss changes by a few parts in a
        thousand, so that float32 resolves the change. "rate": η_k, the current rate. "root": √η_k.
        None: "resolved" for "axis", "rate" for "gaussian".

    Returns:
      An estimator, for `one_step(..., curvature=...)`.

    Raises:
      ValueError: an unknown design or scale, a number below one, or a sharding of anything but
        rows.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.paper.probes(per_group=2).forward_passes(num_groups=3)
      6
    """
    if design not in ("axis", "gaussian"):
        raise ValueError(f"design must be 'axis' or 'gaussian', got {design!r}")
    if scale not in ("resolved", "rate", "root", None):
        raise ValueError(f"scale must be 'resolved', 'rate', 'root' or None, got {scale!r}")
    if per_group < 1:
        raise ValueError(f"per_group must be 1 or more, got {per_group}")
    check_batch_size(batch_size)
    if sharding is not None:
        check_sharding(sharding)
        if batch_size is not None:
            raise ValueError(f"sharding evaluates all at once, got batch_size={batch_size} too")
    if scale is None:
        scale = "resolved" if design == "axis" else "rate"
    return Probes(design, scale, per_group, batch_size, seed, sharding)
