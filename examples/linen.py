"""Flax linen with dropout: `hidlr_optax.flax.TrainState`, whose `apply_gradients` knows the loss.

An MLP on 8×8 images of digits, one group for each layer. Gradient, value and probes come from one
closure over the dropout key, so that all of them see one function.

    python examples/linen.py
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hidlr_optax as hd
from hidlr_optax.flax import TrainState


class MLP(nn.Module):
    """Two hidden layers with dropout, and a head."""

    @nn.compact
    def __call__(self, x, train):
        """(n, 64) pixels -> (n, 10) logits."""
        for width in (128, 64):
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10, name="head")(x)


@jax.jit
def train_step(state, batch, key):
    """One step; the probes of a refresh see the same dropout as the gradient."""
    x, y = batch

    def loss_of(params):
        logits = state.apply_fn({"params": params}, x, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.take_step(loss_of)


def main(steps=400):
    """Trains; returns the loss of each step."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype(np.float32) / 16, y, random_state=0)
    model = MLP()
    params = model.init(jax.random.key(0), x[:1], train=False)["params"]
    schedule = optax.cosine_decay_schedule(1.0, steps)  # a factor, inside of hidlr
    # No loss function here: value_fn comes with every step.
    tx = optax.chain(optax.adamw(1.0), hd.hidlr(None, hd.label_by_depth, schedule=schedule))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    losses, rng = [], np.random.default_rng(0)
    for key in jax.random.split(jax.random.key(1), steps):
        rows = rng.integers(0, len(y), 64)
        state, loss = train_step(state, (x[rows], y[rows]), key)
        losses.append(float(loss))

    logits = state.apply_fn({"params": state.params}, x_test, train=False)
    print(f"test accuracy: {np.mean(np.argmax(logits, 1) == y_test):.1%}")
    print(hd.explain(state.opt_state))
    return losses


if __name__ == "__main__":
    main()
