"""The solvers against a reference QP, a linear solve and a loop over groups in plain Python."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paper_kit import bare
from scipy.optimize import lsq_linear, minimize

import hidlr_optax as hd
from hidlr_optax._diagnostics import Kept
from hidlr_optax._quadratic import Quadratic
from hidlr_optax.paper._solvers import minimise_in_box, parabola_minima

# The QP in a box.


def _reference(slope, matrix, lower, upper):
    root = np.linalg.cholesky(matrix)
    target = np.linalg.solve(root, slope)
    return lsq_linear(root.T, target, (lower, upper), tol=1e-14, max_iter=1000).x


def _random_problem(rng, size, rank):
    root = rng.normal(size=(size, rank))
    matrix = root @ root.T / rank
    matrix += np.diag(0.3 * np.diag(matrix) + 1e-3)
    scale = np.sqrt(np.diag(matrix))
    return rng.normal(size=size) * 2, matrix / scale / scale[:, None]


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 1), (7, 3), (40, 10), (200, 50)])
def test_the_box_minimum_is_that_of_a_reference_solver(size, rank):
    rng = np.random.default_rng(size)
    solve = jax.jit(minimise_in_box)
    for _ in range(5):
        slope, matrix = _random_problem(rng, size, rank)
        lower, upper = np.full(size, 0.5), np.full(size, 2.0)
        found = np.asarray(solve(*map(jnp.float32, (slope, matrix, lower, upper))), float)

        def value(x, slope=slope, matrix=matrix):
            return x @ matrix @ x / 2 - slope @ x

        best = value(_reference(slope, matrix, lower, upper))
        assert (found >= 0.5).all()
        assert (found <= 2.0).all()
        assert value(found) - best <= 1e-5 * (1 + abs(best))


def test_the_box_minimum_equals_the_best_of_all_active_sets():
    rng = np.random.default_rng(3)
    for _ in range(20):
        slope, matrix = _random_problem(rng, 3, 2)
        values = []
        for held in itertools.product([None, 0.5, 2.0], repeat=3):
            free = np.array([bound is None for bound in held])
            x = np.array([0.0 if bound is None else bound for bound in held])
            if free.any():
                right = slope[free] - matrix[np.ix_(free, ~free)] @ x[~free]
                x[free] = np.linalg.solve(matrix[np.ix_(free, free)], right)
            if (x >= 0.5 - 1e-9).all() and (x <= 2 + 1e-9).all():
                values.append(x @ matrix @ x / 2 - slope @ x)
        found = np.asarray(
            minimise_in_box(*map(jnp.float32, (slope, matrix, np.full(3, 0.5), np.full(3, 2.0)))),
            float,
        )
        assert found @ matrix @ found / 2 - slope @ found <= min(values) + 1e-5


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_the_box_minimum_of_a_thousand_groups_is_that_of_scipy(condition):
    rng = np.random.default_rng(0)
    size = 1000
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = (basis * np.logspace(-np.log10(condition), 0, size)) @ basis.T
    scale = np.sqrt(np.diag(matrix))
    matrix = matrix / scale / scale[:, None]
    slope = matrix @ rng.uniform(0, 2.5, size) + 0.3 * rng.normal(size=size)

    def value(x):
        return x @ matrix @ x / 2 - slope @ x

    reference = minimize(
        value,
        np.ones(size),
        jac=lambda x: matrix @ x - slope,
        bounds=[(0.5, 2.0)] * size,
        method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-8},
    )
    found = np.asarray(
        jax.jit(minimise_in_box)(
            *map(jnp.float32, (slope, matrix, np.full(size, 0.5), np.full(size, 2.0)))
        ),
        float,
    )
    assert found.min() >= 0.5
    assert found.max() <= 2.0
    assert 0.2 < np.mean((found == 0.5) | (found == 2.0)) < 0.9  # or the box would not matter
    assert value(found) - reference.fun <= 1e-5 * (1 + abs(reference.fun))
    np.testing.assert_allclose(found, reference.x, atol=1e-2)


# The solver.


_solve = jax.jit(lambda solver, *args: solver.solve(*args), static_argnums=0)
_FREE = hd.paper.coupled(shrinkage=0.0, max_change=1e4)


def _run(solver, slope, curvature, coupling, rates, kept=None):
    size = len(rates)
    kept = np.zeros(size, np.int32) if kept is None else kept
    quadratic = Quadratic(
        jnp.float32(slope),
        jnp.float32(curvature),
        None if coupling is None else jnp.float32(coupling),
    )
    found, why = _solve(
        solver, quadratic, jnp.float32(rates), jnp.asarray(kept, jnp.int32), jnp.zeros(size)
    )
    return np.asarray(found), np.asarray(why)


def test_without_shrinkage_and_inside_the_box_it_is_the_linear_solve():
    matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
    slope = np.array([2.0, 2.0])
    found, kept = _run(_FREE, slope, np.diag(matrix), matrix - np.diag(np.diag(matrix)), [0.3, 0.3])
    np.testing.assert_allclose(found, np.linalg.solve(matrix, slope), rtol=1e-4)
    assert not kept.any()


def test_shrinkage_pulls_towards_the_uniform_rate():
    slope, curvature, shrinkage = np.array([1.0, 3.0]), np.array([1.0, 1.0]), 0.5
    found, _ = _run(hd.paper.coupled(shrinkage, max_change=1e4), slope, curvature, None, [1.0, 1.0])
    uniform = slope.sum() / curvature.sum()
    np.testing.assert_allclose(found, (slope + shrinkage * uniform) / (1 + shrinkage), rtol=1e-4)


def test_a_group_whose_slope_ascends_follows_the_others_instead_of_sinking():
    slope, curvature = np.array([1.0, -0.01]), np.array([1.0, 1.0])
    rates = np.array([1.0, 1.0], np.float32)
    for _ in range(50):
        rates, _ = _run(hd.paper.coupled(), slope, curvature, None, rates)
    assert rates[1] > 0.05


@pytest.mark.parametrize(
    ("slope", "curvature", "factor"), [(1.0, 1e-9, 100.0), (1e-9, 1.0, 0.01), (-1e-9, 1.0, 0.01)]
)
def test_no_rate_goes_beyond_a_hundred_times_or_a_hundredth_of_the_uniform_one(
    slope, curvature, factor
):
    found, kept = _run(_FREE, [1.0, slope], [1.0, curvature], None, [1.0, 1.0])
    uniform = (1 + slope) / (1 + curvature)
    # A slope that the box is too narrow for counts as a curvature: 2.5e-5 of it, at this width.
    np.testing.assert_allclose(found, [1.0, factor * uniform], rtol=1e-3)
    assert not kept.any()


def test_all_rates_fall_as_far_as_they_may_where_the_step_as_a_whole_ascends():
    found, _ = _run(hd.paper.coupled(), [1.0, -2.0], [1.0, 1.0], None, [0.1, 0.3])
    np.testing.assert_allclose(found, [0.05, 0.15], rtol=1e-6)


def test_groups_that_are_not_trusted_keep_their_rates_and_do_not_disturb_the_others():
    kept = np.array([Kept.UPDATED, Kept.UNRESOLVED])
    coupling = np.array([[0.0, 5.0], [5.0, 0.0]])
    found, why = _run(_FREE, [1.0, np.nan], [2.0, np.nan], coupling, [0.1, 0.7], kept)
    np.testing.assert_allclose(found, [0.5, np.float32(0.7)], rtol=1e-5)
    assert list(why) == [Kept.UPDATED, Kept.UNRESOLVED]


_NUMBERS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_NUMBERS, min_size=4, max_size=4),
    st.lists(_NUMBERS, min_size=4, max_size=4),
    st.lists(_NUMBERS, min_size=16, max_size=16),
    st.lists(st.floats(-8, 2), min_size=4, max_size=4),
)
def test_rates_stay_finite_and_within_the_bound_whatever_was_measured(a, b, off, logs):
    coupling = np.reshape(off, (4, 4))
    coupling = (coupling + coupling.T) * (1 - np.eye(4))  # indefinite, mostly
    rates = np.float32(10.0 ** np.array(logs))
    found, _ = _run(hd.paper.coupled(), b, a, coupling, rates)
    assert np.isfinite(found).all()
    assert (found >= rates * 0.5 * (1 - 1e-5)).all()
    assert (found <= rates * 2.0 * (1 + 1e-5)).all()


# Inside one_step.


def _quadratic_loss(params, batch):
    flat = jnp.concatenate([params["v"], params["w"]])
    return flat @ batch @ flat / 2


_SOLVE = jax.jit(hd.paper.coupled().solve)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 10, 50, 200]),
    kind=st.sampled_from(["definite", "singular", "indefinite", "uncoupled"]),
    decades=st.floats(0, 6),
    seed=st.integers(0, 2**16),
)
def test_any_quadratic_of_any_size_gives_finite_rates_in_the_box_and_the_closed_form(
    size, kind, decades, seed
):
    rng = np.random.default_rng(seed)
    rates = 10 ** rng.uniform(-decades, 0, size)  # badly scaled: in A by twice as many decades
    root = rng.normal(size=(size, size if kind != "singular" else max(1, size // 2)))
    matrix = root @ root.T / root.shape[1]
    if kind == "uncoupled":
        matrix = np.diag(np.diagonal(matrix))
    if kind == "indefinite":
        matrix = matrix - 0.5 * np.eye(size)
    slope = rng.normal(size=size) + 0.5
    diagonal = jnp.float32(np.diagonal(matrix) / rates**2)
    coupling = jnp.float32((matrix - np.diag(np.diagonal(matrix))) / np.outer(rates, rates))
    given_rates, kept = jnp.float32(rates), jnp.zeros(size, jnp.int32)
    floor = jnp.zeros(size, jnp.float32)
    quadratic = hd.Quadratic(jnp.float32(slope / rates), diagonal, coupling)
    found, why = _SOLVE(quadratic, given_rates, kept, floor)
    assert np.all(np.isfinite(found))
    assert np.all(np.asarray(why) == hd.Kept.UPDATED)
    factors = np.asarray(found, float) / rates
    assert np.all((factors > 0.5 * (1 - 1e-5)) & (factors < 2 * (1 + 1e-5)))
    if kind == "uncoupled":  # the closed form is what the box QP finds where nothing is coupled
        closed, _ = _SOLVE(quadratic._replace(coupling=None), given_rates, kept, floor)
        np.testing.assert_allclose(found, closed, rtol=2e-4)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_one_coupled_step_reaches_the_minimum_along_the_group_steps(kind):
    root = np.random.default_rng(5).normal(size=(4, 4))
    batch = jnp.asarray(root @ root.T + np.eye(4), jnp.float32)
    estimators = {
        "hessian": hd.paper.hessian(),
        "gauss_newton": hd.paper.gauss_newton(
            lambda p, batch: jnp.concatenate([p["v"], p["w"]]),
            lambda flat, batch: flat @ batch @ flat / 2,
        ),
    }
    params = {"v": jnp.array([1.0, -2.0]), "w": jnp.array([0.5, 3.0])}
    tx = optax.chain(
        optax.sgd(1.0),
        bare(
            _quadratic_loss,
            {"v": "v", "w": "w"},
            init_learning_rate=0.05,
            curvature=estimators[kind],
            solver=_FREE,
        ),
    )
    grad = jax.grad(_quadratic_loss)(params, batch)
    _, state = jax.jit(tx.update)(grad, tx.init(params), params, batch=batch, grad=grad)
    flat = np.concatenate([params["v"], params["w"]])
    steps = np.zeros((2, 4))
    steps[0, :2], steps[1, 2:] = -np.asarray(grad["v"]), -np.asarray(grad["w"])
    best = np.linalg.solve(steps @ batch @ steps.T, -steps @ batch @ flat)
    rates = state[1].group_learning_rates
    np.testing.assert_allclose([rates["v"], rates["w"]], best, rtol=1e-3)
    np.testing.assert_allclose(state[1].coupling[0, 1], steps[0] @ batch @ steps[1], rtol=1e-4)


def test_the_diagonal_solver_takes_a_full_matrix_and_uses_its_diagonal():
    batch = jnp.array([[2.0, 0, 1, 0], [0, 2, 0, 0], [1, 0, 3, 0], [0, 0, 0, 3]])
    params = {"v": jnp.array([1.0, 1.0]), "w": jnp.array([1.0, 1.0])}
    found = []
    for curvature in (hd.paper.hessian(), hd.paper.probes()):
        tx = bare(
            _quadratic_loss,
            {"v": "v", "w": "w"},
            init_learning_rate=0.1,
            curvature=curvature,
            solver=hd.paper.diagonal(max_change=None),
            ema_decay=0.0,
        )
        grad = jax.grad(_quadratic_loss)(params, batch)
        direction = jax.tree.map(jnp.negative, grad)
        _, state = tx.update(direction, tx.init(params), params, batch=batch, grad=grad)
        found.append([float(rate) for rate in state.group_learning_rates.values()])
    np.testing.assert_allclose(found[0], [0.5, 1 / 3], rtol=1e-5)
    # At first, probes bend the loss by 5e-5 of itself, in which float32 leaves half a percent.
    np.testing.assert_allclose(found[1], found[0], rtol=5e-3)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_curvature_keeps_every_rate(poison):
    tx = bare(
        _quadratic_loss,
        {"v": "v", "w": "w"},
        curvature=hd.paper.hessian(),
        solver=hd.paper.coupled(),
    )
    params = {"v": jnp.ones(2), "w": jnp.ones(2)}
    state = tx.init(params)
    batch = jnp.eye(4).at[0, 0].set(poison)
    direction = jax.tree.map(jnp.negative, params)
    _, after = jax.jit(tx.update)(direction, state, params, batch=batch)
    assert after.group_learning_rates == state.group_learning_rates
    assert set(map(int, after.diagnostics.kept.values())) <= {Kept.NON_FINITE, Kept.OTHER_GROUP}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hd.paper.coupled(shrinkage=-0.1), "shrinkage must be finite and >= 0, got -0.1"),
        (lambda: hd.paper.coupled(max_change=1.0), "max_change must be finite and > 1, got 1.0"),
        (lambda: hd.paper.hessian(batch_size=0), "batch_size must be 1 or more"),
        (lambda: hd.paper.gauss_newton(None, len), "model_fn must be callable"),
    ],
)
def test_parts_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# diagonal


_FLOOR = jnp.zeros(4, jnp.float32)


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
def test_the_diagonal_solver_by_hand(case):
    slope, curvature, before, bounded, why, why_all = CASES[case]
    quadratic = Quadratic(jnp.asarray(slope, jnp.float32), jnp.asarray(curvature, jnp.float32))
    rates, before = jnp.ones(2, jnp.float32), jnp.asarray(before, jnp.int32)
    new, kept = hd.paper.diagonal(2.0).solve(quadratic, rates, before, _FLOOR[:2])
    np.testing.assert_allclose(new, bounded, rtol=1e-6)
    np.testing.assert_array_equal(kept, why)
    new, kept = hd.paper.diagonal(None).solve(quadratic, rates, before, _FLOOR[:2])
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
    solver = hd.paper.diagonal(max_change=max_change)
    return solver.solve(Quadratic(slope, curvature), rates, kept, _FLOOR)


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
def test_the_diagonal_solver_is_the_loop_over_groups(slope, curvature, rates, kept, max_change):
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
def _solve_diagonal(max_change, slope, curvature, rates, kept, floor):
    return hd.paper.diagonal(max_change=max_change).solve(
        Quadratic(slope, curvature), rates, kept, floor
    )


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
    new, why = map(np.asarray, _solve_diagonal(max_change, slope, curvature, rates, kept, floor))
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
        _, kept = hd.paper.diagonal(max_change).solve(Quadratic(zero, zero), zero + 1, before, zero)
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
    new, kept = hd.paper.diagonal(max_change=2.0).solve(
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
    new, kept = hd.paper.diagonal(max_change=2.0).solve(
        Quadratic(jnp.full(1, 1.5e-3, jnp.float32), jnp.zeros(1, jnp.float32)),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 1e-3, jnp.float32),
    )
    assert (float(new[0]), int(kept[0])) == (pytest.approx(1.5), Kept.UPDATED)


@pytest.mark.parametrize(("slope", "sense"), [(1e-5, 1), (-1e-5, -1)])
def test_a_flat_parabola_never_moves_a_rate_against_its_slope(slope, sense):
    """b over the floor is only a bound: a rate beyond it is no reason to step back."""
    new, _ = hd.paper.diagonal(max_change=2.0).solve(
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
    new, kept = hd.paper.diagonal(max_change=None).solve(
        Quadratic(jnp.ones(1, jnp.float32), jnp.full(1, curvature, jnp.float32)),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.int32),
        jnp.full(1, 1e-3, jnp.float32),
    )
    assert (float(new[0]), int(kept[0])) == (pytest.approx(rate), reason)


@pytest.mark.parametrize("max_change", [1.0, 0.5, -2.0, math.inf, math.nan])
def test_diagonal_refuses_a_bound_that_is_none(max_change):
    with pytest.raises(ValueError, match="max_change must be finite and > 1"):
        hd.paper.diagonal(max_change=max_change)


def test_solvers_compare_and_hash_by_value():
    assert hd.paper.diagonal(max_change=3.0) == hd.paper.diagonal(max_change=3.0)
    assert (
        len(
            {
                hd.paper.diagonal(),
                hd.paper.diagonal(max_change=2.0),
                hd.paper.diagonal(max_change=3.0),
            }
        )
        == 2
    )
