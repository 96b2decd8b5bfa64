"""Probes that are spread over an axis of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import enable_x64, promoting

import hidlr_optax as hd

WIDTH = 64


def _params():
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = {"first": (16, WIDTH), "second": (WIDTH, WIDTH), "head": (WIDTH, 8)}
    return {
        name: {
            "kernel": jax.random.normal(key, size) / np.sqrt(size[0]),
            "bias": jnp.zeros(size[1]),
        }
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def _loss(params, batch):
    x, y = batch
    for name in ("first", "second", "head"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "head" else jnp.tanh(x)
    return jnp.mean((x - y) ** 2)


def _batch(key, size=64):
    x = jax.random.normal(key, (size, 16))
    return x, jnp.sin(x[:, :8])


def _labels(params):
    return {name: name for name in params}


def _step(tx, params, state, batch, **static):
    value, grad = jax.value_and_grad(_loss)(params, batch)
    known = {"batch": batch, "value": value, "grad": grad} | static
    updates, state = optax.with_extra_args_support(tx).update(grad, state, params, **known)
    return optax.apply_updates(params, updates), state


def _mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


_axis_types = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def _probing(sharding, **keywords):
    estimator = hd.paper.probes(sharding=sharding, **keywords)
    rule = hd.paper.one_step(_loss, _labels, curvature=estimator, update_interval=1)
    return optax.chain(promoting("standard", optax.adamw(1.0)), rule)


def _flops(step, *known):
    """Of one device."""
    return jax.jit(step).lower(*known).compile().cost_analysis()["flops"]


@_axis_types
def test_probes_over_a_mesh_axis_divide_their_work(axis_type):
    known = _params(), _batch(jax.random.key(1))

    def flops(sharding, params, batch):
        tx = _probing(sharding, per_group=8)
        return _flops(functools.partial(_step, tx), params, jax.jit(tx.init)(params), batch)

    forward, alone = _flops(_loss, *known), flops(None, *known)
    for count in (2, 4, 8):  # the other axis repeats them
        mesh = jax.make_mesh((count, 8 // count), ("probes", "copies"), axis_types=(axis_type,) * 2)
        spread, everywhere = (NamedSharding(mesh, PartitionSpec(*x)) for x in (("probes",), ()))
        with jax.set_mesh(mesh):
            shared = flops(spread, *jax.device_put(known, everywhere))
        saved = 24 * (1 - 1 / count)  # forward passes
        np.testing.assert_allclose(alone - shared, saved * forward, rtol=0.1)


@_axis_types
@pytest.mark.parametrize("design", ["axis", "gaussian"])
def test_probes_over_a_mesh_axis_find_the_same_rates(axis_type, design):
    """In float64: differences of losses would amplify the rounding of sums in another order."""
    mesh = jax.make_mesh((2, 4), ("data", "probes"), axis_types=(axis_type,) * 2)
    spread = NamedSharding(mesh, PartitionSpec("probes"))  # six probes on four devices

    def rates(sharding, everywhere, rows):
        wide = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float64))
        tx, params = _probing(sharding, design=design), jax.device_put(wide(_params()), everywhere)
        state, step = jax.jit(tx.init)(params), jax.jit(functools.partial(_step, tx))
        for key in jax.random.split(jax.random.key(2), 10):
            params, state = step(params, state, jax.device_put(wide(_batch(key)), rows))
        return optax.tree.get(state, "group_learning_rates")

    with enable_x64():
        expected = rates(None, None, None)
        with jax.set_mesh(mesh):
            placed = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
            found = rates(spread, *placed)
    for name, rate in expected.items():
        np.testing.assert_allclose(found[name], rate, rtol=1e-4)


def test_a_sharding_of_probes_is_one_of_rows():
    mesh = _mesh()
    rows = NamedSharding(mesh, PartitionSpec("x"))
    wrong = [PartitionSpec("x"), jax.sharding.SingleDeviceSharding(jax.devices()[0])]
    wrong += [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None,), (None, "x"))]
    for sharding in wrong:
        with pytest.raises(ValueError, match=r"NamedSharding\(mesh, PartitionSpec\(axis\)\)"):
            hd.paper.probes(sharding=sharding)
    with pytest.raises(ValueError, match="all at once"):
        hd.paper.probes(batch_size=2, sharding=rows)
