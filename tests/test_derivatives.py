"""`secant` against the Hessian, and what estimators with derivatives refuse, saying why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import counted, coupled_hidlr, enable_x64

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
    tx = coupled_hidlr(_looping_loss, "all", curvature=curvature)
    return tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=jnp.int32(3), grad=_PARAMS)


def test_a_loss_without_second_derivatives_is_refused_by_the_hessian_and_taken_by_probes():
    with pytest.raises(ValueError, match=r"hessian\(\) needs a twice differentiable loss"):
        _update(hd.hessian())
    updates, _ = _update(hd.probes())
    assert jnp.all(jnp.isfinite(updates["w"]))


def test_a_model_without_forward_derivatives_is_refused_by_gauss_newton():
    estimator = hd.gauss_newton(_callback_model, lambda outputs, batch: jnp.sum(outputs))
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
    estimator = hd.gauss_newton(lambda params, batch: params["w"], output_loss)
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
    measured = hd.secant().estimate(
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
            measured = hd.secant().estimate(
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
    measured = hd.secant().estimate(
        StepLoss(lambda p: jnp.sum(p["b"] ** 2), params, direction, groups), _RATES
    )
    assert measured.resolved.tolist() == [False, True]
    assert measured.quadratic.curvature[0] == 0


def test_a_loss_without_a_gradient_is_refused_by_the_secant():
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    tx = hd.hidlr(_looping_loss, {"w": "w", "v": "v"})
    with pytest.raises(ValueError, match=r"secant\(\) needs a differentiable loss"):
        tx.update(params, tx.init(params), params, batch=jnp.int32(3), grad=params)
