"""What `hessian` and `gauss_newton` refuse, and that refusing says why."""

import jax
import jax.numpy as jnp
import pytest

import hidlr_optax as hd

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
    tx = hd.hidlr(_looping_loss, "all", curvature=curvature)
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
