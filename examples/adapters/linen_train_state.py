"""Flax linen: its own `TrainState`, in the loop of its documentation. Lines that differ are marked.

pip install flax
python examples/adapters/linen_train_state.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import hidlr_optax as hd  # <- new

net = nn.Sequential([nn.Dense(32), jnp.tanh, nn.Dense(1)])


@hd.remember_batch  # <- new
def loss_fn(params, x, y):
    return jnp.mean((net.apply({"params": params}, x)[:, 0] - y) ** 2)


@jax.jit
def train_step(state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
    return state.apply_gradients(grads=grads), loss


def main(steps=200):
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = hd.hessian_informed(optax.adamw(1.0), loss_fn, hd.label_by_role)  # <- was adamw(3e-3)
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        x = jax.random.normal(key, (64, 3))
        state, loss = train_step(state, x, jnp.sin(x.sum(1)))
        losses.append(float(loss))
    print(hd.explain(state.opt_state))  # <- new
    return losses


if __name__ == "__main__":
    print(f"loss {main()[-1]:.4f}")
