"""What Optax asks of every contributed transformation, asked of ours.

The tests follow Optax's own `contrib/_common_test.py` and `_src/sharding_test.py` (Copyright
DeepMind Technologies Limited, Apache-2.0), rewritten for a transformation that needs a loss.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    assert_all_equal,
    leaf_types,
    matrix,
    mixed,
    parabola,
    rosenbrock,
    rosenbrock_in_one_group,
    train_step,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import enable_x64, promoting

import hidlr_optax as hd


def _adam():
    return promoting("standard", optax.adam(1.0))


# What every caller may do.


def test_unexpected_keywords_are_ignored_and_a_second_call_compiles_nothing(caplog):
    target = rosenbrock()
    traces = []

    def counted_loss(params):
        traces.append(params)
        return target.loss(params)

    tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, target.labels, update_interval=1))
    step = jax.jit(train_step(tx, counted_loss, some_argument_it_does_not_expect=1))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        params, state = step(target.initial, tx.init(target.initial))
        assert traces
        assert "XLA compilation of jit(step)" in caplog.text
        traces.clear()
        caplog.clear()
        step(params, state)
        assert not traces
        assert "ompil" not in caplog.text


@pytest.mark.parametrize(
    ("direction", "target"),
    [
        (optax.sgd(1.0), parabola),
        (optax.sgd(1.0), matrix),
        (optax.sgd(1.0), mixed),
        (optax.sgd(1.0), rosenbrock),
        (optax.sgd(1.0), rosenbrock_in_one_group),
        (_adam(), parabola),
        (_adam(), matrix),
        (_adam(), mixed),
        (_adam(), rosenbrock),
        (_adam(), rosenbrock_in_one_group),
    ],
)
def test_training_converges_with_nothing_tuned_but_the_direction(direction, target):
    target = target()
    tx = optax.chain(direction, hd.hidlr(None, target.labels))
    step = train_step(tx, target.loss)

    @jax.jit
    def train(params, state):
        def body(carry, _):
            return step(*carry), None

        return jax.lax.scan(body, (params, state), length=5_000)[0]

    params, _ = train(target.initial, tx.init(target.initial))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-2), params, target.final)


_LOSS_AND_LABELS = ("loss_fn", "param_labels")


@pytest.mark.parametrize(
    ("factory", "kwargs", "also_static"),
    [
        pytest.param(
            hd.hidlr,
            {"update_interval": 2, "init_learning_rate": {"x": 1e-2, "y": 1e-3}},
            (),
            id="rates",
        ),
        pytest.param(
            hd.hidlr, {"schedule": optax.linear_schedule(1.0, 0.0, 9)}, ("schedule",), id="schedule"
        ),
    ],
)
def test_inject_hyperparams_changes_nothing(factory, kwargs, also_static):
    target = rosenbrock()

    def two_steps(factory):
        tx = factory(None, target.labels, **kwargs)
        step = jax.jit(train_step(optax.chain(optax.scale(-1.0), tx), target.loss))
        first = step(target.initial, (optax.EmptyState(), jax.jit(tx.init)(target.initial)))
        params, (_, state) = step(*first)
        return params, state

    inject = optax.inject_hyperparams(factory, (*_LOSS_AND_LABELS, *also_static))
    params, state = two_steps(factory)
    injected_params, injected_state = two_steps(inject)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, injected_params, params)
    jax.tree.map(close, injected_state.inner_state, state)


def test_inject_hyperparams_changes_nothing_without_jit():
    target = parabola()
    plain = hd.hidlr(None, "all")
    injected = optax.inject_hyperparams(hd.hidlr, _LOSS_AND_LABELS)(None, "all")
    grad = jax.grad(target.loss)(target.initial)

    def first_update(tx):
        state = tx.init(target.initial)
        return tx.update(-grad, state, target.initial, value_fn=target.loss, grad=grad)

    updates, state = first_update(plain)
    injected_updates, injected_state = first_update(injected)
    assert_all_equal(injected_updates, updates)
    assert_all_equal(injected_state.inner_state, state)


def test_inject_hyperparams_takes_hiulr():
    target = parabola()
    tx = optax.inject_hyperparams(hd.hiulr, "loss_fn")(None)
    state = tx.init(target.initial)
    assert set(state.inner_state.group_learning_rates) == {"all"}


@pytest.mark.parametrize(
    "labels", [("vector", "matrix"), lambda params: ("vector", "matrix")], ids=["tree", "callable"]
)
def test_map_params_leaves_the_state_as_it_is(labels):
    target = mixed()
    tx = optax.chain(optax.sgd(1.0, momentum=0.9), hd.hidlr(None, labels))
    state = tx.init(target.initial)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert_all_equal(doubled[0][0].trace, jax.tree.map(jnp.ones_like, target.initial))
    # Of ours, the stored direction is like params; nothing else is.
    direction = jax.tree.map(jnp.ones_like, state[-1].direction)
    assert_all_equal(doubled[-1], state[-1]._replace(direction=direction))


# Types: of updates, and of the state.


def test_updates_have_the_dtype_of_params():
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = hd.hidlr(None, "all")

    def loss(params):
        return jnp.sum(params**2)

    value, grad = jax.value_and_grad(loss)(params)
    state = jax.jit(tx.init)(params)
    update = functools.partial(tx.update, value_fn=loss)
    updates, _ = jax.jit(update)(-grad, state, params, value=value, grad=grad)
    assert updates.dtype == params.dtype


def test_each_leaf_keeps_its_own_dtype():
    dtypes = {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.float32}
    params = {name: jnp.ones(2, dtype) for name, dtype in dtypes.items()}

    def loss(params):
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in params.values())

    grad = jax.grad(loss)(params)
    tx = hd.hidlr(None, {name: name for name in dtypes})
    direction = jax.tree.map(jnp.negative, grad)
    updates, _ = tx.update(direction, tx.init(params), params, value_fn=loss, grad=grad)
    assert {name: leaf.dtype for name, leaf in updates.items()} == dtypes


def test_multi_steps_emits_zeros_until_the_last_mini_step():
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = optax.MultiSteps(promoting("strict", hd.hidlr(None, "all")), every_k_schedule=2)
    tx = promoting("standard", tx)  # MultiSteps itself multiplies floats by bools

    def loss(params):
        return jnp.sum(params**2)

    value, grad = jax.value_and_grad(loss)(params)
    update = jax.jit(functools.partial(tx.update, value_fn=loss))
    state = jax.jit(tx.init)(params)
    first, state = update(-grad, state, params, value=value, grad=grad)
    second, _ = update(-grad, state, params, value=value, grad=grad)
    np.testing.assert_array_equal(first, jnp.zeros_like(params))
    assert np.all(np.asarray(second) < 0)
    assert first.dtype == second.dtype == params.dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_state_keeps_its_types_whatever_the_dtypes_around_it(dtype):
    with enable_x64(dtype == "float64"):
        target = parabola(dtype)
        tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, target.labels))
        confusing = jnp.bfloat16 if dtype == "float16" else jnp.float16

        @jax.jit
        def step(params, state, go):
            value, grad = jax.value_and_grad(target.loss)(params)

            def update():
                return tx.update(
                    grad,
                    state,
                    params,
                    value_fn=target.loss,
                    value=value.astype(confusing),
                    grad=grad,
                )

            # The branches of a cond must agree in every type.
            updates, new_state = jax.lax.cond(go, update, lambda: (params, state))
            return optax.apply_updates(params, updates), new_state

        params, state = target.initial, tx.init(target.initial)
        types = leaf_types(state)
        # The stored direction is like params, all else is of two types.
        others = leaf_types(state[-1]._replace(direction=()))
        assert not any(weak or kind not in (jnp.int32, jnp.float32) for _, kind, weak in others)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state[-1].direction))
        for _ in range(2):
            params, state = step(params, state, jnp.asarray(True))
            assert params.dtype == dtype
            assert leaf_types(state) == types


def test_float64_parameters_are_measured_in_float64():
    """The curvature of a step of 1e-4 moves the loss by 4e-8 of itself, less than float32 has."""
    with enable_x64(True):
        target = parabola("float64")
        tx = hd.hidlr(None, "all", init_learning_rate=1e-4, warmup=0, update_interval=1)

        @jax.jit
        def step(params, state):
            value, grad = jax.value_and_grad(target.loss)(params)
            direction = jax.tree.map(jnp.negative, grad)
            updates, state = tx.update(
                direction, state, params, value_fn=target.loss, value=value, grad=grad
            )
            return optax.apply_updates(params, updates), state

        params, state = target.initial, tx.init(target.initial)
        for _ in range(2):
            params, state = step(params, state)
        found = state.diagnostics
        assert found.kept["all"] == hd.Kept.UPDATED
        # u = −2 (p − m), so that b = 4 ‖p − m‖² and a = 8 ‖p − m‖²: the minimum is at ½.
        np.testing.assert_allclose(
            found.measured_slope["all"] / found.measured_curvature["all"], 0.5, rtol=1e-2
        )


# Where the state lives.


def test_init_needs_shapes_alone():
    concrete = mixed().initial
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), concrete)
    tx = hd.hidlr(None, ("vector", "matrix"))
    assert_all_equal(tx.init(abstract), tx.init(concrete))


_sharding_in_types = pytest.mark.skipif(
    jax.__version_info__ < (0, 7, 2), reason="Optax's own tests start at this version as well"
)


def _explicitly_sharded():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    return mesh, lambda dtype: jax.device_put(jnp.ones((2, 8, 4), dtype), sharding)


def _mean_square(params):
    return jnp.mean(params.astype(jnp.float32) ** 2)


@_sharding_in_types
def test_sharded_params_do_not_change_the_types_of_the_state():
    mesh, ones = _explicitly_sharded()
    with jax.set_mesh(mesh):
        params = ones(jnp.float16)
        tx = hd.hidlr(None, "all", init_learning_rate=0.1)
        state = tx.init(params)
        grad = jax.grad(_mean_square)(params)
        update = functools.partial(tx.update, value_fn=_mean_square)
        updates, new_state = update(-grad, state, params, grad=grad)
        assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates) == jax.typeof(params)


@_sharding_in_types
def test_jit_does_not_change_the_types_of_the_state():
    mesh, ones = _explicitly_sharded()
    with jax.set_mesh(mesh):
        params = ones(jnp.float16)
        tx = hd.hidlr(None, "all", init_learning_rate=0.1)
        update = functools.partial(tx.update, value_fn=_mean_square, grad=params)
        eager, jitted = tx.init(params), jax.jit(tx.init)(params)
        assert jax.tree.map(jax.typeof, jitted) == jax.tree.map(jax.typeof, eager)
        eager, jitted = (f(-params, eager, params)[1] for f in (update, jax.jit(update)))
        assert jax.tree.map(jax.typeof, jitted) == jax.tree.map(jax.typeof, eager)


def test_every_field_of_the_state_is_found_by_its_name():
    params = {"w": jnp.ones(3), "b": jnp.ones(())}
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(_square, {"w": "w", "b": "b"}))
    state = tx.init(params)
    for part in (state[-1], state[-1].diagnostics):
        for name in part._fields:
            # `get` raises a KeyError where the state has two of a name.
            found = optax.tree.get(state, name)
            assert jax.tree.structure(found) == jax.tree.structure(getattr(part, name))


def _square(params, batch):
    del batch
    return jnp.sum(params["w"] ** 2) + params["b"] ** 2
