"""The quadratic model of the loss in the learning rates: fit, average, minimise.

q(η) = −bᵀη + ½ Σ_k a_k η_k² models L(w + Σ_k η_k u_k) − L(w): paper eq. 3.1, the diagonal form of
eq. 2.3. Arrays only: no pytrees of parameters and no losses live here.
"""

import dataclasses
import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quadratic(NamedTuple):
    """The coefficients of q(η) = −bᵀη + ½ Σ_k a_k η_k².

    Attributes:
      slope: b, (K,), loss per unit learning rate; positive where the group's step descends.
      curvature: a, (K,), loss per unit learning rate squared.
    """

    slope: jax.Array
    curvature: jax.Array

    def scaled(self, units: jax.Array) -> "Quadratic":
        """The same quadratic in rates measured in `units`, (K,): b_k·units_k and a_k·units_k²."""
        return Quadratic(self.slope * units, self.curvature * units**2)


class Kept(enum.IntEnum):
    """Why a refresh left a group's learning rate as it was.

    NO (0): it did not, the rate is new. NON_FINITE (1): a loss, gradient or update was NaN or
    infinite. UNRESOLVED (2): the group's probes change the loss by less than its floating-point
    type resolves. NOT_CONVEX (3): the curvature is negative or zero, so the quadratic has no
    minimum. NO_SLOPE (4): the group's gradient or update is zero, and nothing asks for a rate.
    OTHER_GROUP (5): another group's fit failed, and all rates are kept or none.
    """

    NO = 0
    NON_FINITE = 1
    UNRESOLVED = 2
    NOT_CONVEX = 3
    NO_SLOPE = 4
    OTHER_GROUP = 5


def fit_joint(points: jax.Array, changes: jax.Array, slope: jax.Array | None = None) -> Quadratic:
    """Least squares, without intercept, on joint points: Algorithm 1 of the paper.

    Solves min Σ_j (−bᵀx_j + ½ Σ_k a_k x_jk² − f_j)² for 2K unknowns, or for the K curvatures alone
    where the slope is known. To stay well conditioned in float32, points have to be of order one:
    pass rates over their current values (ξ/η) and rescale the result.

    Args:
      points: (n, K).
      changes: f, (n,), the change of the loss at each point.
      slope: (K,), where known.

    Returns:
      The quadratic in the units of `points`.
    """
    squares = points**2 / 2
    if slope is not None:
        curvature = jnp.linalg.lstsq(squares, changes + points @ slope)[0]
        return Quadratic(slope, curvature)
    solution = jnp.linalg.lstsq(jnp.concatenate([-points, squares], axis=1), changes)[0]
    return Quadratic(*jnp.split(solution, 2))


def fit_axes(points: jax.Array, changes: jax.Array, slope: jax.Array | None = None) -> Quadratic:
    """Least squares, without intercept, for each group by itself, in closed form.

    The 2×2 normal equations of min Σ_i (−b x_i + ½ a x_i² − f_i)².

    Args:
      points: x, (m,), the places at which every group was probed, of order one.
      changes: f, (K, m), the change of the loss when only group k moves.
      slope: (K,), where known.

    Returns:
      The quadratic in the units of `points`.
    """
    second, third, fourth = jnp.sum(points**2), jnp.sum(points**3), jnp.sum(points**4)
    even = changes @ points**2
    if slope is not None:
        return Quadratic(slope, 2 * (even + slope * third) / fourth)
    odd = -(changes @ points)
    determinant = second * fourth - third**2
    return Quadratic(
        slope=(odd * fourth + even * third) / determinant,
        curvature=2 * (even * second + odd * third) / determinant,
    )


def average(mean: jax.Array, new: jax.Array, decay: float, measurements: jax.Array) -> jax.Array:
    """An exponential moving average with bias correction, kept in corrected form.

    With weight (1 − β)/(1 − βⁿ) on the n-th value, the mean equals the usual average divided by
    1 − βⁿ, so that it can be read at any time; β = 0 keeps the newest value alone.

    Args:
      mean: the average of the n − 1 values before; its value does not matter at n = 1.
      new: the n-th value.
      decay: β.
      measurements: n, of the shape of `new`.
    """
    beta = jnp.asarray(decay, new.dtype)
    weight = (1 - beta) / (1 - beta ** measurements.astype(new.dtype))
    return jnp.where(measurements == 1, new, mean + weight * (new - mean))


def vertices(quadratic: Quadratic, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minimum b_k/a_k of each group's own parabola, and for which groups there is none.

    Args:
      quadratic: slope and curvature.
      kept: (K,) of `Kept`, the groups already known not to be trusted.

    Returns:
      (K,) rates, finite and not zero where (K,) `Kept` is NO; meaningless elsewhere.
    """
    slope, curvature = quadratic
    kept = jnp.where((kept == Kept.NO) & (slope == 0), Kept.NO_SLOPE, kept)
    kept = jnp.where((kept == Kept.NO) & ~(curvature > 0), Kept.NOT_CONVEX, kept)
    best = slope / jnp.where(kept == Kept.NO, curvature, 1)
    # A quotient that overflows or underflows is no rate.
    usable = jnp.isfinite(best) & (best != 0)
    return best, jnp.where((kept == Kept.NO) & ~usable, Kept.NON_FINITE, kept)


def minimise_diagonal(
    quadratic: Quadratic, rates: jax.Array, kept: jax.Array, max_change: float | None
) -> tuple[jax.Array, jax.Array]:
    """η_k = b_k/a_k, group by group, where the quadratic can be trusted; the old rate elsewhere.

    Args:
      quadratic: in rates of one.
      rates: η, (K,), the current rates.
      kept: (K,) int32 of `Kept`, the groups already known not to be trusted.
      max_change: the largest factor between old and new rate, and each group stands for itself.
        None: no bound, and one group that cannot be trusted keeps all rates, as in Algorithm 1.

    Returns:
      The new rates and, for each group, why its rate was kept.
    """
    best, kept = vertices(quadratic, kept)
    if max_change is None:
        kept = jnp.where((kept == Kept.NO) & jnp.any(kept != Kept.NO), Kept.OTHER_GROUP, kept)
    else:
        best = jnp.clip(best, rates / max_change, rates * max_change)
    return jnp.where(kept == Kept.NO, best, rates), kept.astype(jnp.int32)


def influence(quadratic: Quadratic, sizes: jax.Array) -> jax.Array:
    """PPI_k = b_k²/(a_k d_k), loss per parameter (paper eq. 5.1). Meaningful where a_k > 0.

    Twice what the group's own optimal step is worth, over its number of parameters.

    Args:
      quadratic: in any units: b²/a does not depend on them.
      sizes: d, (K,), the number of parameters of each group.
    """
    slope, curvature = quadratic
    return slope * (slope / curvature) / sizes


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The solver made by `diagonal`.

    Attributes:
      averaging: decay of the averages of slope and curvature.
      max_change: the largest factor between old and new rate, or None.
    """

    averaging: float
    max_change: float | None

    def solve(
        self, quadratic: Quadratic, rates: jax.Array, kept: jax.Array, floor: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The new rates and, for each group, a `Kept`: why its rate is the old one.

        Where the slope is known but the curvature is lost in the rounding of the loss, the parabola
        is flat as far as can be seen, and a bounded change towards its minimum, which lies further
        out than seen, is safe. Without a bound it is not, and the fit is taken as it is.

        Args:
          quadratic: in learning rates of one.
          rates: η, (K,), the current rates.
          kept: (K,) of `Kept`, the groups already known not to be trusted.
          floor: (K,), the smallest curvature that could have been told from none.
        """
        if self.max_change is not None:
            flat = jnp.abs(quadratic.curvature) < floor
            seen = jnp.minimum(floor, jnp.abs(quadratic.slope) / rates)  # b/seen ≥ the rate
            quadratic = quadratic._replace(curvature=jnp.where(flat, seen, quadratic.curvature))
        return minimise_diagonal(quadratic, rates, kept, self.max_change)


def diagonal(averaging: float = 0.9, max_change: float | None = 2.0) -> Diagonal:
    """Each group's rate from its own parabola: η_k = b_k/a_k (paper eq. 3.2).

    Slope and curvature are averaged over refreshes before they are divided; averaging their
    quotients, the rates, is far noisier.

    Args:
      averaging: decay β of the moving averages, in [0, 1). 0: the newest refresh alone.
      max_change: the largest factor by which one refresh may change a rate, > 1. Groups without a
        positive curvature keep their rate, the others move. None: no bound, and all rates are kept
        unless every curvature is positive, as in the paper's Algorithm 1. Without a bound, a group
        whose step ascends (b_k < 0) is given the negative rate that the algorithm asks for.

    Returns:
      A solver, for `hidlr(..., solver=...)`.

    Raises:
      ValueError: an argument lies outside its range.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.diagonal(averaging=0.0, max_change=None)
      Diagonal(averaging=0.0, max_change=None)
    """
    if not 0 <= averaging < 1:
        raise ValueError(f"averaging must lie in [0, 1), got {averaging}; 0 is no averaging")
    if max_change is not None and not (1 < max_change < math.inf):
        raise ValueError(f"max_change must be finite and > 1, or None, got {max_change}")
    return Diagonal(averaging, max_change)
