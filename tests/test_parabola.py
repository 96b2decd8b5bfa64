"""`parabola` against the Hessian, and what it does to rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import counted

import hidlr_optax as hd
from hidlr_optax._groups import Groups
from hidlr_optax._step_loss import StepLoss

_PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([0.3, 0.1])}
_LABELS = {"a": "a", "b": "b"}
_DIRECTION = {"a": jnp.array([-1.0, 0.4, 0.2]), "b": jnp.array([0.5, -0.6])}
_RATES = jnp.array([0.2, 0.05])


def _flat(params):
    return jnp.concatenate([params["a"], params["b"]])


def _quadratic(params, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(5, 5))
    matrix = jnp.asarray(root @ root.T, jnp.float32)
    vector = jnp.asarray(rng.normal(size=5), jnp.float32)
    return _flat(params) @ matrix @ _flat(params) / 2 - vector @ _flat(params)


def _estimate(loss, **known):
    groups = Groups.of(_LABELS, _PARAMS)
    step_loss = StepLoss(loss, _PARAMS, _DIRECTION, groups)
    return hd.parabola().estimate(step_loss, _RATES, **known)


@pytest.mark.parametrize("known", [True, False], ids=["slope", "no slope"])
@pytest.mark.parametrize("seed", range(3))
def test_the_joint_curvature_and_slope_of_a_quadratic_are_exact(seed, known):
    groups = Groups.of(_LABELS, _PARAMS)
    counting, calls = counted(_quadratic)

    def along(rates):
        return _quadratic(groups.step(_PARAMS, _DIRECTION, rates), seed)

    slope = -jax.grad(along)(jnp.zeros(2))
    matrix = jax.hessian(along)(jnp.zeros(2))
    given = {"slope": slope, "value": _quadratic(_PARAMS, seed)} if known else {}
    found = _estimate(lambda params: counting(params, seed), **given)
    jax.effects_barrier()
    assert len(calls) == (1 if known else 3)
    curved = found.quadratic.curvature @ _RATES**2
    np.testing.assert_allclose(curved, _RATES @ matrix @ _RATES, rtol=1e-3)
    np.testing.assert_allclose(found.quadratic.slope @ _RATES, slope @ _RATES, rtol=1e-3)
    if known:
        np.testing.assert_allclose(found.quadratic.slope, slope, rtol=1e-6)
    assert found.quadratic.coupling is None
    assert found.resolved.all()


def test_what_all_groups_want_is_one_factor():
    slope = jnp.array([3.0, 0.2])  # both downhill
    found = _estimate(lambda params: jnp.sum(_flat(params) ** 4), slope=slope)
    wanted = found.quadratic.slope / found.quadratic.curvature / _RATES
    np.testing.assert_allclose(wanted[0], wanted[1], rtol=1e-5)


def test_a_loss_that_does_not_change_is_not_resolved():
    found = _estimate(lambda params: jnp.float32(3.0), slope=jnp.zeros(2))
    assert not found.resolved.any()
    assert found.quadratic.curvature.tolist() == [0, 0]


def test_a_loss_that_is_not_finite_is_handed_on():
    found = _estimate(lambda params: jnp.log(-jnp.sum(params["a"] ** 2)), slope=jnp.ones(2))
    assert not np.isfinite(found.quadratic.curvature).any()


def _looping(params, batch):
    """Not differentiable in reverse mode: the number of iterations is data."""

    def step(carry):
        return carry[0] + 1, carry[1] + jnp.sum(_flat(params) ** 2 * jnp.arange(1.0, 6))

    start = jnp.int32(0), jnp.float32(1.0)
    return jax.lax.while_loop(lambda carry: carry[0] < batch, step, start)[1]


def _same(params):
    return 1 + 3 * jnp.sum(_flat(params) ** 2 * jnp.arange(1.0, 6))


def _trained(steps, batch=3, **settings):
    """By plain gradients of the same function, written so that it has them."""
    tx = hd.hidlr(_looping, _LABELS, curvature=hd.parabola(), **settings)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(_same)(params)
        down = jax.tree.map(jnp.negative, grad)
        updates, state = tx.update(
            down, state, params, batch=jnp.int32(batch), value=value, grad=grad
        )
        return jax.tree.map(jnp.add, params, updates), state

    params, state = _PARAMS, tx.init(_PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("slope", ["lagged", "gradient"])
def test_hold_trains_groups_on_a_loss_without_a_gradient_and_keeps_their_proportions(slope):
    asked = {"a": 1e-3, "b": 2e-3}
    params, state = _trained(60, slope=slope, init_learning_rate=asked)
    assert _same(params) < 1 + 1e-3 * (_same(_PARAMS) - 1)
    rates = state.group_learning_rates
    np.testing.assert_allclose(rates["b"] / rates["a"], 2.0, rtol=1e-5)


def test_the_diagonal_solver_goes_to_the_minimum_of_the_joint_parabola():
    settings = {"slope": "gradient", "warmup": 0, "init_learning_rate": 1e-3}
    solver = hd.diagonal(max_change=None)
    _, state = _trained(1, solver=solver, **settings)
    gradient = jax.grad(_same)(_PARAMS)
    best = jnp.sum(_flat(gradient) ** 2) / jnp.sum(_flat(gradient) ** 2 * 6 * jnp.arange(1.0, 6))
    np.testing.assert_allclose(list(state.group_learning_rates.values()), [best] * 2, rtol=2e-2)
