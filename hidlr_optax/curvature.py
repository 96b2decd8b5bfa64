"""Estimators: from losses along the group steps to the quadratic in the learning rates.

An estimator is a frozen, hashable value with a method `estimate(loss, params, direction, groups,
rates, ...) -> Measurement`. It knows nothing of solvers, averages or training loops.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hidlr_optax._groups import Groups, wide
from hidlr_optax._quadratic import Quadratic, fit_axes, fit_joint

# How many units in the last place of the loss a change has to be before it is more than rounding.
# A sum over a batch, differently fused for the value and for the probes, is off by a few.
_RESOLUTION = 16.0


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


def _evaluate(fn: Callable[[jax.Array], Any], offsets: jax.Array, batch_size: int | None) -> Any:
    """`fn` of each row of `offsets`, stacked: all at once, or `batch_size` at a time."""
    if batch_size is None:
        return jax.vmap(fn)(offsets)
    return jax.lax.map(fn, offsets, batch_size=batch_size)


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
        losses: jax.Array = _evaluate(
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
    _check_batch_size(batch_size)
    return Probes(design, per_group, batch_size, seed)


def _products(
    product: Callable[[jax.Array], Any], num_groups: int, batch_size: int | None
) -> jax.Array:
    """A linear map of each of the K unit rates, stacked along the first axis."""
    axes = jnp.eye(num_groups, dtype=jnp.float32)
    return _evaluate(product, axes, batch_size)


def _measurement(slope: jax.Array, matrix: jax.Array) -> Measurement:
    """From derivatives, where nothing is lost in the rounding of a difference of losses."""
    num_groups = len(slope)
    matrix = ((matrix + matrix.T) / 2).astype(jnp.float32)
    diagonal = jnp.diagonal(matrix)
    return Measurement(
        quadratic=Quadratic(slope.astype(jnp.float32), diagonal, matrix - jnp.diag(diagonal)),
        resolved=jnp.ones(num_groups, bool),
        floor=jnp.zeros(num_groups, jnp.float32),
        offsets=jnp.zeros((0, num_groups), jnp.float32),
        changes=jnp.zeros(0, jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class Hessian:
    """The estimator made by `hessian`.

    Attributes:
      batch_size: Hessian-vector products at a time, or None for all.
    """

    batch_size: int | None
    couples: ClassVar[bool] = True

    def estimate(
        self,
        loss: Callable[[Any], jax.Array],
        params: Any,
        direction: Any,
        groups: Groups,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        **unused: Any,
    ) -> Measurement:
        """The Hessian of x ↦ L(w + Σ x_k u_k) at zero, K tangents of its gradient."""
        del unused
        gradient, product = jax.linearize(
            jax.grad(lambda offset: loss(groups.step(params, direction, offset))),
            jnp.zeros_like(rates),
        )
        matrix = _products(product, len(groups), self.batch_size)
        return _measurement(-gradient if slope is None else slope, matrix)


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """The estimator made by `gauss_newton`.

    Attributes:
      model_fn: (params, batch) -> outputs.
      output_loss: (outputs, batch) -> scalar.
      batch_size: forward-mode products at a time, or None for all.
    """

    model_fn: Callable[[Any, Any], Any]
    output_loss: Callable[[Any, Any], jax.Array]
    batch_size: int | None
    couples: ClassVar[bool] = True

    def estimate(
        self,
        loss: Callable[[Any], jax.Array],
        params: Any,
        direction: Any,
        groups: Groups,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        batch: Any = None,
        **unused: Any,
    ) -> Measurement:
        """The Hessian of x ↦ output_loss(o + Jx), outputs linear in the rates."""
        del loss, unused
        outputs, product = jax.linearize(
            lambda offset: self.model_fn(groups.step(params, direction, offset), batch),
            jnp.zeros_like(rates),
        )
        tangents = _products(product, len(groups), self.batch_size)

        def linearised(offset: jax.Array) -> jax.Array:
            def moved(output: jax.Array, tangent: jax.Array) -> jax.Array:
                return output + jnp.tensordot(offset.astype(tangent.dtype), tangent, axes=1)

            return self.output_loss(jax.tree.map(moved, outputs, tangents), batch)

        origin = jnp.zeros_like(rates)
        gradient = jax.grad(linearised)(origin) if slope is None else -slope
        return _measurement(-gradient, jax.hessian(linearised)(origin))

    def check(self, loss_fn: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> None:
        """Compares `output_loss(model_fn(params, batch), batch)` with the loss, by value.

        Raises:
          ValueError: they differ by more than one part in ten thousand.
        """
        expected = float(loss_fn(params, batch))
        found = float(self.output_loss(self.model_fn(params, batch), batch))
        if not abs(found - expected) <= 1e-4 * abs(expected):
            raise ValueError(
                f"output_loss(model_fn(params, batch), batch) is {found}, but the loss is "
                f"{expected}: the curvature would be that of another function"
            )


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, or None for all, got {batch_size}")


def hessian(batch_size: int | None = None) -> Hessian:
    """The exact K×K curvature along the group steps, by K Hessian-vector products.

    A_kl = u_kᵀ H u_l, from `jax.linearize` of the gradient and K tangents; the slope comes with it.
    The loss has to be twice differentiable, and the memory is that of its backward pass.

    Args:
      batch_size: how many products run at a time; None: all.

    Returns:
      An estimator, for `hidlr(..., curvature=..., solver=coupled())`. `diagonal` uses a_k alone.

    Raises:
      ValueError: `batch_size` < 1.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.hessian(batch_size=4)
      Hessian(batch_size=4)
    """
    _check_batch_size(batch_size)
    return Hessian(batch_size)


def gauss_newton(
    model_fn: Callable[[Any, Any], Any],
    output_loss: Callable[[Any, Any], jax.Array],
    batch_size: int | None = None,
) -> GaussNewton:
    """The K×K Gauss–Newton curvature along the group steps, forward mode alone.

    A = Jᵀ H_out J, with J the K forward-mode products of the model's outputs along the group steps
    and H_out the Hessian of the loss in the outputs. Positive semi-definite where the loss is
    convex in the outputs, as cross-entropy and squared error are.

    Args:
      model_fn: (params, batch) -> outputs, a pytree of arrays.
      output_loss: (outputs, batch) -> scalar, so that `output_loss(model_fn(params, batch), batch)`
        is the loss; `.check(loss_fn, params, batch)` on the estimator compares them. `update` has
        to be given `batch`, also beside `value_fn`.
      batch_size: how many products run at a time; None: all. They hold K copies of the outputs.

    Returns:
      An estimator, for `hidlr(..., curvature=..., solver=coupled())`. `diagonal` uses a_k alone.

    Raises:
      ValueError: `batch_size` < 1, or an argument is not callable.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> estimator = hd.gauss_newton(lambda p, x: x @ p, lambda out, x: jnp.mean(out**2))
      >>> estimator.check(lambda p, x: jnp.mean((x @ p) ** 2), jnp.ones(3), jnp.ones((2, 3)))
    """
    for name, fn in (("model_fn", model_fn), ("output_loss", output_loss)):
        if not callable(fn):
            raise ValueError(f"{name} must be callable, got {fn!r}")
    _check_batch_size(batch_size)
    return GaussNewton(model_fn, output_loss, batch_size)


Estimator = Probes | Hessian | GaussNewton
