"""The K×K curvature and the solver for it, against jax.hessian and a reference QP."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from support import bare

import hidlr_optax as hd
from hidlr_optax._groups import Groups
from hidlr_optax._quadratic import Kept, Quadratic
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.solvers import minimise_in_box

# The curvature between groups.


def _network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def _cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def _loss(params, batch):
    return _cross_entropy(_network(params, batch), batch)


_RNG = np.random.default_rng(0)
_BATCH = {
    "x": jnp.asarray(_RNG.normal(size=(16, 5)), jnp.float32),
    "y": jnp.asarray(_RNG.integers(0, 3, 16), jnp.int32),
}
_SHAPES = {"w1": (5, 7), "b1": (7,), "w2": (7, 3), "b2": (3,)}
_PARAMS = {k: jnp.asarray(_RNG.normal(size=s) / 2, jnp.float32) for k, s in _SHAPES.items()}
_DIRECTION = {k: jnp.asarray(_RNG.normal(size=s), jnp.float32) for k, s in _SHAPES.items()}
_LABELS = {"w1": "body", "b1": "bias", "w2": "head", "b2": "bias"}
_GROUPS = Groups.of(_LABELS, _PARAMS)


def _flat(tree):
    return np.concatenate([np.ravel(tree[name]).astype(float) for name in sorted(tree)])


def _split_direction():
    """(K, d): the direction of each group, zero elsewhere."""
    rows = []
    for name in _GROUPS.names:
        mine = {k: u * float(_LABELS[k] == name) for k, u in _DIRECTION.items()}
        rows.append(_flat(mine))
    return np.stack(rows)


def _full_matrix(fn):
    """The Hessian of a function of params as one (d, d) matrix."""
    blocks = jax.hessian(fn)(_PARAMS)
    sizes = {k: int(np.prod(s)) for k, s in _SHAPES.items()}
    names = sorted(_SHAPES)
    return np.block(
        [[np.reshape(blocks[a][b], (sizes[a], sizes[b])) for b in names] for a in names]
    )


def _expected(matrix):
    directions = _split_direction()
    return directions @ matrix @ directions.T


def _gauss_newton_matrix():
    jacobian = jax.jacobian(lambda p: _network(p, _BATCH))(_PARAMS)
    columns = [np.reshape(jacobian[name], (16 * 3, -1)) for name in sorted(_SHAPES)]
    outer = jax.hessian(lambda out: _cross_entropy(out, _BATCH))(_network(_PARAMS, _BATCH))
    stacked = np.concatenate(columns, axis=1).astype(float)
    return stacked.T @ np.reshape(outer, (48, 48)) @ stacked


def _matrix(quadratic):
    return np.asarray(quadratic.coupling) + np.diag(quadratic.curvature)


def _measure(estimator, **kwargs):
    rates = jnp.full(len(_GROUPS), 0.1)
    step_loss = StepLoss(lambda p: _loss(p, _BATCH), _PARAMS, _DIRECTION, _GROUPS)
    return estimator.estimate(step_loss, rates, batch=_BATCH, **kwargs)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_hessian_is_that_of_jax_along_the_group_steps(batch_size):
    measured = _measure(hd.hessian(batch_size))
    expected = _expected(_full_matrix(lambda p: _loss(p, _BATCH)))
    np.testing.assert_allclose(_matrix(measured.quadratic), expected, rtol=1e-3, atol=1e-4)
    gradient = _flat(jax.grad(_loss)(_PARAMS, _BATCH))
    np.testing.assert_allclose(
        measured.quadratic.slope, -_split_direction() @ gradient, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_gauss_newton_is_that_of_the_jacobian_and_positive(batch_size):
    measured = _measure(hd.gauss_newton(_network, _cross_entropy, batch_size))
    found = _matrix(measured.quadratic)
    np.testing.assert_allclose(found, _expected(_gauss_newton_matrix()), rtol=1e-3, atol=1e-4)
    assert np.linalg.eigvalsh(found).min() > -1e-4
    gradient = _flat(jax.grad(_loss)(_PARAMS, _BATCH))
    np.testing.assert_allclose(
        measured.quadratic.slope, -_split_direction() @ gradient, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    "estimator", [hd.hessian(), hd.gauss_newton(_network, _cross_entropy)], ids=["H", "GN"]
)
def test_a_known_slope_is_taken_as_it_is(estimator):
    slope = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(_measure(estimator, slope=slope).quadratic.slope, slope)


def test_gauss_newton_can_be_checked_against_the_loss():
    hd.gauss_newton(_network, _cross_entropy).check(_loss, _PARAMS, _BATCH)
    other = hd.gauss_newton(_network, lambda out, batch: 2 * _cross_entropy(out, batch))
    with pytest.raises(ValueError, match="that of another function"):
        other.check(_loss, _PARAMS, _BATCH)


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


# The solver.


_solve = jax.jit(lambda solver, *args: solver.solve(*args), static_argnums=0)
_FREE = hd.coupled(shrinkage=0.0, max_change=1e4)


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
    found, _ = _run(hd.coupled(shrinkage, max_change=1e4), slope, curvature, None, [1.0, 1.0])
    uniform = slope.sum() / curvature.sum()
    np.testing.assert_allclose(found, (slope + shrinkage * uniform) / (1 + shrinkage), rtol=1e-4)


def test_a_group_whose_slope_ascends_follows_the_others_instead_of_sinking():
    slope, curvature = np.array([1.0, -0.01]), np.array([1.0, 1.0])
    rates = np.array([1.0, 1.0], np.float32)
    for _ in range(50):
        rates, _ = _run(hd.coupled(), slope, curvature, None, rates)
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
    found, _ = _run(hd.coupled(), [1.0, -2.0], [1.0, 1.0], None, [0.1, 0.3])
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
    found, _ = _run(hd.coupled(), b, a, coupling, rates)
    assert np.isfinite(found).all()
    assert (found >= rates * 0.5 * (1 - 1e-5)).all()
    assert (found <= rates * 2.0 * (1 + 1e-5)).all()


# Inside hidlr.


def _quadratic_loss(params, batch):
    flat = jnp.concatenate([params["v"], params["w"]])
    return flat @ batch @ flat / 2


_SOLVE = jax.jit(hd.coupled().solve)


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
        "hessian": hd.hessian(),
        "gauss_newton": hd.gauss_newton(
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
    for curvature in (hd.hessian(), hd.probes()):
        tx = bare(
            _quadratic_loss,
            {"v": "v", "w": "w"},
            init_learning_rate=0.1,
            curvature=curvature,
            solver=hd.diagonal(max_change=None),
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
    tx = bare(_quadratic_loss, {"v": "v", "w": "w"}, curvature=hd.hessian(), solver=hd.coupled())
    params = {"v": jnp.ones(2), "w": jnp.ones(2)}
    state = tx.init(params)
    batch = jnp.eye(4).at[0, 0].set(poison)
    direction = jax.tree.map(jnp.negative, params)
    _, after = jax.jit(tx.update)(direction, state, params, batch=batch)
    assert after.group_learning_rates == state.group_learning_rates
    assert set(map(int, after.kept.values())) <= {Kept.NON_FINITE, Kept.OTHER_GROUP}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hd.coupled(shrinkage=-0.1), "shrinkage must be finite and >= 0, got -0.1"),
        (lambda: hd.coupled(max_change=1.0), "max_change must be finite and > 1, got 1.0"),
        (lambda: hd.hessian(batch_size=0), "batch_size must be 1 or more"),
        (lambda: hd.gauss_newton(None, len), "model_fn must be callable"),
    ],
)
def test_parts_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
