"""Many devices: what is moved between them, and two processes that train together."""

import functools
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worker
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import promoting

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


def _tx(hidlr):
    if not hidlr:
        return promoting("standard", optax.adamw(1e-2))
    rule = hd.hidlr(_loss, _labels, update_interval=3)
    return optax.chain(promoting("standard", optax.adamw(1.0)), rule)


def _step(tx, params, state, batch, **static):
    value, grad = jax.value_and_grad(_loss)(params, batch)
    known = {"batch": batch, "value": value, "grad": grad} | static
    updates, state = optax.with_extra_args_support(tx).update(grad, state, params, **known)
    return optax.apply_updates(params, updates), state


def _mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def _placed(fsdp):
    """Parameters, sharded by their rows or not at all, and where batches go."""
    mesh = _mesh()
    rows = NamedSharding(mesh, PartitionSpec("x"))
    kernels = rows if fsdp else NamedSharding(mesh, PartitionSpec())
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = {"kernel": kernels, "bias": everywhere}
    return {name: jax.device_put(layer, shardings) for name, layer in _params().items()}, rows


def _gathered(fsdp, hidlr, **static):
    """Numbers that each all-gather of the compiled step puts together."""
    params, rows = _placed(fsdp)
    batch = jax.device_put(_batch(jax.random.key(1)), rows)
    tx = _tx(hidlr)
    state = jax.jit(tx.init)(params)
    step = jax.jit(functools.partial(_step, tx, **static))
    text = step.lower(params, state, batch).compile().as_text()
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


@pytest.mark.parametrize("static", [{}, {"refresh": False}], ids=["refresh", "between"])
def test_data_parallel_steps_gather_nothing(optimized, static):
    del optimized
    assert _gathered(fsdp=False, hidlr=False) == []
    assert _gathered(fsdp=False, hidlr=True, **static) == []


def test_fsdp_gathers_parameters_for_forward_and_backward_passes_alone(optimized):
    del optimized
    base = _gathered(fsdp=True, hidlr=False)
    assert base  # a forward pass needs whole kernels
    # The step between refreshes moves what AdamW's does.
    assert sorted(_gathered(fsdp=True, hidlr=True, refresh=False)) == sorted(base)
    # A refresh has one evaluation more, forwards and backwards; no gather is of anything but a
    # kernel.
    refresh = _gathered(fsdp=True, hidlr=True)
    assert set(refresh) <= set(base)
    assert len(refresh) <= len(base) + 2 * 3


@pytest.mark.parametrize("fsdp", [False, True])
def test_rates_are_those_of_one_device_and_shardings_stay(fsdp):
    params, rows = _placed(fsdp)
    before = jax.tree.map(lambda leaf: leaf.sharding, params)
    tx, alone = _tx(hidlr=True), _params()
    state, alone_state = jax.jit(tx.init)(params), tx.init(alone)
    step = jax.jit(functools.partial(_step, tx))
    for key in jax.random.split(jax.random.key(2), 30):
        batch = _batch(key)
        params, state = step(params, state, jax.device_put(batch, rows))
        alone, alone_state = step(alone, alone_state, batch)
    rates, expected = (optax.tree.get(s, "group_learning_rates") for s in (state, alone_state))
    for name in expected:
        # Devices add in another order.
        np.testing.assert_allclose(rates[name], expected[name], rtol=1e-4)
        assert rates[name].sharding.is_fully_replicated
    same = jax.tree.map(
        lambda leaf, old: leaf.sharding.is_equivalent_to(old, leaf.ndim), params, before
    )
    assert all(jax.tree.leaves(same))


def test_two_processes_train_together():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    words = [sys.executable, worker.__file__, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([*words, str(n)], env=environment, **pipes)
        for n in range(worker.PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), printed
    first, second = (re.findall(rb"ENDS (.*)", out)[0].split() for out, _ in printed)
    assert first == second  # to the last bit
    with jax.numpy_dtype_promotion("standard"):  # Optax's AdamW is not written strictly
        alone = worker.train(jnp.asarray, lambda batch: batch)
    np.testing.assert_allclose([float(x) for x in first], alone, rtol=1e-5)
