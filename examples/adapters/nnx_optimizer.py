"""Flax nnx: `nnx.Optimizer` in the loop of its documentation. Lines that differ are marked.

pip install flax
python examples/adapters/nnx_optimizer.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import hidlr_optax as hd  # <- new
import hidlr_optax.flax  # <- new


class Model(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(3, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.body(x))))[:, 0]


@hidlr_optax.flax.remember_batch  # <- new
def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


def main(steps=200):
    model = Model(nnx.Rngs(0))
    tx = hd.hessian_informed(optax.adamw(1.0), loss_fn, hd.label_by_role)  # <- was adamw(3e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        x = jax.random.normal(key, (64, 3))
        losses.append(float(train_step(model, optimizer, x, jnp.sin(x.sum(1)))))
    print(hd.explain(optimizer.opt_state))  # <- new
    return losses


if __name__ == "__main__":
    print(f"loss {main()[-1]:.4f}")
