"""What JAX can be asked for around a step: checks of infinities and ranks, gradients, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import enable_x64, promoting, shard_map

import hidlr_optax as hd

_LABELS = {"w": "w", "v": "v"}
_X = jax.random.normal(jax.random.key(0), (16, 4))


def _model(params, x):
    return x @ params["w"] @ params["v"]


def _mean_square(out, x):
    del x
    return jnp.mean((out - 1.0) ** 2)


def _loss(params, x):
    return _mean_square(_model(params, x), x)


def _params():
    keys = jax.random.split(jax.random.key(1))
    return {
        "w": jax.random.normal(keys[0], (4, 8)) / 2,
        "v": jax.random.normal(keys[1], (8, 1)) / 2,
    }


def _one_step(estimator, solver=None, **rule):
    rule = {"slope": "gradient", "update_interval": 1} | rule
    solver = hd.paper.coupled() if solver is None else solver
    return hd.paper.one_step(_loss, _LABELS, curvature=estimator, solver=solver, **rule)


_RULES = {
    "hidlr": lambda: hd.hidlr(_loss, _LABELS, bounds={"w": (None, 1.0)}),
    "hiulr": lambda: hd.hiulr(_loss),
    "paper_hidlr": lambda: hd.paper_hidlr(_loss, _LABELS, update_interval=1),
    "paper_hiulr": lambda: hd.paper.paper_hiulr(_loss, update_interval=1),
    "probes": lambda: _one_step(hd.paper.probes(), slope="lagged"),
    "probes, diagonal": lambda: _one_step(hd.paper.probes(), hd.paper.diagonal()),
    "secant": lambda: _one_step(hd.paper.secant(), slope="lagged"),
    "hessian": lambda: _one_step(hd.paper.hessian(), slope="lagged"),
    "gauss_newton": lambda: _one_step(hd.paper.gauss_newton(_model, _mean_square)),
}


def _trained(rule, steps=3):
    tx = hd.scale_by_label(_LABELS, {"w": 2.0})
    tx = optax.chain(optax.sgd(1.0), tx, rule)
    params = _params()

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(_loss)(params, _X)
        updates, state = tx.update(grad, state, params, batch=_X, value=value, grad=grad)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("rule", _RULES.values(), ids=_RULES.keys())
def test_ranks_are_never_promoted(rule):
    with jax.numpy_rank_promotion("raise"):
        params, state = _trained(rule())
    assert float(_loss(params, _X)) < float(_loss(_params(), _X))
    assert int(hd.metrics(state)["refreshes"]) == 3


@pytest.mark.parametrize("rule", ["hidlr", "paper_hidlr", "probes"])
def test_a_healthy_run_has_no_infinities(rule):
    rule = _RULES[rule]()
    fresh = rule.init(_params())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fresh))
    with jax.debug_infs(True), jax.debug_nans(True):
        _trained(rule)


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_gradients_through_steps_are_those_at_the_rates_that_were_found(derivative):
    """The rates are constants to whoever differentiates: as in a run that is given them."""
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, _LABELS, update_interval=1, warmup=9))

    def through(params):
        state, applied = tx.init(params), []
        for _ in range(3):
            params, state, _ = hd.take_step(tx, _loss, params, state, _X)
            applied.append(hd.report.find_state(state).applied)
        return _loss(params, _X), applied

    found, applied = jax.jit(derivative(through, has_aux=True))(_params())

    def replayed(params):
        for v, w in applied:  # labels in order
            grads = jax.grad(_loss)(params, _X)
            steps = {"w": w * grads["w"], "v": v * grads["v"]}
            params = jax.tree.map(jnp.subtract, params, steps)
        return _loss(params, _X)

    expected = jax.jit(jax.grad(replayed))(_params())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), found, expected)


_AIM = 1.0 + 2.0j


def _complex_loss(params, x):
    dtype = params["z"].dtype
    away = x.astype(dtype) @ params["z"] - jnp.asarray(_AIM, dtype)
    return jnp.mean(jnp.abs(away) ** 2) + params["r"] ** 2


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("rule", ["hidlr", "probes", "secant", "hessian"])
def test_complex_parameters_train_in_double_precision(dtype, rule):
    with enable_x64(True):
        real = jnp.zeros((), dtype).real.dtype
        params = {"z": jnp.ones(4, dtype), "r": jnp.ones((), real)}
        labels = {"z": "z", "r": "r"}
        rules = {"hidlr": hd.hidlr(None, labels)}
        for name in ("probes", "secant", "hessian"):
            estimator = getattr(hd.paper, name)()
            rules[name] = hd.paper.one_step(None, labels, curvature=estimator, slope="lagged")
        tx = optax.chain(optax.sgd(1.0), rules[rule])
        x = jax.random.normal(jax.random.key(0), (16, 4), real)
        state = tx.init(params)
        step = jax.jit(lambda *now: hd.take_step(tx, _complex_loss, *now, x))
        losses = []
        for _ in range(40):
            params, state, loss = step(params, state)
            losses.append(float(loss))
        assert params["z"].dtype == dtype
        assert losses[-1] < 0.6 * losses[0]
        assert int(hd.metrics(state)["slips"]) == 0


# Many devices under pmap.


def _data(devices=4):
    return jax.random.normal(jax.random.key(3), (devices, 16, 4))


def _replicated(tree, devices=4):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), tree)


def _adam():
    return promoting("standard", optax.adam(1.0))


def _take_step(params, state, batch):
    tx = optax.chain(_adam(), hd.hidlr(None, _LABELS))
    return hd.take_step(tx, hd.pmean_loss(_loss, "d"), params, state, batch)


def _wrapper_step(params, state, batch):
    """The loop that everybody has, and hessian_informed in it."""
    tx = hd.hessian_informed(_adam(), hd.pmean_loss(_loss, "d"), _LABELS)
    loss, grads = jax.lax.pmean(jax.value_and_grad(_loss)(params, batch), "d")
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state, loss


def _shard_mapped(step):
    """Under shard_map as pmap is: nothing is checked."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")

    def one(*arguments):
        out = step(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], out)

    return jax.jit(shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@pytest.mark.parametrize("step", [_take_step, _wrapper_step])
@pytest.mark.parametrize("over", [lambda step: jax.pmap(step, "d"), _shard_mapped])
def test_replicas_stay_alike_and_train_as_one_device_does(step, over):
    tx = optax.chain(_adam(), hd.hidlr(None, _LABELS))
    params, state = _replicated((_params(), tx.init(_params())))
    together = over(step)
    for _ in range(6):
        params, state, loss = together(params, state, _data())
    for leaf in jax.tree.leaves((params, state, loss)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    alone, alone_state = _params(), tx.init(_params())
    one = jax.jit(lambda *now: hd.take_step(tx, _loss, *now, _data().reshape(-1, 4)))
    for _ in range(6):
        alone, alone_state, _ = one(alone, alone_state)
    first = jax.tree.map(lambda leaf: leaf[0], params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-3), first, alone)


def test_a_schedule_free_base_is_refused():
    base = optax.contrib.schedule_free_sgd(1.0)
    with pytest.raises(ValueError, match=r"keeps parameters of its own.*averaging"):
        hd.hessian_informed(base, _loss, _LABELS).init(_params())
