"""Fits of a quadratic to losses along the group steps, and its average over refreshes.

Arrays only: no pytrees of parameters and no losses live here.
"""

import jax
import jax.numpy as jnp

from hidlr_optax._quadratic import Quadratic


def fit_joint(points: jax.Array, changes: jax.Array, slope: jax.Array | None = None) -> Quadratic:
    """Least squares, without intercept, on joint points: Algorithm 1 of the paper.

    Solves min Σ_j (−bᵀx_j + ½ Σ_k a_k x_jk² − f_j)² for 2K unknowns, or for the K curvatures alone
    where the slope is known. To stay well conditioned in float32, points have to be of order one:
    pass rates over their current values (ξ/η) and rescale the result.

    Args:
      points: (n, K).
      changes: f, (n,), the change of the loss at each point.
      slope: (K,), where known.
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
