"""`hessian_informed`: `hidlr` around a base optimizer, against the chain with `hidlr` behind it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import enable_x64, promoting

import hidlr_optax as hd

_LABELS = {"w": "body", "v": "head", "b": "head"}
_RULE = {"update_interval": 2, "warmup": 3, "schedule": optax.linear_schedule(1.0, 0.5, 8)}


def _adamw():
    return promoting("standard", optax.adamw(1.0))


def _network(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"] - y) ** 2)


def _params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "w": jax.random.normal(keys[0], (4, 8)) / 2,
        "v": jax.random.normal(keys[1], (8,)) / 2,
        "b": jnp.zeros(()),
    }


def _batches(count):
    x = jax.random.normal(jax.random.key(2), (count, 32, 4))
    return list(zip(x, jnp.sin(jnp.sum(x, axis=-1)), strict=True))


def _trained(tx, steps=8, **known):
    """Parameters and state after some steps; `known` adds keywords to those of the update."""

    @jax.jit
    def step(params, state, batch):
        value, grad = jax.value_and_grad(_network)(params, batch)
        more = {name: make(grad) for name, make in known.items()}
        updates, state = tx.update(grad, state, params, batch=batch, value=value, **more)
        return optax.apply_updates(params, updates), state

    params = _params()
    state = tx.init(params)
    for batch in _batches(steps):
        params, state = step(params, state, batch)
    return params, state


def _assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


_BASES = {
    "adamw": _adamw,
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), _adamw()),
    "partition": lambda: optax.partition(
        {"body": promoting("standard", optax.adam(1.0)), "head": optax.sgd(1.0)}, _LABELS
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.clip(0.01), {"w": True, "v": False, "b": False}), optax.sgd(1.0)
    ),
}


@pytest.mark.parametrize("base", _BASES.values(), ids=_BASES.keys())
def test_it_is_the_chain_to_the_last_bit(base):
    wrapped = hd.hessian_informed(base(), _network, _LABELS, **_RULE)
    chained = optax.chain(base(), hd.hidlr(_network, _LABELS, **_RULE))
    _assert_same(_trained(wrapped), _trained(chained, grad=lambda grad: grad))


def test_it_has_the_arguments_and_defaults_of_hidlr():
    def keywords(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    assert keywords(hd.hessian_informed) == keywords(hd.hidlr)


def test_a_gradient_that_was_edited_before_gives_way_to_the_raw_one():
    """Clipped outside of it, the incoming gradient is not that of the loss."""
    tx = hd.hessian_informed(optax.sgd(1.0), _network, _LABELS, **_RULE)
    batch, params = _batches(1)[0], _params()
    grad = jax.grad(_network)(params, batch)
    clipped = jax.tree.map(lambda leaf: leaf / 10, grad)
    update = jax.jit(functools.partial(tx.update, batch=batch))
    _, state = update(clipped, tx.init(params), params, grad=grad)
    inner = hd.hidlr(_network, _LABELS, **_RULE)
    down = jax.tree.map(jnp.negative, clipped)
    _, expected = jax.jit(functools.partial(inner.update, batch=batch, grad=grad))(
        down, inner.init(params), params
    )
    _assert_same(state[-1], expected)


def test_take_step_and_accumulation_take_it_as_it_is():
    tx = hd.multi_steps(hd.hessian_informed(_adamw(), None, _LABELS, warmup=2), 2)
    tx = promoting("standard", tx)
    step = jax.jit(lambda *now: hd.take_step(tx, _network, *now))
    params, losses = _params(), []
    state = tx.init(params)
    for batch in _batches(1) * 40:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert int(hd.metrics(state)["refreshes"]) >= 3


def test_of_complex_parameters_the_gradient_comes_in_conjugated():
    """As Optax has it. The loss is a parabola whose minimum is one step of rate ½ away."""
    with enable_x64(True):
        aim = jnp.array([1.0 + 2.0j, -1.0j])

        def loss(params, batch):
            del batch
            return jnp.sum(jnp.abs(params["z"] - aim) ** 2)

        tx = hd.hessian_informed(optax.sgd(1.0), loss, "all")
        params = {"z": jnp.zeros(2, jnp.complex128)}
        update, state = jax.jit(functools.partial(tx.update, batch=0)), tx.init(params)
        for _ in range(2):
            grads = jax.tree.map(jnp.conj, jax.grad(loss)(params, None))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        found = hd.metrics(state)
        # Of the first step: u = 2 (aim − z), so that b = 4 |aim|² = 24 and a = 8 |aim|² = 48.
        np.testing.assert_allclose(found["slope/all"], 24.0, rtol=1e-4)
        np.testing.assert_allclose(found["curvature/all"], 48.0, rtol=1e-4)


def test_map_params_finds_what_is_like_params():
    tx = hd.hessian_informed(optax.sgd(1.0, momentum=0.9), _network, _LABELS)
    state = tx.init(_params())
    moved = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    _assert_same(moved[0][0].trace, jax.tree.map(jnp.ones_like, _params()))
    assert int(moved[-1].count) == 0


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (optax.adamw, r"such as optax\.adamw\(1\.0\); got the function adamw"),
        (_network, r"takes the optimizer first.*got the function _network"),
        (1e-3, "got float"),
        (optax.MultiSteps(optax.sgd(1.0), 2), r"put accumulation around, hd\.multi_steps"),
    ],
)
def test_what_is_no_optimizer_is_refused(base, message):
    with pytest.raises(ValueError, match=message):
        hd.hessian_informed(base, _network, _LABELS)


def test_accumulation_inside_is_refused():
    inside = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"put accumulation around, hd\.multi_steps"):
        hd.hessian_informed(inside, _network, _LABELS).init(_params())


def test_a_second_hidlr_inside_is_refused():
    base = optax.chain(optax.sgd(1.0), hd.hiulr(_network))
    with pytest.raises(ValueError, match="base has a hidlr of its own"):
        hd.hessian_informed(base, _network, _LABELS).init(_params())
