"""The quadratic model of the loss in the learning rates: fit and average.

q(η) = −bᵀη + ½ ηᵀAη models L(w + Σ_k η_k u_k) − L(w): paper eq. 2.3, or with the diagonal of A
alone, eq. 3.1. Arrays only: no pytrees of parameters and no losses live here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._diagnostics import Kept

__all__ = [
    "Kept",
    "Quadratic",
    "average",
    "fit_axes",
    "fit_joint",
    "influence",
    "influence_per_parameter",
    "marginal",
]

_LEAST_EIGENVALUE = 1e-3  # of the correlations: what is below it, no measurement could vouch for


class Quadratic(NamedTuple):
    """The coefficients of q(η) = −bᵀη + ½ ηᵀAη.

    Attributes:
      slope: b, (K,), loss per unit learning rate; **positive where the group's step descends, the
        opposite of the slope's sign in Optax's line searches**.
      curvature: a, (K,), the diagonal of A, loss per unit learning rate squared.
      coupling: A without its diagonal, (K, K), where it is known; None where it is not.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> quadratic = hd.Quadratic(slope=jnp.array([2.0, 1.0]), curvature=jnp.array([4.0, 1.0]))
      >>> quadratic.slope_at(jnp.array([0.5, 0.5])).tolist()  # no slope at a group's minimum, b/a
      [0.0, 0.5]
    """

    slope: jax.Array
    curvature: jax.Array
    coupling: jax.Array | None = None

    def scaled(self, units: jax.Array) -> "Quadratic":
        """The same in rates that count `units` e, (K,): b_k e_k and A_kl e_k e_l."""
        coupling = self.coupling
        if coupling is not None:
            coupling = coupling * units[:, None] * units
        return Quadratic(self.slope * units, self.curvature * units**2, coupling)

    def slope_at(self, rates: jax.Array) -> jax.Array:
        """Slope at the end of a step with `rates` η: b − Aη, (K,), loss per unit learning rate."""
        coupled = 0.0 if self.coupling is None else self.coupling @ rates
        return self.slope - self.curvature * rates - coupled


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


def influence(quadratic: Quadratic) -> jax.Array:
    """Influence b_k²/a_k, loss: twice what the group's own optimal step is worth, where a_k > 0.

    Args:
      quadratic: in any units: b²/a does not depend on them.
    """
    return quadratic.slope * (quadratic.slope / quadratic.curvature)


def influence_per_parameter(quadratic: Quadratic, sizes: jax.Array) -> jax.Array:
    """Influence per parameter, PPI_k = b_k²/(a_k d_k), loss per parameter (paper eq. 5.1).

    Args:
      quadratic: in any units.
      sizes: d, (K,), the number of parameters of each group.
    """
    return influence(quadratic) / sizes


def marginal(quadratic: Quadratic) -> jax.Array:
    """Marginal influence: the loss that the best joint step wins by group k, (K,); 0 if a_k ≤ 0.

    The joint step over all groups with a_k > 0 is worth J = ½ bᵀA⁻¹b. Without row and column k it
    is worth J_k, and by the block inverse J − J_k = ½ x_k²/(A⁻¹)_kk, x = A⁻¹b: one system in place
    of K + 1. Without coupling, this is ½ b_k²/a_k. Shares of coupled groups do not add up to J.

    A measured A need not be positive definite, and then has no best step. Where an eigenvalue of
    its correlations C_kl = A_kl/√(a_k a_l) is less than 0.001, they are drawn towards none,
    (1 − t)C + t·1, with the smallest t that mends it. The parabola of each single group stays as it
    was measured.

    Args:
      quadratic: in any units: J does not depend on them.
    """
    usable = quadratic.curvature > 0
    scale = jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, quadratic.curvature, 1)), 0)
    slope = quadratic.slope * scale
    if quadratic.coupling is None:
        return slope**2 / 2
    correlation = quadratic.coupling * scale[:, None] * scale
    correlation += jnp.eye(len(scale), dtype=scale.dtype)
    values, vectors = jnp.linalg.eigh(correlation)
    least = jnp.minimum(values[0], _LEAST_EIGENVALUE)
    towards_none = (_LEAST_EIGENVALUE - least) / (1 - least)
    values = (1 - towards_none) * values + towards_none
    inverse = (vectors / values) @ vectors.T
    return (inverse @ slope) ** 2 / jnp.diagonal(inverse) / 2
