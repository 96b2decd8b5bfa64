"""A training loop in plain JAX: parameters as nested dicts, one learning rate per group.

An MLP on 8×8 images of digits, groups head / bias / rest, a cosine schedule.

    python examples/plain_jax.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    params = init(jax.random.key(0))
    labels = hd.label_by_path(params, [(r"head/.*", "head"), (r".*/bias", "bias")], default="rest")
    schedule = optax.cosine_decay_schedule(1.0, steps)  # a factor, inside of hidlr
    tx = optax.chain(optax.adamw(1.0), hd.hidlr(loss_fn, labels, schedule=schedule))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=loss, grad=grads)
        return optax.apply_updates(params, updates), state, loss

    losses, rng = [], np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(y), 64)
        params, state, loss = step(params, state, (x[rows], y[rows]))
        losses.append(float(loss))

    accuracy = np.mean(predict(params, x_test).argmax(1) == y_test)
    print(f"test accuracy: {accuracy:.1%}")
    print(hd.explain(state))
    return losses


if __name__ == "__main__":
    main()
