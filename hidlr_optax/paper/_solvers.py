"""Solvers: from a quadratic to learning rates, group by group or all together in a box.

Arrays only. Averages and the guard are not theirs: see `one_step(ema_decay=..., max_rise=...)`.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hidlr_optax._diagnostics import Kept
from hidlr_optax._quadratic import Quadratic

_SPREAD = 0.01, 100.0  # how far from the uniform rate a group's own may lie


@runtime_checkable
class Solver(Protocol):
    """A solver: makes rates of a quadratic at every refresh. Yours can be one.

    A frozen, hashable value, such as a frozen dataclass, with the method that is listed here.
    """

    def solve(
        self, quadratic: Quadratic, rates: jax.Array, kept: jax.Array, least_curvature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The new rates and, for each group, a `Kept`: why its rate is the old one.

        Args:
          quadratic: averaged, in learning rates of one.
          rates: η, (K,), the current rates.
          kept: (K,) int32 of `Kept`, the groups already known not to be trusted.
          least_curvature: (K,), the smallest curvature that could have been told from none.

        Returns:
          (K,) float32 rates and (K,) int32 of `Kept`.
        """
        ...


def parabola_minima(quadratic: Quadratic, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minimum b_k/a_k of each group's own parabola, and for which groups there is none.

    Finite and not zero where `Kept` is UPDATED; meaningless elsewhere.
    """
    slope, curvature = quadratic.slope, quadratic.curvature
    kept = jnp.where((kept == Kept.UPDATED) & (slope == 0), Kept.NO_SLOPE, kept)
    kept = jnp.where((kept == Kept.UPDATED) & ~(curvature > 0), Kept.NOT_CONVEX, kept)
    best = slope / jnp.where(kept == Kept.UPDATED, curvature, 1)
    # A quotient that overflows or underflows is no rate.
    usable = jnp.isfinite(best) & (best != 0)
    return best, jnp.where((kept == Kept.UPDATED) & ~usable, Kept.NON_FINITE, kept)


def _positive(coupling: jax.Array, diagonal: jax.Array) -> jax.Array:
    """The nearest positive semi-definite A with this diagonal, (K,) > 0, in correlations.

    Eigenvalues of the correlation matrix are clipped at zero and its diagonal is set to one again.
    """
    scale = jnp.sqrt(diagonal)
    correlation = coupling / scale[:, None] / scale[None] + jnp.eye(
        len(diagonal), dtype=diagonal.dtype
    )
    values, vectors = jnp.linalg.eigh(correlation)
    correlation = (vectors * jnp.maximum(values, 0)[None]) @ vectors.T
    norm = jnp.sqrt(jnp.maximum(jnp.diagonal(correlation), jnp.finfo(diagonal.dtype).tiny))
    return correlation / norm[:, None] / norm[None] * scale[:, None] * scale[None]


def minimise_in_box(
    slope: jax.Array, curvature: jax.Array, lower: jax.Array, upper: jax.Array, iterations: int = 20
) -> jax.Array:
    """Minimises −bᵀx + ½ xᵀAx over lower ≤ x ≤ upper by projected Newton steps (Bertsekas 1982).

    Coordinates that a bound holds are taken out, the rest is solved by Cholesky and projected; of a
    few step lengths, and a gradient step that always descends, the best is taken. One iteration is
    O(K³); the active set settles in a handful. A, (K, K), has to be positive definite.
    """
    lengths = 0.5 ** jnp.arange(8.0, dtype=slope.dtype)
    diagonal = jnp.diagonal(curvature)
    bound = jnp.sum(jnp.abs(curvature), axis=1)  # Gershgorin: the gradient step descends

    def value(x: jax.Array) -> jax.Array:
        return x @ (curvature @ x) / 2 - slope @ x

    def iterate(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        gradient = curvature @ x - slope
        held = ((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0))
        free = ~held
        reduced = jnp.where(free[:, None] & free[None], curvature, jnp.diag(diagonal))
        factor = jax.scipy.linalg.cho_factor(reduced)
        newton = jax.scipy.linalg.cho_solve(factor, jnp.where(free, gradient, 0))
        steps = jnp.concatenate([lengths[:, None] * newton[None], (gradient / bound)[None]])
        trials = jnp.concatenate([jnp.clip(x[None] - steps, lower[None], upper[None]), x[None]])
        values = jax.vmap(value)(trials)
        return trials[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))], None

    start = jnp.clip(slope / diagonal, lower, upper)
    return jax.lax.scan(iterate, start, length=iterations)[0]


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The solver made by `diagonal`, whose arguments it keeps."""

    max_change: float | None

    def solve(
        self, quadratic: Quadratic, rates: jax.Array, kept: jax.Array, least_curvature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The new rates and why each group's was kept, as `Solver` has it.

        Where the slope is known but the curvature is lost in the rounding of the loss, the parabola
        is flat as far as can be seen, and a bounded change towards its minimum, which lies further
        out than seen, is safe. Without a bound it is not, and the fit is taken as it is.
        """
        bound = self.max_change
        if bound is None:
            best, kept = parabola_minima(quadratic, kept)
            fails = jnp.any(kept != Kept.UPDATED)
            kept = jnp.where((kept == Kept.UPDATED) & fails, Kept.OTHER_GROUP, kept)
        else:
            flat = jnp.abs(quadratic.curvature) < least_curvature
            # b/least is the present rate, or further.
            least = jnp.minimum(least_curvature, jnp.abs(quadratic.slope) / rates)
            curvature = jnp.where(flat, least, quadratic.curvature)
            best, kept = parabola_minima(quadratic._replace(curvature=curvature), kept)
            best = jnp.clip(best, rates / bound, rates * bound)
        return jnp.where(kept == Kept.UPDATED, best, rates), kept.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Coupled:
    """The solver made by `coupled`, whose arguments it keeps."""

    shrinkage: float
    max_change: float

    def solve(
        self, quadratic: Quadratic, rates: jax.Array, kept: jax.Array, least_curvature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The new rates and why each group's was kept, as `Solver` has it."""
        kept = jnp.where((kept == Kept.UPDATED) & (quadratic.slope == 0), Kept.NO_SLOPE, kept)
        moving = kept == Kept.UPDATED
        local = quadratic.scaled(rates)  # in units of the current rates: all of order one
        # A slope that exceeds the curvature by more than the box is wide leads to its edge anyway.
        least = jnp.maximum(
            least_curvature * rates**2, jnp.abs(local.slope) / (4 * self.max_change)
        )
        a = jnp.maximum(jnp.abs(local.curvature), least)
        a = jnp.where(moving, a, 1)
        coupling = local.coupling
        if coupling is not None:
            coupling = jnp.where(moving[:, None] & moving[None], coupling, 0)
        b = jnp.where(moving, local.slope, 0)
        matrix = None if coupling is None else _positive(coupling, a)
        # Both sums in learning rates of one: the uniform rate is one rate, not one factor.
        inverse = jnp.where(moving, 1 / rates, 0)
        total = a @ inverse**2 if matrix is None else inverse @ matrix @ inverse
        uniform = jnp.maximum(b @ inverse, 0) / jnp.where(total > 0, total, 1)
        lower, upper = jnp.full_like(b, 1 / self.max_change), jnp.full_like(b, self.max_change)
        target = b + self.shrinkage * a * uniform * inverse
        pull = self.shrinkage * a
        if matrix is None:
            x = jnp.clip(target / (a + pull), lower, upper)
        else:
            x = minimise_in_box(target, matrix + jnp.diag(pull), lower, upper)
        # Within reach of the uniform rate, from where a group can come back; where the step of all
        # together ascends, that is zero, and every rate falls.
        least, most = (jnp.clip(edge * uniform * inverse, lower, upper) for edge in _SPREAD)
        found = rates * jnp.clip(x, least, most)
        usable = jnp.isfinite(found) & (found > 0)
        kept = jnp.where(moving & ~usable, Kept.NON_FINITE, kept)
        return jnp.where(kept == Kept.UPDATED, found, rates), kept.astype(jnp.int32)


def diagonal(max_change: float | None = 2.0) -> Diagonal:
    """Each group's rate from its own parabola: η_k = b_k/a_k (paper eq. 3.2).

    It has no guard unless `one_step` is given `max_rise`.

    Args:
      max_change: the largest factor by which one refresh may change a rate, > 1. Groups without a
        positive curvature keep their rate, the others move. None: no bound, and all rates are kept
        unless every curvature is positive, as in the paper's Algorithm 1. Without a bound, a group
        whose step ascends (b_k < 0) is given the negative rate that the algorithm asks for.

    Returns:
      A solver, for `one_step(..., solver=...)`.

    Raises:
      ValueError: an argument lies outside its range.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.paper.diagonal(max_change=None).max_change is None
      True
    """
    if max_change is not None and not (1 < max_change < math.inf):
        raise ValueError(f"max_change must be finite and > 1, or None, got {max_change}")
    return Diagonal(max_change)


def coupled(shrinkage: float = 0.3, max_change: float = 2.0) -> Coupled:
    """All rates together: the minimum of q in a box around the current rates (paper eq. 2.3).

    Minimises −bᵀη + ½ ηᵀAη over [η/max_change, η·max_change], after pulling every rate towards the
    uniform one, η_u = Σb/ΣA: b + s·diag(A)·η_u and A + s·diag(A). So a group whose own slope is
    small or noise follows the others instead of sinking, and no rate goes beyond a hundredth or a
    hundred times η_u. Where Σb ≤ 0, the step as a whole ascends and all rates fall. A is made
    positive semi-definite first: |a_k| on the diagonal, and the eigenvalues of its correlations
    clipped at zero. Where the estimator measures the diagonal alone, A is diagonal.

    Args:
      shrinkage: s ≥ 0, the weight of the uniform rate. 0: none.
      max_change: the largest factor by which one refresh may change a rate, > 1.

    Returns:
      A solver, for `one_step(..., solver=...)`.

    Raises:
      ValueError: an argument lies outside its range.

    Example:
      >>> import hidlr_optax as hd
      >>> solver = hd.paper.coupled(shrinkage=0.0)
      >>> solver.shrinkage, solver.max_change
      (0.0, 2.0)
    """
    if not 0 <= shrinkage < math.inf:
        raise ValueError(f"shrinkage must be finite and >= 0, got {shrinkage}")
    if max_change is None or not 1 < max_change < math.inf:
        raise ValueError(f"max_change must be finite and > 1, got {max_change}")
    return Coupled(shrinkage, max_change)
