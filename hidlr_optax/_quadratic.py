"""The quadratic model of the loss in the learning rates, and the influence that it gives.

q(η) = −bᵀη + ½ ηᵀAη models L(w + Σ_k η_k u_k) − L(w): paper eq. 2.3, or with the diagonal of A
alone, eq. 3.1. Arrays only: no pytrees of parameters and no losses live here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
            coupling = coupling * units[:, None] * units[None]
        return Quadratic(self.slope * units, self.curvature * units**2, coupling)

    def slope_at(self, rates: jax.Array) -> jax.Array:
        """Slope at the end of a step with `rates` η: b − Aη, (K,), loss per unit learning rate."""
        coupled = 0.0 if self.coupling is None else self.coupling @ rates
        return self.slope - self.curvature * rates - coupled


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
    (1 − t)C + t·1, with the smallest t that repairs it. The parabola of each single group stays as
    it was measured.

    Args:
      quadratic: in any units: J does not depend on them.
    """
    usable = quadratic.curvature > 0
    scale = jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, quadratic.curvature, 1)), 0)
    slope = quadratic.slope * scale
    if quadratic.coupling is None:
        return slope**2 / 2
    correlation = quadratic.coupling * scale[:, None] * scale[None]
    correlation += jnp.eye(len(scale), dtype=scale.dtype)
    values, vectors = jnp.linalg.eigh(correlation)
    least = jnp.minimum(values[0], _LEAST_EIGENVALUE)
    towards_none = (_LEAST_EIGENVALUE - least) / (1 - least)
    values = (1 - towards_none) * values + towards_none
    inverse = (vectors / values[None]) @ vectors.T
    return (inverse @ slope) ** 2 / jnp.diagonal(inverse) / 2
