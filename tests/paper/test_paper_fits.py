"""Fits and averages against plain NumPy: explicit least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hidlr_optax.paper._fit import average, fit_axes, fit_joint

AXIS_POINTS = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]

# One probe per group and two unknowns are refused by one_step.
FITS = pytest.mark.parametrize(
    ("per_group", "known"),
    [(m, True) for m in (1, 2, 3, 4, 6)] + [(m, False) for m in (2, 3, 4, 6)],
)

_fit_axes = jax.jit(fit_axes)
_fit_joint = jax.jit(fit_joint)


def least_squares(points, changes, slope=None):
    """b and a, and the condition number, from the explicit design matrix, in float64."""
    rows, targets = [], []
    for point, change in zip(np.asarray(points, float), np.asarray(changes, float), strict=True):
        row = [x * x / 2 for x in point]
        if slope is None:
            row = [-x for x in point] + row
        else:
            change += sum(b * x for b, x in zip(np.asarray(slope, float), point, strict=True))
        rows.append(row)
        targets.append(change)
    matrix = np.array(rows)
    solution = np.linalg.lstsq(matrix, np.array(targets), rcond=None)[0]
    b, a = (np.asarray(slope, float), solution) if slope is not None else np.split(solution, 2)
    return b, a, np.linalg.cond(matrix)


def joint_points(axis_points, num_groups):
    """One group at a time: all the points of the first group, then of the second, …."""
    rows = []
    for k in range(num_groups):
        for x in axis_points:
            row = [0.0] * num_groups
            row[k] = x
            rows.append(row)
    return np.array(rows)


@FITS
def test_fit_axes_is_least_squares_on_the_joint_design(per_group, known):
    rng = np.random.default_rng(per_group)
    changes = rng.normal(size=(3, per_group)).astype(np.float32)
    slope = rng.normal(size=3).astype(np.float32) if known else None
    axis = AXIS_POINTS[:per_group]
    b, a, _ = least_squares(joint_points(axis, 3), changes.ravel(), slope)
    fitted = _fit_axes(jnp.asarray(axis, jnp.float32), changes, slope)
    np.testing.assert_allclose(fitted.slope, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fitted.curvature, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [False, True], ids=["fitted", "known"])
def test_fit_axes_is_least_squares_on_points_without_any_symmetry(known):
    rng = np.random.default_rng(7)
    axis = np.array([0.3, -1.7, 2.2, 0.9, -0.4], np.float32)
    changes = rng.normal(size=(4, 5)).astype(np.float32)
    slope = rng.normal(size=4).astype(np.float32) if known else None
    b, a, _ = least_squares(joint_points(axis, 4), changes.ravel(), slope)
    fitted = _fit_axes(jnp.asarray(axis), changes, slope)
    np.testing.assert_allclose(fitted.slope, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fitted.curvature, a, rtol=1e-5, atol=1e-5)


@FITS
def test_fit_joint_is_least_squares(per_group, known):
    rng = np.random.default_rng(per_group)
    points = rng.normal(size=(3 * per_group, 3)).astype(np.float32)
    changes = rng.normal(size=3 * per_group).astype(np.float32)
    slope = rng.normal(size=3).astype(np.float32) if known else None
    b, a, condition = least_squares(points, changes, slope)
    assert condition < 200  # or the tolerance below would say nothing
    fitted = _fit_joint(points, changes, slope)
    tolerance = 1e-6 * condition * np.max(np.abs([b, a]))
    np.testing.assert_allclose(fitted.slope, b, rtol=0, atol=tolerance)
    np.testing.assert_allclose(fitted.curvature, a, rtol=0, atol=tolerance)


@pytest.mark.parametrize("known", [False, True], ids=["fitted", "known"])
@pytest.mark.parametrize("design", ["axis", "joint"])
def test_fits_recover_an_exact_diagonal_quadratic(design, known):
    b, a = np.array([3.0, -2.0, 0.5]), np.array([4.0, 0.25, -7.0])
    axis = AXIS_POINTS[:4]
    points = joint_points(axis, 3)
    if design == "joint":
        points = np.random.default_rng(0).normal(size=points.shape)
    changes = (-points @ b + points**2 @ a / 2).astype(np.float32)
    slope = b.astype(np.float32) if known else None
    if design == "axis":
        fitted = _fit_axes(jnp.asarray(axis, jnp.float32), changes.reshape(3, 4), slope)
    else:
        fitted = _fit_joint(points.astype(np.float32), changes, slope)
    np.testing.assert_allclose(fitted.slope, b, rtol=1e-5)
    np.testing.assert_allclose(fitted.curvature, a, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_average_is_the_usual_bias_corrected_moving_average(decay):
    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    mean = jnp.full(3, jnp.nan, jnp.float32)  # nothing before the first value counts
    usual = np.zeros(3)
    for n, value in enumerate(values, start=1):
        mean = average(mean, jnp.asarray(value), decay, jnp.full(3, n, jnp.int32))
        usual = decay * usual + (1 - decay) * value
        np.testing.assert_allclose(mean, usual / (1 - decay**n), rtol=1e-4, atol=1e-5)


def test_average_counts_the_measurements_of_each_group_by_itself():
    values = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    counts = np.zeros(2, np.int32)
    mean, usual = jnp.zeros(2, jnp.float32), np.zeros(2)
    for n, value in enumerate(values):
        seen = np.array([True, n % 3 == 0])
        counts += seen
        mean = jnp.where(seen, average(mean, jnp.asarray(value), 0.9, jnp.asarray(counts)), mean)
        usual = np.where(seen, 0.9 * usual + 0.1 * value, usual)
    np.testing.assert_array_equal(counts, [6, 2])
    np.testing.assert_allclose(mean, usual / (1 - 0.9**counts), rtol=1e-5)


def test_average_of_one_value_repeated_is_that_value():
    mean = jnp.zeros((), jnp.float32)
    for n in range(1, 200):
        mean = average(mean, jnp.float32(0.1), 0.9, jnp.int32(n))
    assert float(mean) == pytest.approx(0.1, rel=1e-6)
