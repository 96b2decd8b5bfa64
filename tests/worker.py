"""A training run, and one of two processes that share it: `worker.py ADDRESS ID`."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd

PROCESSES, ROWS, STEPS = 2, 32, 30


def train(place_params, place_batch):
    """The rates of "v" and "w" and the loss at the end of a run, its arrays put where they go."""

    def loss_fn(params, batch):
        return jnp.mean((jnp.tanh(batch[0] @ params["w"]) @ params["v"] - batch[1]) ** 2)

    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(8, 16)) / 3, "v": rng.normal(size=16) / 4}
    params = {name: place_params(leaf.astype(np.float32)) for name, leaf in start.items()}
    tx = optax.chain(optax.adamw(1.0), hd.hidlr(loss_fn, {"w": "w", "v": "v"}))
    state, value = jax.jit(tx.init)(params), None

    @jax.jit
    def step(params, state, batch):
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state, value

    for n in range(STEPS):
        x = np.random.default_rng(n).normal(size=(ROWS, 8)).astype(np.float32)
        params, state, value = step(params, state, place_batch((x, np.sin(x[:, 0]))))
    rates = optax.tree.get(state, "group_learning_rates")
    return [float(rates["v"]), float(rates["w"]), float(value)]


def main(address, process):
    """One of the processes, with two devices and its half of each batch."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=PROCESSES, process_id=process)
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("x",), ())
    )
    share = ROWS // PROCESSES
    mine = slice(share * process, share * (process + 1))
    placed = jax.make_array_from_process_local_data
    ends = train(
        lambda leaf: placed(everywhere, leaf),
        lambda batch: tuple(placed(rows, part[mine]) for part in batch),
    )
    print("ENDS", *map(repr, ends), flush=True)


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // PROCESSES}"
    main(sys.argv[1], int(sys.argv[2]))
