"""Estimates against naive loops: one loss at a time, one group at a time, in NumPy float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from paper_kit import bare
from support import enable_x64

import hidlr_optax as hd
from hidlr_optax._groups import Groups
from hidlr_optax._quadratic import Quadratic
from hidlr_optax._step_loss import StepLoss

AXIS_POINTS = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]

# Leaves in the order of jax.tree.leaves, labels in another order than the alphabet's.
SHAPES = {"w1": (4,), "w2": (3, 2), "w3": (), "w4": (5,)}
LABELS = {"w1": "b", "w2": "a", "w3": "b", "w4": "c"}
MEMBERS = {"a": ["w2"], "b": ["w1", "w3"], "c": ["w4"]}
RATES = np.array([0.3, 1.0, 0.05], np.float32)

# One probe per group and two unknowns are refused. Every joint fit is in test_paper_fits.
AXIS_FITS = [("axis", m, True) for m in (1, 2, 3, 4, 6)] + [
    ("axis", m, False) for m in (2, 3, 4, 6)
]
GAUSSIAN_FITS = [("gaussian", m, True) for m in (1, 3)] + [
    ("gaussian", m, False) for m in (2, 4, 6)
]
SOME_FITS = pytest.mark.parametrize(
    ("per_group", "known"), [(1, True), (2, False), (4, False), (4, True)]
)


def random_tree(rng, scale=1.0):
    return {
        name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()
    }


def random_direction(rng):
    """Of an order that makes RATES sensible learning rates, group by group."""
    scales = dict(zip("abc", 1 / RATES, strict=True))
    direction = random_tree(rng, 0.5)
    return {name: (x * scales[LABELS[name]]).astype(np.float32) for name, x in direction.items()}


def flat(tree, only=None):
    """All leaves in one vector, those outside group `only` zeroed."""
    return np.concatenate(
        [
            np.ravel(tree[name]).astype(float) * (only is None or LABELS[name] == only)
            for name in sorted(SHAPES)
        ]
    )


def random_hessian(rng, blocks=False):
    """Symmetric, not definite; without the blocks between groups if asked."""
    size = flat(random_tree(rng)).size
    matrix = rng.normal(size=(size, size))
    hessian = (matrix + matrix.T) / 2 + np.eye(size)
    if blocks:
        group = np.concatenate(
            [np.full(np.prod(SHAPES[n], dtype=int), ord(LABELS[n])) for n in SHAPES]
        )
        hessian = hessian * (group[:, None] == group[None, :])
    return hessian


@functools.partial(jax.jit, static_argnums=(0, 1))
def _estimate(estimator, loss, data, params, direction, rates, slope=None, value=None, step=0):
    return estimator.estimate(
        StepLoss(lambda p: loss(p, data), params, direction, Groups.of(LABELS, params)),
        rates,
        slope=slope,
        value=value,
        step=step,
    )


def quadratic_loss(params, data):
    hessian, gradient, constant = data
    w = ravel_pytree(params)[0]
    return constant + gradient @ w + w @ hessian @ w / 2


def network_loss(params, data):
    """Two tanh layers, 3 -> 2 -> 5 outputs summed: every group is coupled with every other."""
    x, y = data
    hidden = jnp.tanh(x @ params["w2"] + params["w1"][:2])
    outputs = jnp.tanh(hidden @ jnp.outer(params["w1"][2:], params["w4"]) + params["w3"])
    return jnp.mean((outputs - y) ** 2) + 1


def network_loss_numpy(w, data):
    """The same, from the flat vector, example by example in float64."""
    x, y = (np.asarray(d, float) for d in data)
    w1, w2, w3, w4 = w[:4], w[4:10].reshape(3, 2), w[10], w[11:]
    total = 0.0
    for example, target in zip(x, y, strict=True):
        hidden = np.tanh(example @ w2 + w1[:2])
        outputs = np.tanh(hidden @ np.outer(w1[2:], w4) + w3)
        total += np.sum((outputs - target) ** 2)
    return total / y.size + 1


def network_data(rng):
    return (
        rng.normal(size=(7, 3)).astype(np.float32),
        rng.normal(size=(7, 5)).astype(np.float32),
    )


def naive_estimate(loss, params, direction, points, slope=None):
    """Loops over probes and groups, explicit least squares; everything in float64."""
    w, groups = flat(params), [flat(direction, only=label) for label in "abc"]
    start, rows, targets, offsets, changes = loss(w), [], [], [], []
    for point in points:
        xi = [float(x) * float(rate) for x, rate in zip(point, RATES, strict=True)]
        change = loss(w + sum(x * u for x, u in zip(xi, groups, strict=True))) - start
        row, target = [x * x / 2 for x in point], change
        if slope is None:
            row = [-x for x in point] + row
        else:
            target = change + sum(b * x for b, x in zip(slope, xi, strict=True))
        rows.append(row)
        targets.append(target)
        offsets.append(xi)
        changes.append(change)
    solution = np.linalg.lstsq(np.array(rows, float), np.array(targets), rcond=None)[0]
    a = solution[-3:] / RATES**2
    b = solution[:3] / RATES if slope is None else np.asarray(slope)
    return b, a, np.array(offsets), np.array(changes), np.linalg.cond(np.array(rows, float))


def points_of(estimator, step=0):
    if estimator.design == "gaussian":
        return np.asarray(estimator.points(3, step), float)
    points = []
    for k in range(3):
        for x in AXIS_POINTS[: estimator.per_group]:
            point = [0.0, 0.0, 0.0]
            point[k] = x
            points.append(point)
    return np.array(points)


def case(seed):
    """Parameters, a direction, and the data of the network and of a quadratic."""
    rng = np.random.default_rng(seed)
    return rng, random_tree(rng), random_direction(rng)


@pytest.mark.parametrize(("design", "per_group", "known"), AXIS_FITS + GAUSSIAN_FITS)
def test_the_estimate_is_the_naive_loop(design, per_group, known):
    rng, params, direction = case(0)
    data = network_data(rng)
    slope = rng.normal(size=3).astype(np.float32) / RATES if known else None
    estimator = hd.paper.probes(design, per_group)
    b, a, offsets, changes, condition = naive_estimate(
        lambda w: network_loss_numpy(w, data),
        params,
        direction,
        points_of(estimator, step=20),
        None if slope is None else slope.astype(float),
    )
    measured = _estimate(
        estimator, network_loss, data, params, direction, RATES, slope=slope, step=20
    )
    assert measured.offsets.shape == (3 * per_group, 3)
    np.testing.assert_allclose(measured.offsets, offsets, rtol=1e-6)
    np.testing.assert_allclose(measured.changes, changes, rtol=1e-4, atol=2e-6)
    assert condition < 300  # or the tolerance below would say nothing
    scale = np.max(np.abs([b * RATES, a * RATES**2]))
    for ours, naive in (
        (measured.quadratic.slope * RATES, b * RATES),
        (measured.quadratic.curvature * RATES**2, a * RATES**2),
    ):
        np.testing.assert_allclose(ours, naive, rtol=0, atol=2e-6 * condition * scale)


def closed_form(hessian, gradient, params, direction):
    """b_k = −⟨g_k, u_k⟩ at w, and a_k = u_kᵀ H_kk u_k."""
    g = hessian @ flat(params) + gradient
    groups = [flat(direction, only=label) for label in "abc"]
    return np.array([-g @ u for u in groups]), np.array([u @ hessian @ u for u in groups])


def quadratic_case(seed, blocks):
    rng, params, direction = case(seed)
    hessian, gradient = random_hessian(rng, blocks), rng.normal(size=16)
    b, a = closed_form(hessian, gradient, params, direction)
    data = tuple(np.asarray(x, np.float32) for x in (hessian, gradient, 3.0))
    return params, direction, data, b, a


@SOME_FITS
@pytest.mark.parametrize("seed", [0, 1])
def test_axis_probes_are_exact_on_any_quadratic(per_group, known, seed):
    params, direction, data, b, a = quadratic_case(seed, blocks=False)
    slope = b.astype(np.float32) if known else None
    estimator = hd.paper.probes(per_group=per_group)
    found = _estimate(estimator, quadratic_loss, data, params, direction, RATES, slope=slope)
    np.testing.assert_allclose(found.quadratic.slope * RATES, b * RATES, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found.quadratic.curvature * RATES**2, a * RATES**2, rtol=1e-4, atol=1e-4
    )
    assert np.all(found.resolved)


@SOME_FITS
@pytest.mark.parametrize("seed", [0, 1])
def test_gaussian_probes_are_exact_where_groups_are_not_coupled(per_group, known, seed):
    params, direction, data, b, a = quadratic_case(seed, blocks=True)
    slope = b.astype(np.float32) if known else None
    estimator = hd.paper.probes("gaussian", per_group=per_group)
    found = _estimate(
        estimator, quadratic_loss, data, params, direction, RATES, slope=slope, step=20
    )
    np.testing.assert_allclose(found.quadratic.slope * RATES, b * RATES, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        found.quadratic.curvature * RATES**2, a * RATES**2, rtol=1e-3, atol=1e-3
    )


def test_gaussian_probes_mistake_coupling_for_curvature_and_axis_probes_do_not():
    """The reason for the default design (and the paper's weak point)."""
    params, direction, data, _, a = quadratic_case(0, blocks=False)
    errors = {}
    for design in ("axis", "gaussian"):
        found = _estimate(hd.paper.probes(design), quadratic_loss, data, params, direction, RATES)
        errors[design] = np.max(np.abs(found.quadratic.curvature - a) / np.abs(a))
    assert errors["axis"] < 1e-3
    assert errors["gaussian"] > 0.3


@pytest.mark.parametrize("design", ["axis", "gaussian"])
def test_negative_rates_place_the_probes_on_the_other_side(design):
    """A solver without bounds can hand an estimator negative rates."""
    params, direction, data, b, a = quadratic_case(1, blocks=True)
    rates = RATES * np.array([-1, 1, -1], np.float32)
    found = _estimate(hd.paper.probes(design), quadratic_loss, data, params, direction, rates)
    np.testing.assert_allclose(found.quadratic.slope * RATES, b * RATES, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        found.quadratic.curvature * RATES**2, a * RATES**2, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("known", [False, True])
def test_curvature_is_that_of_the_hessian_of_a_small_network(known):
    rng, params, direction = case(3)
    data = network_data(rng)
    w, unravel = ravel_pytree(params)

    def loss(w):
        return network_loss(unravel(w), data)

    gradient, hessian = jax.jit(lambda w: (jax.grad(loss)(w), jax.hessian(loss)(w)))(w)
    groups = [flat(direction, only=label) for label in "abc"]
    b = np.array([-np.asarray(gradient, float) @ u for u in groups])
    a = np.array([u @ np.asarray(hessian, float) @ u for u in groups])
    found = _estimate(
        hd.paper.probes(),
        network_loss,
        data,
        params,
        direction,
        0.03 * RATES,
        slope=b.astype(np.float32) if known else None,
    )
    np.testing.assert_allclose(found.quadratic.slope, b, rtol=0.02)
    np.testing.assert_allclose(found.quadratic.curvature, a, rtol=0.05)


@pytest.mark.parametrize(
    ("design", "batch_size"),
    [("axis", 1), ("axis", 2), ("axis", 3), ("axis", 100), ("gaussian", 1), ("gaussian", 2)],
)
def test_batch_size_does_not_change_the_numbers(design, batch_size):
    rng, params, direction = case(5)
    args = (network_loss, network_data(rng), params, direction, RATES)
    whole = _estimate(hd.paper.probes(design), *args)
    parts = _estimate(hd.paper.probes(design, batch_size=batch_size), *args)
    np.testing.assert_allclose(parts.offsets, whole.offsets, rtol=1e-6)
    np.testing.assert_allclose(parts.changes, whole.changes, rtol=0, atol=2e-6)
    of_parts, of_whole = (jax.tree.leaves(m.quadratic.scaled(RATES)) for m in (parts, whole))
    for ours, theirs in zip(of_parts, of_whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("design", ["axis", "gaussian"])
def test_a_value_that_is_given_replaces_the_evaluation_at_the_parameters(design):
    rng, params, direction = case(6)
    data = network_data(rng)
    args = (hd.paper.probes(design), network_loss, data, params, direction, RATES)
    without, shifted = _estimate(*args), _estimate(*args, value=jnp.float32(0.0))
    at_params = network_loss(params, data)
    np.testing.assert_allclose(without.offsets, shifted.offsets, rtol=1e-6)
    np.testing.assert_allclose(without.changes, shifted.changes - at_params, atol=1e-6)


def test_bfloat16_parameters_are_probed_in_float32():
    params, direction, data, _, _ = quadratic_case(1, blocks=True)
    params, direction = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, direction))
    widened = jax.tree.map(lambda x: np.asarray(x, np.float32), (params, direction))
    narrow = _estimate(hd.paper.probes(), quadratic_loss, data, params, direction, RATES)
    wide = _estimate(hd.paper.probes(), quadratic_loss, data, *widened, RATES)
    np.testing.assert_allclose(narrow.changes, wide.changes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", ["gradient", "probes"])
def test_float64_parameters_are_probed_in_float64_and_the_state_stays_float32(slope):
    """A bend of 1e-10 beside a loss of one: far below what float32 resolves."""
    with enable_x64(True):

        def loss(params, batch):
            return batch + 0.5e-10 * jnp.sum((params["w"] - 1) ** 2)

        params = {"w": jnp.zeros(2)}
        tx = bare(loss, "all", init_learning_rate=0.7, slope=slope)
        state = tx.init(params)
        value, grad = jax.value_and_grad(loss)(params, jnp.ones(()))
        updates = {"w": jnp.ones(2)}
        assert params["w"].dtype == jnp.float64
        updates, new = jax.jit(tx.update)(
            updates, state, params, batch=jnp.ones(()), value=value, grad=grad
        )
        assert updates["w"].dtype == jnp.float64
        assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]
        assert int(new.diagnostics.kept["all"]) == hd.Kept.UPDATED
        assert float(new.group_learning_rates["all"]) == pytest.approx(1, rel=1e-3)


# A loss of order one that group a bends, that group b moves by a few units in the last place,
# and on which group c has a slope and no curvature.
def _resolution_loss(params, data):
    a, b, c = params["w2"][0, 0], params["w1"][0], params["w4"][0]
    return data + 0.5 * (1 - a) ** 2 + 0.5e-7 * (1 - b) ** 2 - c


def _zeros_and_ones():
    return ({name: np.full(shape, x, np.float32) for name, shape in SHAPES.items()} for x in (0, 1))


@pytest.mark.parametrize("known", [False, True])
def test_a_group_that_moves_the_loss_by_less_than_its_rounding_is_flagged(known):
    rates = np.array([1, 1, 0.1], np.float32)
    slope = np.array([1, 1e-7, 1], np.float32) if known else None
    found = _estimate(
        hd.paper.probes(), _resolution_loss, np.float32(1), *_zeros_and_ones(), rates, slope=slope
    )
    np.testing.assert_array_equal(found.resolved, [True, False, True])
    assert float(found.quadratic.curvature[0]) == pytest.approx(1, rel=1e-4)


def test_the_least_curvature_moves_the_loss_by_its_rounding():
    rates = np.array([1, 1, 0.1], np.float32)
    estimator = hd.paper.probes(per_group=4)
    found = _estimate(estimator, _resolution_loss, np.float32(1), *_zeros_and_ones(), rates)
    largest = 1.5 + np.array([4.0, 0.0, 0.2])  # of the losses each group is probed with
    ulps = found.least_curvature * rates**2 / (largest * 2.0**-23)
    np.testing.assert_allclose(ulps, ulps[0], rtol=1e-4)
    assert 4 <= float(ulps[0]) <= 64
    above = np.abs(found.quadratic.curvature) > found.least_curvature
    np.testing.assert_array_equal(above, [True, False, False])


def test_resolution_is_that_of_the_loss_at_hand():
    """The weak group counts as soon as the loss is small enough to show it."""
    rates = np.array([1e-4, 1, 1e-4], np.float32)
    found = _estimate(
        hd.paper.probes(), _resolution_loss, np.float32(-0.5), *_zeros_and_ones(), rates
    )
    np.testing.assert_array_equal(found.resolved, [True, True, True])
    assert float(found.quadratic.curvature[1]) == pytest.approx(1e-7, rel=1e-3)


def test_resolution_of_joint_probes_is_that_of_all_groups_together():
    weak = np.array([1e-9, 1, 1e-9], np.float32)
    for rates, resolved in ((weak, False), (np.ones(3, np.float32), True)):
        found = _estimate(
            hd.paper.probes("gaussian"), _resolution_loss, np.float32(1), *_zeros_and_ones(), rates
        )
        np.testing.assert_array_equal(found.resolved, [resolved] * 3)


def test_one_step_keeps_an_unresolved_rate_and_moves_a_flat_one_as_far_as_it_may():
    params, updates = _zeros_and_ones()
    tx = bare(_resolution_loss, LABELS, init_learning_rate=0.7)
    _, state = jax.jit(tx.update)(updates, tx.init(params), params, batch=jnp.float32(1))
    assert {name: int(why) for name, why in state.diagnostics.kept.items()} == {
        "a": hd.Kept.UPDATED,
        "b": hd.Kept.UNRESOLVED,
        "c": hd.Kept.UPDATED,
    }
    assert float(state.group_learning_rates["a"]) == pytest.approx(1, rel=1e-4)
    assert state.group_learning_rates["b"] == jnp.float32(0.7)
    assert float(state.group_learning_rates["c"]) == pytest.approx(1.4)
    assert int(state.measurements["b"]) == 0
    assert float(state.diagnostics.slope["b"]) == float(state.diagnostics.curvature["b"]) == 0


class CountedLoss:
    """Counts how often the loss is really evaluated, every lane of a vmap by itself."""

    def __init__(self):
        self.calls = 0

    def _count(self, _):
        self.calls += 1

    def __call__(self, params, batch):
        del batch
        value = sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))
        jax.debug.callback(self._count, value)
        return value


@pytest.mark.parametrize(
    ("design", "per_group", "batch_size", "with_value"),
    [
        ("axis", 2, None, True),
        ("axis", 4, None, False),
        ("axis", 5, 4, True),
        ("axis", 3, 4, False),
        ("gaussian", 2, None, False),
        ("gaussian", 5, 4, True),
    ],
)
def test_a_refresh_costs_forward_passes_and_one_more_without_value(
    design, per_group, batch_size, with_value
):
    loss = CountedLoss()
    estimator = hd.paper.probes(design, per_group, batch_size)
    tx = bare(loss, LABELS, curvature=estimator, update_interval=2)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    value = jnp.float32(16) if with_value else None
    state, update = tx.init(params), jax.jit(tx.update)
    counts = []
    for _ in range(3):
        _, state = update(params, state, params, batch=0, value=value)
        jax.effects_barrier()
        counts.append(loss.calls)
    once = 3 * per_group + (not with_value)
    assert estimator.forward_passes(3) == 3 * per_group
    # The second step is none for a refresh.
    assert counts == [once, once, 2 * once]


def test_gaussian_draws_are_standard_normal_fixed_by_seed_and_step():
    draws = hd.paper.probes("gaussian", per_group=500).points(4, step=7)
    assert draws.shape == (2000, 4)
    assert draws.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(draws, axis=0), 0, atol=0.1)
    np.testing.assert_allclose(np.cov(draws.T), np.eye(4), atol=0.12)
    again = hd.paper.probes("gaussian", per_group=500).points(4, jnp.int32(7))
    np.testing.assert_array_equal(draws, again)
    for other in (
        hd.paper.probes("gaussian", per_group=500).points(4, step=8),
        hd.paper.probes("gaussian", per_group=500, seed=1).points(4, step=7),
    ):
        assert not np.any(np.isclose(draws, other, atol=0, rtol=1e-6).all(axis=1))


@pytest.mark.parametrize(("scale", "power"), [("rate", 1.0), ("root", 0.5)])
def test_the_draws_have_the_deviation_of_their_scale(scale, power):
    """By the letter of the paper's line 7, N(0, diag(η)), it is √η; in the code of GeN, η.

    Against as many draws of NumPy: variances agree to 4 of their standard errors.
    """
    rates = np.array([0.3, 1e-3, 0.05], np.float32)
    estimator = hd.paper.probes("gaussian", per_group=1000, scale=scale)
    rng, params, direction = case(0)
    data = tuple(jnp.zeros(shape, jnp.float32) for shape in ((16, 16), (16,), ()))
    found = _estimate(estimator, quadratic_loss, data, params, direction, rates)
    assert found.offsets.shape == (3000, 3)
    simulated = rng.normal(size=(3000, 3)) * rates**power
    for offsets in (np.asarray(found.offsets), simulated):
        error = np.sqrt(2 / len(offsets))  # of a variance, relative to it
        np.testing.assert_allclose(np.var(offsets, axis=0), rates ** (2 * power), rtol=4 * error)
        correlation = np.corrcoef(offsets.T) - np.eye(3)
        assert np.abs(correlation).max() < 4 / np.sqrt(len(offsets))


@pytest.mark.parametrize("scale", ["rate", "root"])
def test_the_fit_does_not_depend_on_the_scale_where_the_loss_is_a_quadratic(scale):
    params, direction, data, b, a = quadratic_case(2, blocks=True)
    for design in ("axis", "gaussian"):
        estimator = hd.paper.probes(design, per_group=4, scale=scale)
        found = _estimate(estimator, quadratic_loss, data, params, direction, RATES).quadratic
        np.testing.assert_allclose(found.slope * RATES, b * RATES, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(found.curvature * RATES**2, a * RATES**2, rtol=2e-3, atol=2e-3)


def test_axis_offsets_alternate_around_the_parameters():
    points = np.asarray(hd.paper.probes(per_group=6).points(2, step=3))
    np.testing.assert_array_equal(points[:6, 0], AXIS_POINTS)
    np.testing.assert_array_equal(points[6:, 1], AXIS_POINTS)
    assert np.count_nonzero(points) == 12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"design": "sobol"}, "design must be 'axis' or 'gaussian', got 'sobol'"),
        ({"scale": "eta"}, "scale must be 'resolved', 'rate', 'root' or None, got 'eta'"),
        ({"per_group": 0}, "per_group must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, or None for all, got 0"),
    ],
)
def test_probes_refuses_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hd.paper.probes(**kwargs)


def test_one_probe_per_group_needs_the_gradient():
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    one = hd.paper.probes(per_group=1)
    with pytest.raises(ValueError, match="needs per_group >= 2, got Probes"):
        bare(CountedLoss(), LABELS, curvature=one, slope="probes")
    tx = bare(CountedLoss(), LABELS, curvature=one)
    with pytest.raises(ValueError, match=r"per_group=1.* cannot fit the slope"):
        tx.update(params, tx.init(params), params, batch=0)


# The first probes bend the loss by 5e-5 of itself, in which float32 leaves half a percent.
@pytest.mark.parametrize(("dtype", "rel"), [("float64", 1e-5), ("float32", 5e-3)])
def test_the_slope_from_the_gradient_is_exact_and_the_curvature_of_one_probe_with_it(dtype, rel):
    """One probe per group, slope free: a_k of a quadratic is exact."""
    with enable_x64(dtype == "float64"):
        _one_probe_finds_the_curvature(dtype, rel)


def _one_probe_finds_the_curvature(dtype, rel):
    loss = CountedLoss()
    params = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    grad = jax.tree.map(lambda x: jnp.full_like(x, -2), params)
    tx = optax.chain(
        optax.sgd(1.0),
        bare(
            loss,
            LABELS,
            init_learning_rate=0.3,
            curvature=hd.paper.probes(per_group=1),
            solver=hd.paper.diagonal(),
            ema_decay=0.0,
        ),
    )
    _, state = jax.jit(tx.update)(
        grad, tx.init(params), params, batch=0, value=jnp.asarray(16, dtype), grad=grad
    )
    jax.effects_barrier()
    assert loss.calls == 3
    rates = optax.tree.get(state, "group_learning_rates")
    for name, members in MEMBERS.items():
        size = sum(np.prod(SHAPES[m], dtype=int) for m in members)
        assert float(optax.tree.get(state, "slope")[name]) == pytest.approx(4 * size, rel=1e-6)
        assert float(rates[name]) == pytest.approx(0.5, rel=rel)


def test_one_step_averages_slope_and_curvature_and_leaves_out_what_is_not_finite():
    """The rate is the quotient of two moving averages, within twice and half of the last rate."""

    def loss(params, batch):
        slope, curvature = batch
        return 1 - slope * params["w"] + curvature * params["w"] ** 2 / 2

    tx = bare(loss, "all", init_learning_rate=1.0, update_interval=1, ema_decay=0.8)
    params = {"w": jnp.zeros(())}
    state, update = tx.init(params), jax.jit(tx.update)
    rate, b, a, n = 1.0, 0.0, 0.0, 0
    for batch in [(3.0, 2.0), (9.0, 1.0), (np.nan, 1.0), (0.5, 4.0), (np.inf, 1.0), (-8.0, 2.0)]:
        before = state
        _, state = update(
            {"w": jnp.ones(())}, state, params, batch=tuple(map(jnp.float32, batch)), value=1.0
        )
        if np.all(np.isfinite(batch)):
            n += 1
            b, a = 0.8 * b + 0.2 * batch[0], 0.8 * a + 0.2 * batch[1]
            rate = min(max(b / a, rate / 2), rate * 2)
            seen, weight = state.diagnostics, 1 - 0.8**n
            assert int(seen.kept["all"]) == hd.Kept.UPDATED
            assert float(seen.slope["all"]) == pytest.approx(b / weight, rel=1e-4)
            assert float(seen.curvature["all"]) == pytest.approx(a / weight, rel=1e-4)
            assert float(seen.influence["all"]) == pytest.approx(b**2 / a / weight, rel=1e-4)
        else:
            assert int(state.diagnostics.kept["all"]) == hd.Kept.NON_FINITE
            same = ("group_learning_rates", "slope", "curvature", "influence", "measurements")
            for field in same:
                assert optax.tree.get(state, field) == optax.tree.get(before, field)
        assert float(state.group_learning_rates["all"]) == pytest.approx(rate, rel=1e-4)
        assert int(state.measurements["all"]) == n
    assert int(state.diagnostics.refreshes) == 6


# How far to probe.


def _reach_in_python(rate, slope, value, curvature):
    """One group."""
    size = abs(value)
    if not size > 0:
        return rate
    if curvature > 0:
        return min(max(math.sqrt(0.002 * size / curvature), rate / 10), rate * 30)
    if slope is None or slope == 0:
        return rate
    return min(max(0.01 * size / abs(slope), rate / 1e6), rate * 1e6)


_FOUND = [0.0, -3.0, 2.0, 1e-8, 1e8, 0.3]
_SLOPES = [1.0, -2.0, 3.0, 0.0, 1e-12, 1e12]


@pytest.mark.parametrize("value", [2.0, -2.0, 0.0, 1e-20, math.nan])
@pytest.mark.parametrize("slope", [None, _SLOPES], ids=["no slope", "slope"])
@pytest.mark.parametrize("found", [_FOUND, [0.0] * 6, [2.0] * 6], ids=["some", "nothing", "all"])
def test_the_reach_is_that_of_plain_python(found, slope, value):
    rates = [0.1, 1e-3, 7.0, 1e-2, 0.5, 1e-5]
    expected = Quadratic(jnp.zeros(6), jnp.float32(found))
    reach = jax.jit(hd.paper.probes().probe_scale)(
        jnp.float32(rates),
        None if slope is None else jnp.float32(slope),
        jnp.float32(value),
        expected,
    )
    assert reach.dtype == jnp.float32
    naive = [
        _reach_in_python(rate, b, value, a)
        for rate, b, a in zip(rates, slope or [None] * 6, found, strict=True)
    ]
    np.testing.assert_allclose(reach, naive, rtol=1e-5)


def test_joint_draws_reach_as_far_as_the_rates_whatever_is_known():
    rates = jnp.float32([0.1, 1e-3])
    expected = Quadratic(jnp.ones(2), jnp.ones(2))
    reach = hd.paper.probes("gaussian").probe_scale(rates, jnp.ones(2), jnp.float32(2.0), expected)
    np.testing.assert_array_equal(reach, rates)


def test_the_reach_is_float32_where_the_slope_is_float64():
    with enable_x64(True):
        reach = hd.paper.probes().probe_scale(
            jnp.ones(2, jnp.float32),
            jnp.ones(2, jnp.float64),
            jnp.float64(2.0),
            Quadratic(*jnp.zeros((2, 2), jnp.float32)),
        )
        assert reach.dtype == jnp.float32
