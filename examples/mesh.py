"""A training loop over a mesh of devices: every batch split, every kernel spread (FSDP).

The loop of plain_jax.py on all devices there are; `hidlr` asks for nothing, since jit sees one loss
of one batch. On one device, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of it.

    python examples/mesh.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hidlr_optax as hd


def init(key):
    """He's initialisation of three layers."""
    layers = {"first": (64, 128), "second": (128, 64), "head": (64, 10)}
    keys = jax.random.split(key, len(layers))
    return {
        name: {
            "kernel": jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5,
            "bias": jnp.zeros(shape[1]),
        }
        for key, (name, shape) in zip(keys, layers.items(), strict=True)
    }


def predict(params, x):
    """(n, 64) pixels -> (n, 10) logits."""
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, batch):
    """Mean cross-entropy."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


def main(steps=400):
    """Trains; returns the loss of each step."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype(np.float32) / 16, y, random_state=0)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    rows_split = NamedSharding(mesh, PartitionSpec("devices"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = {"kernel": rows_split, "bias": everywhere}
    params = {n: jax.device_put(p, shardings) for n, p in init(jax.random.key(0)).items()}
    labels = hd.label_by_path(params, [(r"head/.*", "head"), (r".*/bias", "bias")], default="rest")
    schedule = optax.cosine_decay_schedule(1.0, steps)  # a factor, inside of hidlr
    tx = optax.chain(optax.adamw(1.0), hd.hidlr(loss_fn, labels, schedule=schedule))
    state = jax.jit(tx.init)(params)  # what is like params is spread like them

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=loss, grad=grads)
        return optax.apply_updates(params, updates), state, loss

    losses, rng = [], np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(y), 64)
        batch = jax.device_put((x[rows], y[rows]), rows_split)
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))

    accuracy = np.mean(predict(params, x_test).argmax(1) == y_test)
    print(f"{jax.device_count()} devices, test accuracy: {accuracy:.1%}")
    print(hd.explain(state))
    return losses


if __name__ == "__main__":
    main()
