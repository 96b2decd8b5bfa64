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
from contract import assert_all_equal, leaf_types, mixed, parabola, rosenbrock, train_step
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paper_kit import bare
from support import enable_x64, promoting

import hidlr_optax as hd


def _adam():
    return promoting("standard", optax.adam(1.0))


_UNDER_TEST = {
    "one_step": hd.paper.one_step,
    "one_probe_in_turn": functools.partial(
        hd.paper.one_step, slope="gradient", curvature=hd.paper.probes(per_group=1, batch_size=1)
    ),
    "paper": hd.paper.paper_hidlr,
}
_every_rule = pytest.mark.parametrize("rule", _UNDER_TEST.values(), ids=_UNDER_TEST.keys())


# What every caller may do.


@_every_rule
def test_unexpected_keywords_are_ignored_and_a_second_call_compiles_nothing(rule, caplog):
    target = rosenbrock()
    traces = []

    def counted_loss(params):
        traces.append(params)
        return target.loss(params)

    tx = optax.chain(optax.sgd(1.0), rule(None, target.labels, update_interval=1))
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


@_every_rule
@pytest.mark.parametrize(
    "labels", [("vector", "matrix"), lambda params: ("vector", "matrix")], ids=["tree", "callable"]
)
def test_map_params_leaves_the_state_as_it_is(rule, labels):
    target = mixed()
    tx = optax.chain(optax.sgd(1.0, momentum=0.9), rule(None, labels))
    state = tx.init(target.initial)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert_all_equal(doubled[0][0].trace, jax.tree.map(jnp.ones_like, target.initial))
    # Of ours, the direction that "lagged" stores is like params; nothing else is.
    direction = jax.tree.map(jnp.ones_like, state[-1].direction)
    assert_all_equal(doubled[-1], state[-1]._replace(direction=direction))


# Types: of updates, and of the state.


@_every_rule
def test_updates_have_the_dtype_of_params(rule):
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = rule(None, "all")

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
    tx = bare(None, {name: name for name in dtypes})
    direction = jax.tree.map(jnp.negative, grad)
    updates, _ = tx.update(direction, tx.init(params), params, value_fn=loss, grad=grad)
    assert {name: leaf.dtype for name, leaf in updates.items()} == dtypes


@_every_rule
def test_multi_steps_emits_zeros_until_the_last_mini_step(rule):
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = optax.MultiSteps(promoting("strict", rule(None, "all")), every_k_schedule=2)
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


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (hd.paper.one_step, "float16"),
        (hd.paper.one_step, "bfloat16"),
        (hd.paper.one_step, "float32"),
        *((rule, "float64") for rule in _UNDER_TEST.values()),
    ],
)
def test_the_state_keeps_its_types_whatever_the_dtypes_around_it(rule, dtype):
    with enable_x64(dtype == "float64"):
        target = parabola(dtype)
        tx = optax.chain(optax.sgd(1.0), rule(None, target.labels))
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
        # The direction that "lagged" stores is like params, all else is of one type.
        others = leaf_types(state[-1]._replace(direction=()))
        assert not any(weak or kind not in (jnp.int32, jnp.float32) for _, kind, weak in others)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state[-1].direction))
        for _ in range(2):
            params, state = step(params, state, jnp.asarray(True))
            assert params.dtype == dtype
            assert leaf_types(state) == types


def test_float64_parameters_are_fitted_in_float64():
    with enable_x64(True):
        target = parabola("float64")
        # At a rate of 1e-6, the curvature moves the loss by 1e-11 of itself.
        tx = bare(None, "all", init_learning_rate=1e-6, slope="probes")
        grad = jax.grad(target.loss)(target.initial)
        state = tx.init(target.initial)
        _, state = tx.update(-grad, state, target.initial, value_fn=target.loss)
        assert state.diagnostics.kept["all"] == hd.Kept.UPDATED
        vertex = state.diagnostics.slope["all"] / state.diagnostics.curvature["all"]
        np.testing.assert_allclose(vertex, 0.5, rtol=1e-3)


# Where the state lives.


@_every_rule
def test_init_needs_shapes_alone(rule):
    concrete = mixed().initial
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), concrete)
    tx = rule(None, ("vector", "matrix"))
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
@_every_rule
def test_sharded_params_do_not_change_the_types_of_the_state(rule):
    mesh, ones = _explicitly_sharded()
    with jax.set_mesh(mesh):
        params = ones(jnp.float16)
        tx = rule(None, "all", init_learning_rate=0.1)
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
        tx = bare(None, "all", init_learning_rate=0.1)
        update = functools.partial(tx.update, value_fn=_mean_square)
        eager, jitted = tx.init(params), jax.jit(tx.init)(params)
        assert jax.tree.map(jax.typeof, jitted) == jax.tree.map(jax.typeof, eager)
        eager, jitted = (f(-params, eager, params)[1] for f in (update, jax.jit(update)))
        assert jax.tree.map(jax.typeof, jitted) == jax.tree.map(jax.typeof, eager)
