"""Measurements, and the protocol of the estimators that make them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hidlr_optax._diagnostics import Kept
from hidlr_optax._quadratic import Quadratic
from hidlr_optax._step_loss import StepLoss

# How many units in the last place of the loss a change has to be before it is more than rounding.
# A sum over a batch, differently fused for the value and for the probes, is off by a few.
RESOLUTION = 16.0


class Measurement(NamedTuple):
    """Slope and curvature of one estimate, and how far they can be trusted.

    Attributes:
      quadratic: slope and curvature in learning rates of one.
      resolved: (K,) bool, where the change of the loss stands above its rounding.
      least_curvature: (K,), the smallest curvature that could have been told from none: what moves
        the loss by its rounding at the current rate.
      offsets: ξ, (n, K), the learning rates at which the loss was probed.
      changes: (n,), loss at the offsets minus loss at the parameters.
    """

    quadratic: Quadratic
    resolved: jax.Array
    least_curvature: jax.Array
    offsets: jax.Array
    changes: jax.Array

    @staticmethod
    def exact(quadratic: Quadratic) -> "Measurement":
        """A measurement by derivatives: no difference of losses is lost in rounding."""
        num_groups = len(quadratic.slope)
        return Measurement(
            quadratic=quadratic,
            resolved=jnp.ones(num_groups, bool),
            least_curvature=jnp.zeros(num_groups, jnp.float32),
            offsets=jnp.zeros((0, num_groups), jnp.float32),
            changes=jnp.zeros(0, jnp.float32),
        )

    def statuses(self) -> jax.Array:
        """(K,) of `Kept`: which groups' numbers can be used at all.

        One number that is not finite keeps every group: some probe left the region in which the
        quadratic means anything, and it may have been any of them.
        """
        slope, curvature, coupling = self.quadratic
        finite = jnp.isfinite(slope) & jnp.isfinite(curvature)
        if coupling is not None:
            finite &= jnp.all(jnp.isfinite(coupling), axis=1)
        kept = jnp.where(slope == 0, Kept.NO_SLOPE, Kept.UNRESOLVED)
        kept = jnp.where(self.resolved, Kept.UPDATED, kept)
        unusable = jnp.where(finite, Kept.OTHER_GROUP, Kept.NON_FINITE)
        return jnp.where(jnp.all(finite), kept, unusable)


@runtime_checkable
class Estimator(Protocol):
    """An estimator: measures the loss along the group steps. Yours can be one.

    A frozen, hashable value, such as a frozen dataclass, with what is listed here. It may have
    `fits_slope` as well, a bool: False where it cannot do without the slope; True if left out.
    """

    @property
    def couples(self) -> bool:
        """Whether the quadratic has the coupling A_kl between groups."""
        ...

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
        """Measures slope and curvature at the parameters, with array operations that JAX can trace.

        Args:
          step_loss: ℓ(η) = L(w + Σ_k η_k u_k); call it with (K,) rates, or differentiate it.
          rates: η, (K,), the current rates; negative where a solver without bounds made them so.
          slope: b, (K,), where known from the gradient; to be measured otherwise.
          value: ℓ(0), where known.
          expected: slope and curvature found so far, zero where there are none.
          batch: that of the loss.
          step: the number of updates so far.

        Returns:
          The measurement; `Measurement.exact` where all numbers can be trusted.
        """
        ...


def fits_slope(estimator: Estimator) -> bool:
    """Whether an estimator can measure slopes."""
    return getattr(estimator, "fits_slope", True)


def measure(
    estimator: Estimator, step_loss: StepLoss, rates: jax.Array, **known: Any
) -> Measurement:
    """The estimate, in float32; a ValueError where it has not the shapes that it has to have."""
    measured = estimator.estimate(step_loss, rates, **known)
    if not isinstance(measured, Measurement):
        raise ValueError(f"{estimator!r}.estimate must return a Measurement, got {measured!r}")
    count = len(step_loss)
    slope, curvature, coupling = measured.quadratic
    per_group = {
        "quadratic.slope": slope,
        "quadratic.curvature": curvature,
        "resolved": measured.resolved,
        "least_curvature": measured.least_curvature,
    }
    wanted: dict[str, Any] = {name: (array, (count,)) for name, array in per_group.items()}
    if estimator.couples:
        wanted["quadratic.coupling"] = coupling, (count, count)
    elif coupling is not None:
        raise ValueError(f"{estimator!r} measured the coupling, but its `couples` is False")
    for name, (array, shape) in wanted.items():
        found = None if array is None else jnp.shape(array)
        if found != shape:
            raise ValueError(
                f"{estimator!r}.estimate must return {name} of shape {shape} for {count} groups, "
                f"got {found}"
            )
    quadratic, least_curvature = jax.tree.map(
        lambda array: jnp.asarray(array, jnp.float32),
        (measured.quadratic, measured.least_curvature),
    )
    return measured._replace(quadratic=quadratic, least_curvature=least_curvature)


def evaluate(
    fn: Callable[[jax.Array], Any],
    offsets: jax.Array,
    batch_size: int | None,
    sharding: NamedSharding | None = None,
) -> Any:
    """`fn` of each row of `offsets`, stacked: all at once, some at a time, or spread on a mesh."""
    if sharding is not None:
        return _evaluate_sharded(fn, offsets, sharding)
    if batch_size is None:
        return jax.vmap(fn)(offsets)
    if batch_size == 1:  # no vmap of one: callbacks and some kernels have no batching rule
        return jax.lax.map(fn, offsets)
    return jax.lax.map(fn, offsets, batch_size=batch_size)


def _evaluate_sharded(
    fn: Callable[[jax.Array], Any], offsets: jax.Array, sharding: NamedSharding
) -> jax.Array:
    """Each device evaluates its share of the rows."""
    mesh, axes = sharding.mesh, sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    count = math.prod(mesh.shape[name] for name in names)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Where shardings are part of an array's type, a constraint to XLA is refused.
    is_typed = any(types[name] == AxisType.Explicit for name in names)
    place = jax.device_put if is_typed else jax.lax.with_sharding_constraint
    rows = len(offsets)
    # Whole shares: zeros are rates too, and their losses are dropped.
    offsets = jnp.pad(offsets, ((0, -rows % count), (0, 0)))
    losses = jax.vmap(fn, spmd_axis_name=axes)(place(offsets, sharding))
    return place(losses, NamedSharding(mesh, PartitionSpec()))[:rows]


def check_sharding(sharding: Any) -> None:
    """Raises a ValueError unless this spreads the rows of a matrix, and nothing else, on a mesh."""
    is_named = isinstance(sharding, NamedSharding)
    if not is_named or len(sharding.spec) != 1 or sharding.spec[0] is None:
        raise ValueError(
            f"sharding must be NamedSharding(mesh, PartitionSpec(axis)), the probes over one axis "
            f"of a mesh or several as a tuple; got {sharding!r}"
        )


def check_batch_size(batch_size: int | None) -> None:
    """Raises a ValueError unless this is a number of evaluations, or None for all."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, or None for all, got {batch_size}")
