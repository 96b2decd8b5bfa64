"""Estimators with derivatives against `jax.hessian` and `jax.jacobian`, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import counted, enable_x64

import hidlr_optax as hd
from hidlr_optax._groups import Groups
from hidlr_optax._step_loss import StepLoss

_PARAMS = {"w": jnp.ones(3)}


def _looping_loss(params, batch):
    """Differentiable in forward mode alone: the number of iterations is data."""

    def step(carry):
        return carry[0] + 1, carry[1] * jnp.sum(params["w"])

    start = (jnp.int32(0), jnp.float32(1.0))
    return jax.lax.while_loop(lambda carry: carry[0] < batch, step, start)[1]


def _callback_model(params, batch):
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    return jax.pure_callback(lambda x: x, shape, params["w"])


def _update(curvature):
    tx = hd.paper.one_step(_looping_loss, "all", curvature=curvature)
    return tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=jnp.int32(3), grad=_PARAMS)


def test_a_loss_without_second_derivatives_is_refused_by_the_hessian_and_taken_by_probes():
    with pytest.raises(ValueError, match=r"hessian\(\) needs a twice differentiable loss"):
        _update(hd.paper.hessian())
    updates, _ = _update(hd.paper.probes())
    assert jnp.all(jnp.isfinite(updates["w"]))


def test_a_model_without_forward_derivatives_is_refused_by_gauss_newton():
    estimator = hd.paper.gauss_newton(_callback_model, lambda outputs, batch: jnp.sum(outputs))
    with pytest.raises(ValueError, match=r"gauss_newton\(\) needs a model_fn"):
        _update(estimator)


@pytest.mark.parametrize(
    "output_loss",
    [
        lambda outputs, batch: outputs,
        lambda outputs, batch: jnp.int32(1),
        lambda outputs, batch: (jnp.sum(outputs), outputs),
    ],
    ids=["vector", "integer", "auxiliary"],
)
def test_an_output_loss_that_is_no_loss_is_refused_when_it_is_traced(output_loss):
    estimator = hd.paper.gauss_newton(lambda params, batch: params["w"], output_loss)
    with pytest.raises(ValueError, match="has to be the loss, a real scalar"):
        _update(estimator)


# secant


_PARTS = {"a": "first", "b": "second", "c": "first"}
_RATES = jnp.array([0.3, 0.02], jnp.float32)


def _three_parts(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": (4,), "c": ()}
    return tuple(
        {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
        for _ in range(2)
    )


def _flat(params):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def _quadratic(params, batch):
    matrix, vector = batch
    flat = _flat(params)
    return flat @ (matrix @ flat) / 2 - vector @ flat


def _quadratic_batch(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(11, 11))
    return jnp.asarray(root + root.T, jnp.float32), jnp.asarray(rng.normal(size=11), jnp.float32)


def _along(loss, params, direction, groups):
    """Slope and curvature in the rates, by JAX's own derivatives."""

    def at(rates):
        return loss(groups.step(params, direction, rates))

    zero = jnp.zeros(len(groups))
    return -jax.grad(at)(zero), jax.hessian(at)(zero)


@pytest.mark.parametrize("known", [False, True], ids=["no slope", "slope"])
@pytest.mark.parametrize("sign", [1, -1], ids=["ahead", "back"])
@pytest.mark.parametrize("seed", range(3))
def test_the_secant_of_a_quadratic_is_its_hessian_times_the_rates(seed, sign, known):
    params, direction = _three_parts(seed)
    batch = _quadratic_batch(seed)
    groups = Groups.of(_PARTS, params)
    counting, calls = counted(_quadratic)
    slope, matrix = _along(lambda p: _quadratic(p, batch), params, direction, groups)
    measured = hd.paper.secant().estimate(
        StepLoss(lambda p: counting(p, batch), params, direction, groups),
        sign * _RATES,
        slope=slope if known else None,
    )
    jax.effects_barrier()
    assert len(calls) == (1 if known else 2)  # gradients, of all groups together
    scale = float(jnp.abs(slope).max())
    np.testing.assert_allclose(measured.quadratic.slope, slope, atol=1e-5 * scale)
    rows = measured.quadratic.curvature * _RATES
    np.testing.assert_allclose(rows, matrix @ _RATES, atol=1e-5 * scale)
    np.testing.assert_allclose(
        measured.quadratic.slope_at(_RATES), slope - matrix @ _RATES, atol=2e-5 * scale
    )
    assert measured.quadratic.coupling is None
    assert measured.quadratic.curvature.dtype == jnp.float32
    assert measured.resolved.all()


def _mlp(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"].T @ jnp.ones((2, 4), x.dtype) * params["b"])
    return jnp.mean((jnp.sum(hidden, axis=1) + params["c"] - y) ** 2)


@pytest.mark.parametrize("known", [False, True], ids=["no slope", "slope"])
def test_the_secant_of_a_network_is_its_hessian_to_first_order(known):
    with enable_x64(True):
        params, direction = _three_parts(5, jnp.float64)
        rng = np.random.default_rng(6)
        batch = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.normal(size=16))
        groups = Groups.of(_PARTS, params)
        slope, matrix = _along(lambda p: _mlp(p, batch), params, direction, groups)
        errors = []
        for scale in (0.02, 0.005):
            rates = scale * _RATES
            measured = hd.paper.secant().estimate(
                StepLoss(lambda p: _mlp(p, batch), params, direction, groups),
                rates,
                slope=slope if known else None,
            )
            exact = np.asarray(matrix) @ np.asarray(rates, float) / np.asarray(rates, float)
            found = np.asarray(measured.quadratic.curvature, float)
            errors.append(np.abs(found - exact).max() / np.abs(exact).max())
        assert errors[1] < 0.05
        assert 3 < errors[0] / errors[1] < 5  # a quarter of the step, a quarter of the error


def test_the_secant_of_a_group_without_a_slope_is_not_resolved_and_is_zero():
    params, direction = _three_parts(0)
    groups = Groups.of(_PARTS, params)
    measured = hd.paper.secant().estimate(
        StepLoss(lambda p: jnp.sum(p["b"] ** 2), params, direction, groups), _RATES
    )
    assert measured.resolved.tolist() == [False, True]
    assert measured.quadratic.curvature[0] == 0


def test_a_loss_without_a_gradient_is_refused_by_the_secant():
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    tx = hd.paper.one_step(_looping_loss, {"w": "w", "v": "v"}, curvature=hd.paper.secant())
    with pytest.raises(ValueError, match=r"secant\(\) needs a differentiable loss"):
        tx.update(params, tx.init(params), params, batch=jnp.int32(3), grad=params)


# hessian and gauss_newton


def _network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def _cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def _entropy(params, batch):
    return _cross_entropy(_network(params, batch), batch)


_RNG = np.random.default_rng(0)
_DATA = {
    "x": jnp.asarray(_RNG.normal(size=(16, 5)), jnp.float32),
    "y": jnp.asarray(_RNG.integers(0, 3, 16), jnp.int32),
}
_SHAPES = {"w1": (5, 7), "b1": (7,), "w2": (7, 3), "b2": (3,)}
_NET = {k: jnp.asarray(_RNG.normal(size=s) / 2, jnp.float32) for k, s in _SHAPES.items()}
_DIRECTION = {k: jnp.asarray(_RNG.normal(size=s), jnp.float32) for k, s in _SHAPES.items()}
_NET_LABELS = {"w1": "body", "b1": "bias", "w2": "head", "b2": "bias"}
_NET_GROUPS = Groups.of(_NET_LABELS, _NET)


def _raveled(tree):
    return np.concatenate([np.ravel(tree[name]).astype(float) for name in sorted(tree)])


def _split_direction():
    """(K, d): the direction of each group, zero elsewhere."""
    rows = []
    for name in _NET_GROUPS.names:
        mine = {k: u * float(_NET_LABELS[k] == name) for k, u in _DIRECTION.items()}
        rows.append(_raveled(mine))
    return np.stack(rows)


def _full_matrix(fn):
    """The Hessian of a function of params as one (d, d) matrix."""
    blocks = jax.hessian(fn)(_NET)
    sizes = {k: int(np.prod(s)) for k, s in _SHAPES.items()}
    names = sorted(_SHAPES)
    return np.block(
        [[np.reshape(blocks[a][b], (sizes[a], sizes[b])) for b in names] for a in names]
    )


def _expected(matrix):
    directions = _split_direction()
    return directions @ matrix @ directions.T


def _gauss_newton_matrix():
    jacobian = jax.jacobian(lambda p: _network(p, _DATA))(_NET)
    columns = [np.reshape(jacobian[name], (16 * 3, -1)) for name in sorted(_SHAPES)]
    outer = jax.hessian(lambda out: _cross_entropy(out, _DATA))(_network(_NET, _DATA))
    stacked = np.concatenate(columns, axis=1).astype(float)
    return stacked.T @ np.reshape(outer, (48, 48)) @ stacked


def _matrix(quadratic):
    return np.asarray(quadratic.coupling) + np.diag(quadratic.curvature)


def _measure(estimator, **kwargs):
    rates = jnp.full(len(_NET_GROUPS), 0.1)
    step_loss = StepLoss(lambda p: _entropy(p, _DATA), _NET, _DIRECTION, _NET_GROUPS)
    return estimator.estimate(step_loss, rates, batch=_DATA, **kwargs)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_hessian_is_that_of_jax_along_the_group_steps(batch_size):
    measured = _measure(hd.paper.hessian(batch_size))
    expected = _expected(_full_matrix(lambda p: _entropy(p, _DATA)))
    np.testing.assert_allclose(_matrix(measured.quadratic), expected, rtol=1e-3, atol=1e-4)
    gradient = _raveled(jax.grad(_entropy)(_NET, _DATA))
    np.testing.assert_allclose(
        measured.quadratic.slope, -_split_direction() @ gradient, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_gauss_newton_is_that_of_the_jacobian_and_positive(batch_size):
    measured = _measure(hd.paper.gauss_newton(_network, _cross_entropy, batch_size))
    found = _matrix(measured.quadratic)
    np.testing.assert_allclose(found, _expected(_gauss_newton_matrix()), rtol=1e-3, atol=1e-4)
    assert np.linalg.eigvalsh(found).min() > -1e-4
    gradient = _raveled(jax.grad(_entropy)(_NET, _DATA))
    np.testing.assert_allclose(
        measured.quadratic.slope, -_split_direction() @ gradient, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    "estimator",
    [hd.paper.hessian(), hd.paper.gauss_newton(_network, _cross_entropy)],
    ids=["H", "GN"],
)
def test_a_known_slope_is_taken_as_it_is(estimator):
    slope = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(_measure(estimator, slope=slope).quadratic.slope, slope)


def test_gauss_newton_can_be_checked_against_the_loss():
    hd.paper.gauss_newton(_network, _cross_entropy).check(_entropy, _NET, _DATA)
    other = hd.paper.gauss_newton(_network, lambda out, batch: 2 * _cross_entropy(out, batch))
    with pytest.raises(ValueError, match="that of another function"):
        other.check(_entropy, _NET, _DATA)
