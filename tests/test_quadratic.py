"""Fits, averages and minima against plain NumPy: explicit least squares, loops over groups."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hidlr_optax as hd
from hidlr_optax._quadratic import (
    Kept,
    Quadratic,
    average,
    fit_axes,
    fit_joint,
    influence_per_parameter,
)
from hidlr_optax.solvers import minimise_diagonal, parabola_minima

AXIS_POINTS = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]

# One probe per group and two unknowns are refused by hidlr.
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


def test_scaled_is_the_same_quadratic_in_other_units():
    b, a = np.array([3.0, -2.0]), np.array([4.0, 0.25])
    units, eta = np.array([10.0, 0.5]), np.array([0.7, -1.3])
    scaled = Quadratic(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32)).scaled(
        jnp.asarray(units, jnp.float32)
    )
    own = eta / units
    ours = -np.dot(scaled.slope, own) + np.dot(scaled.curvature, own**2) / 2
    assert ours == pytest.approx(-b @ eta + a @ eta**2 / 2, rel=1e-6)


def test_influence_is_b_squared_over_a_d_in_any_units():
    b, a, sizes = np.array([3.0, -2.0]), np.array([4.0, 0.25]), np.array([5.0, 2000.0])
    quadratic = Quadratic(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32))
    for units in (1.0, 1e-6, 1e6):
        ours = influence_per_parameter(
            quadratic.scaled(jnp.full(2, units, jnp.float32)), jnp.asarray(sizes, jnp.float32)
        )
        np.testing.assert_allclose(ours, b**2 / (a * sizes), rtol=1e-5)


def test_influence_of_a_steep_group_does_not_overflow_on_the_way():
    """b² alone would be infinite in float32."""
    quadratic = Quadratic(jnp.full(1, 1e25, jnp.float32), jnp.full(1, 1e30, jnp.float32))
    found = influence_per_parameter(quadratic, jnp.ones(1, jnp.float32))
    assert float(found[0]) == pytest.approx(1e20)


def oracle_minimise(b, a, rates, kept, max_change):
    """The rule in words, group by group, in Python floats (float32 inputs, float64 sums)."""
    new, why = [], []
    for slope, curvature, rate, reason in zip(b, a, rates, kept, strict=True):
        slope, curvature, rate = float(slope), float(curvature), float(rate)
        best = rate
        if reason == Kept.UPDATED:
            if slope == 0:
                reason = Kept.NO_SLOPE
            elif not curvature > 0:
                reason = Kept.NOT_CONVEX
            else:
                with np.errstate(all="ignore"):
                    best = float(np.float32(slope) / np.float32(curvature))
                if not math.isfinite(best) or best == 0:
                    reason = Kept.NON_FINITE
                elif max_change is not None:
                    best = min(max(best, rate / max_change), rate * max_change)
        new.append(best if reason == Kept.UPDATED else rate)
        why.append(int(reason))
    if max_change is None and any(why):
        why = [reason or int(Kept.OTHER_GROUP) for reason in why]
        new = [float(rate) for rate in rates]
    return np.array(new), np.array(why)


CASES = {
    # name: (slope, curvature, kept before, rates and reasons at max_change 2, reasons at None)
    "inside": ([1.2, 0.8], [1.0, 1.0], [0, 0], [1.2, 0.8], [0, 0], [0, 0]),
    "clipped": ([9.0, 0.1], [1.0, 1.0], [0, 0], [2.0, 0.5], [0, 0], [0, 0]),
    "ascent": ([-1.0, 1.5], [1.0, 1.0], [0, 0], [0.5, 1.5], [0, 0], [0, 0]),
    "concave": ([1.5, 1.5], [-1.0, 1.0], [0, 0], [1.0, 1.5], [3, 0], [3, 5]),
    "flat": ([1.5, 1.5], [0.0, 1.0], [0, 0], [1.0, 1.5], [3, 0], [3, 5]),
    "nan": ([1.5, 1.5], [math.nan, 1.0], [0, 0], [1.0, 1.5], [3, 0], [3, 5]),
    "no slope": ([0.0, 1.5], [1.0, 1.0], [0, 0], [1.0, 1.5], [4, 0], [4, 5]),
    "distrusted": ([1.5, 1.5], [1.0, 1.0], [2, 0], [1.0, 1.5], [2, 0], [2, 5]),
    "overflow": ([1e30, 1.5], [1e-30, 1.0], [0, 0], [1.0, 1.5], [1, 0], [1, 5]),
    "underflow": ([1e-30, 1.5], [1e30, 1.0], [0, 0], [1.0, 1.5], [1, 0], [1, 5]),
}


@pytest.mark.parametrize("case", CASES)
def test_minimise_diagonal_by_hand(case):
    slope, curvature, before, bounded, why, why_all = CASES[case]
    quadratic = Quadratic(jnp.asarray(slope, jnp.float32), jnp.asarray(curvature, jnp.float32))
    rates, before = jnp.ones(2, jnp.float32), jnp.asarray(before, jnp.int32)
    new, kept = minimise_diagonal(quadratic, rates, before, 2.0)
    np.testing.assert_allclose(new, bounded, rtol=1e-6)
    np.testing.assert_array_equal(kept, why)
    new, kept = minimise_diagonal(quadratic, rates, before, None)
    exact = np.divide(slope, curvature) if not any(why_all) else np.ones(2)
    np.testing.assert_allclose(new, exact, rtol=1e-6)
    np.testing.assert_array_equal(kept, why_all)
    assert kept.dtype == jnp.int32


K = 4
_ordinary = st.floats(-100, 100, width=32, allow_subnormal=False)
_any_float = st.one_of(
    _ordinary,
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-37, -1e-37]),
    st.floats(width=32, allow_subnormal=False),
)
_rate = st.floats(2.0**-100, 2.0**100, width=32)
_kept = st.sampled_from([Kept.UPDATED] * 6 + [Kept.UNRESOLVED, Kept.NON_FINITE, Kept.OTHER_GROUP])


def _vector(elements, dtype):
    return st.lists(elements, min_size=K, max_size=K).map(lambda xs: np.array(xs, dtype))


@functools.partial(jax.jit, static_argnums=4)
def _minimise(slope, curvature, rates, kept, max_change):
    return minimise_diagonal(Quadratic(slope, curvature), rates, kept, max_change)


_inputs = given(
    slope=_vector(_any_float, np.float32),
    curvature=_vector(st.one_of(_any_float, st.floats(0.5, 100, width=32)), np.float32),
    rates=_vector(_rate, np.float32),
    kept=_vector(_kept, np.int32),
    max_change=st.sampled_from([None, 1.5, 2.0, 100.0]),
)


def _subnormal(x):
    """XLA may flush these to zero, NumPy does not."""
    x = np.abs(x)
    return (x > 0) & (x < np.finfo(np.float32).tiny)


@settings(max_examples=300, deadline=None)
@_inputs
def test_minimise_diagonal_is_the_loop_over_groups(slope, curvature, rates, kept, max_change):
    with np.errstate(all="ignore"):
        flushed = _subnormal(slope / curvature)
    slope = np.where(flushed, np.float32(1), slope)
    curvature = np.where(flushed, np.float32(1), curvature)
    new, why = _minimise(slope, curvature, rates, kept, max_change)
    expected, reasons = oracle_minimise(slope, curvature, rates, kept, max_change)
    np.testing.assert_array_equal(why, reasons)
    np.testing.assert_allclose(new, expected, rtol=1e-6)


@settings(max_examples=300, deadline=None)
@_inputs
@example(
    slope=np.array([math.inf, -math.inf, math.nan, 3e38], np.float32),
    curvature=np.array([1e-38, math.inf, 1, 1e-38], np.float32),
    rates=np.ones(4, np.float32),
    kept=np.zeros(4, np.int32),
    max_change=2.0,
)
def test_new_rates_are_finite_bounded_and_kept_ones_untouched(
    slope, curvature, rates, kept, max_change
):
    new, why = map(np.asarray, _minimise(slope, curvature, rates, kept, max_change))
    assert np.all(np.isfinite(new))
    assert np.all(new != 0)
    assert new[why != 0].tobytes() == rates[why != 0].tobytes()
    if max_change is not None:
        assert np.all(new >= rates / max_change * (1 - 1e-6))
        assert np.all(new <= rates * max_change * (1 + 1e-6))


@functools.partial(jax.jit, static_argnums=0)
def _solve(max_change, slope, curvature, rates, kept, floor):
    return hd.diagonal(max_change=max_change).solve(Quadratic(slope, curvature), rates, kept, floor)


@settings(max_examples=200, deadline=None)
@given(
    slope=_vector(_any_float, np.float32),
    curvature=_vector(_any_float, np.float32),
    rates=_vector(_rate, np.float32),
    kept=_vector(_kept, np.int32),
    floor=_vector(st.one_of(_any_float, st.floats(0, 10, width=32)).map(abs), np.float32),
    max_change=st.sampled_from([None, 2.0]),
)
def test_solved_rates_are_finite_bounded_and_kept_ones_untouched_whatever_the_floor(
    slope, curvature, rates, kept, floor, max_change
):
    new, why = map(np.asarray, _solve(max_change, slope, curvature, rates, kept, floor))
    assert np.all(np.isfinite(new))
    assert np.all(new != 0)
    assert new[why != 0].tobytes() == rates[why != 0].tobytes()
    assert np.all(why[kept != 0] == kept[kept != 0])
    if max_change is not None:
        assert np.all(new >= rates / 2 * (1 - 1e-6))
        assert np.all(new <= rates * 2 * (1 + 1e-6))


@settings(max_examples=300, deadline=None)
@_inputs
def test_without_a_bound_it_is_all_rates_or_none(slope, curvature, rates, kept, max_change):
    del max_change
    new, why = map(np.asarray, _minimise(slope, curvature, rates, kept, None))
    assert np.all(why == 0) or np.all(why != 0)
    if np.any(why):
        assert new.tobytes() == rates.tobytes()
    else:
        np.testing.assert_allclose(new, slope / curvature, rtol=1e-6)


def test_a_reason_given_before_is_not_overwritten():
    zero = jnp.zeros(3, jnp.float32)
    before = jnp.asarray([Kept.NON_FINITE, Kept.UNRESOLVED, Kept.OTHER_GROUP], jnp.int32)
    for max_change in (None, 2.0):
        _, kept = minimise_diagonal(Quadratic(zero, zero), zero + 1, before, max_change)
        np.testing.assert_array_equal(kept, before)


def test_parabola_minima_are_the_minima_of_the_parabolas():
    b, a = np.array([3.0, -2.0, 0.5]), np.array([4.0, 0.25, 7.0])
    quadratic = Quadratic(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32))
    best, kept = parabola_minima(quadratic, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(kept, [0, 0, 0])

    def model(eta):
        return -b * eta + a * eta**2 / 2

    best = np.asarray(best, float)
    for nearby in (best * 0.99, best * 1.01):
        assert np.all(model(nearby) > model(best))


FLAT = {
    # curvature: rates at max_change 2 and the reason, from rates of one with a floor of 1e-3
    "below the floor": (1e-6, 2.0, Kept.UPDATED),
    "zero": (0.0, 2.0, Kept.UPDATED),
    "negative, below the floor": (-1e-6, 2.0, Kept.UPDATED),
    "negative, above the floor": (-1.0, 1.0, Kept.NOT_CONVEX),
    "above the floor": (0.75, 4 / 3, Kept.UPDATED),
}


@pytest.mark.parametrize("case", FLAT)
@pytest.mark.parametrize("slope", [1.0, -1.0, 0.0])
def test_a_bounded_solver_takes_a_curvature_below_the_floor_for_the_floor(case, slope):
    curvature, uphill_or_down, reason = FLAT[case]
    new, kept = hd.diagonal(max_change=2.0).solve(
        Quadratic(jnp.full(1, slope, jnp.float32), jnp.full(1, curvature, jnp.float32)),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 1e-3, jnp.float32),
    )
    if slope == 0:
        expected, reason = 1.0, Kept.NO_SLOPE
    elif slope < 0 and reason == Kept.UPDATED:
        expected = 0.5
    else:
        expected = uphill_or_down
    assert float(new[0]) == pytest.approx(expected)
    assert int(kept[0]) == reason


def test_a_flat_parabola_whose_floor_says_enough_is_not_taken_to_the_bound():
    """b over the floor is a lower bound of the minimum: 1.5 is closer than the allowed 2."""
    new, kept = hd.diagonal(max_change=2.0).solve(
        Quadratic(jnp.full(1, 1.5e-3, jnp.float32), jnp.zeros(1, jnp.float32)),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 1e-3, jnp.float32),
    )
    assert (float(new[0]), int(kept[0])) == (pytest.approx(1.5), Kept.UPDATED)


@pytest.mark.parametrize(("slope", "sense"), [(1e-5, 1), (-1e-5, -1)])
def test_a_flat_parabola_never_moves_a_rate_against_its_slope(slope, sense):
    """b over the floor is only a bound: a rate beyond it is no reason to step back."""
    new, _ = hd.diagonal(max_change=2.0).solve(
        Quadratic(jnp.full(1, slope, jnp.float32), jnp.zeros(1, jnp.float32)),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 1e-3, jnp.float32),
    )
    assert sense * (float(new[0]) - 1) >= 0


@pytest.mark.parametrize(
    ("curvature", "rate", "reason"), [(1e-6, 1e6, Kept.UPDATED), (-1e-6, 1.0, Kept.NOT_CONVEX)]
)
def test_a_solver_without_a_bound_takes_the_fit_as_it_is(curvature, rate, reason):
    new, kept = hd.diagonal(max_change=None).solve(
        Quadratic(jnp.ones(1, jnp.float32), jnp.full(1, curvature, jnp.float32)),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 1e-3, jnp.float32),
    )
    assert (float(new[0]), int(kept[0])) == (pytest.approx(rate), reason)


@pytest.mark.parametrize("max_change", [1.0, 0.5, -2.0, math.inf, math.nan])
def test_diagonal_refuses_a_bound_that_is_none(max_change):
    with pytest.raises(ValueError, match="max_change must be finite and > 1"):
        hd.diagonal(max_change=max_change)


def test_solvers_compare_and_hash_by_value():
    assert hd.diagonal(max_change=3.0) == hd.diagonal(max_change=3.0)
    assert len({hd.diagonal(), hd.diagonal(max_change=2.0), hd.diagonal(max_change=3.0)}) == 2
