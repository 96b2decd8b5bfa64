"""Equinox: the loop of its documentation. Lines that differ for hidlr are marked.

pip install equinox
python examples/adapters/equinox_loop.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import hidlr_optax as hd  # <- new


@hd.remember_batch  # <- new
def loss_fn(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def main(steps=200):
    model = eqx.nn.MLP(3, "scalar", 32, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    labels = hd.label_by_path(params, [(".*/bias", "bias")], default="weight")  # <- new
    optim = hd.hessian_informed(optax.adamw(1.0), loss_fn, labels)  # <- was optax.adamw(3e-3)
    state = optim.init(params)

    @eqx.filter_jit
    def step(model, state, x, y):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
        updates, state = optim.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        x = jax.random.normal(key, (64, 3))
        model, state, loss = step(model, state, x, jnp.sin(x.sum(1)))
        losses.append(float(loss))
    print(hd.explain(state))  # <- new
    return losses


if __name__ == "__main__":
    print(f"loss {main()[-1]:.4f}")
