"""A run that is killed goes on where it was, on other devices too; other groups are refused."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support import promoting

import hidlr_optax as hd

_EVERY = 5  # steps between checkpoints
_KILLED = 23  # not before this step: past the first twenty, at which every step has a refresh
_STEPS = 43
_LABELS = {"w": "body", "v": "head", "b": "bias"}


def _loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"] - y) ** 2)


def _tx(labels=_LABELS):
    return optax.chain(promoting("standard", optax.adamw(1.0)), hd.hidlr(_loss, labels))


def _start(labels=_LABELS):
    """Parameters and state before the first step."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w": jax.random.normal(keys[0], (4, 8)) / 2,
        "v": jax.random.normal(keys[1], (8,)) / 2,
        "b": jnp.zeros(()),
    }
    return params, _tx(labels).init(params)


def _batch(n):
    x = jax.random.normal(jax.random.key(n), (32, 4))
    return x, jnp.sin(jnp.sum(x, axis=-1))


@functools.cache
def _step():
    @jax.jit
    def step(carry, n):
        return hd.take_step(_tx(), _loss, *carry, _batch(n))[:2]

    return step


def _continued(carry, begin, end=_STEPS):
    for n in range(begin, end):
        carry = _step()(carry, n)
    return carry


@functools.cache
def _uninterrupted(end=_STEPS):
    return _continued(_start(), 0, end)


def _assert_all_equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def train_until_killed(folder):
    """What the killed process runs: it saves in both formats every few steps, and never ends."""
    carry, n = _start(), 0
    with ocp.CheckpointManager(Path(folder) / "orbax") as manager:
        while True:
            carry, n = _step()(carry, n), n + 1
            if n % _EVERY == 0:
                manager.save(n, args=ocp.args.StandardSave(carry))
                manager.wait_until_finished()
                part = Path(folder) / "part"
                part.write_bytes(flax.serialization.to_bytes(carry))
                part.replace(Path(folder) / f"{n}.msgpack")  # whole, or not there
            print(n, flush=True)


def _python(code, devices=8):
    """A process of its own, under the settings of these tests but for the number of devices."""
    lines = [
        "import os, conftest, test_checkpoints",
        f"os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count={devices}'",
        f"test_checkpoints.{code}",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed between two checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    with _python(f"train_until_killed({str(folder)!r})") as process:
        try:
            steps = iter(process.stdout)
            while int(next(steps)) < _KILLED:
                pass
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return folder


def _with_orbax(folder):
    with ocp.CheckpointManager(folder / "orbax") as manager:
        step = manager.latest_step()
        return step, manager.restore(step, args=ocp.args.StandardRestore(_start()))


def _with_flax(folder):
    step = max(int(path.stem) for path in folder.glob("*.msgpack"))
    saved = (folder / f"{step}.msgpack").read_bytes()
    return step, flax.serialization.from_bytes(_start(), saved)


@pytest.mark.parametrize("restore", [_with_orbax, _with_flax], ids=["orbax", "flax"])
def test_a_killed_run_goes_on_to_the_last_bit_as_if_it_had_not_been(restore, killed):
    step, restored = restore(killed)
    assert _KILLED - _EVERY < step < _STEPS
    _assert_all_equal(restored, _uninterrupted(step))
    _assert_all_equal(_continued(restored, step), _uninterrupted())
    slopes = hd.metrics(restored)["slope/body"]
    assert slopes != hd.metrics(_uninterrupted())["slope/body"]


# Other groups.


_RENAMED = {"w": "body", "v": "top", "b": "bias"}
_ONE_LESS = {"w": "body", "v": "head", "b": "head"}


@pytest.mark.parametrize(
    ("labels", "missing", "unknown"),
    [(_RENAMED, "'top'", "'head'"), (_ONE_LESS, "", "'bias'"), ("all", "'all'", "'bias', 'body'")],
    ids=["renamed", "one less", "all in one"],
)
def test_a_state_of_other_groups_is_refused_by_their_names(labels, missing, unknown):
    params, _ = _start()
    state = hd.hidlr(_loss, _LABELS).init(params)
    tx = hd.hidlr(_loss, labels)
    message = rf"state has .*other groups.*missing are \[{missing}\].*not among .* \[{unknown}"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda: hd.take_step(tx, _loss, params, state, _batch(0)))()


def test_restoring_into_a_state_of_other_groups_is_refused_before_hidlr_sees_it(killed, tmp_path):
    saved = _with_flax(killed)[1]
    other = _start(_RENAMED)
    with pytest.raises(ValueError, match=r"(?s)dict keys.*top.*group_learning_rates"):
        flax.serialization.from_bytes(other, flax.serialization.to_bytes(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", saved)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=r"group_learning_rates\.head"):
            checkpointer.restore(tmp_path / "saved", other)


# Other devices.


def _on_mesh(carry, count):
    """Parameters in as many parts as there are devices, the state on each of them."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("x",), axis_types=(AxisType.Auto,))
    parts = {"w": PartitionSpec(None, "x"), "v": PartitionSpec("x"), "b": PartitionSpec()}
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, parts[name]))
        for name, leaf in carry[0].items()
    }
    return params, jax.device_put(carry[1], NamedSharding(mesh, PartitionSpec()))


def _restored_on_mesh(folder, count):
    template = _on_mesh(_start(), count)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(Path(folder), template)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True)
    assert all(new.sharding == wanted.sharding for new, wanted in pairs)
    return restored


def restore_alone(folder):
    """What a process that has one device runs: it goes on, and hands the rates back."""
    assert jax.device_count() == 1
    carry = _continued(_restored_on_mesh(folder, 1), 25)
    print(float(optax.tree.get(carry, "group_learning_rates")["head"]))


@pytest.fixture(scope="module")
def saved_on_eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh") / "saved"
    carry = _continued(_on_mesh(_start(), 8), 0, 25)
    assert len(carry[0]["w"].sharding.device_set) == 8
    assert not carry[0]["w"].is_fully_replicated
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, carry)
    return folder, carry


@pytest.mark.parametrize("count", [4, 1])
def test_a_checkpoint_of_eight_devices_goes_on_with_fewer(count, saved_on_eight):
    folder, carry = saved_on_eight
    restored = _restored_on_mesh(folder, count)
    _assert_all_equal(restored, carry)
    result = _continued(restored, 25)
    assert len(result[0]["w"].sharding.device_set) == count
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-4),
        result[0],
        _continued(carry, 25)[0],
    )


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_in_a_process_that_has_one(saved_on_eight):
    folder, carry = saved_on_eight
    with _python(f"restore_alone({str(folder)!r})", devices=1) as process:
        printed = process.stdout.read()
    assert process.returncode == 0
    expected = optax.tree.get(_continued(carry, 25), "group_learning_rates")["head"]
    np.testing.assert_allclose(float(printed), expected, rtol=2e-2)
