"""flowjax: `fit_to_data`, which tells the optimizer nothing. Lines that differ are marked.

pip install flowjax
python examples/adapters/flowjax_fit.py
"""

import jax
import jax.numpy as jnp
import optax
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data
from flowjax.train.losses import MaximumLikelihoodLoss

import hidlr_optax as hd  # <- new


def main(epochs=5):
    keys = jax.random.split(jax.random.key(0), 3)
    angle = 3.0 * jax.random.normal(keys[0], (2000,))
    x = jnp.stack([jnp.cos(angle) + angle / 3, jnp.sin(angle)], axis=1)
    x += 0.1 * jax.random.normal(keys[1], x.shape)
    flow = masked_autoregressive_flow(keys[2], base_dist=Normal(jnp.zeros(2)), flow_layers=4)
    loss_fn = hd.remember_batch(MaximumLikelihoodLoss())  # <- new
    optimizer = hd.hessian_informed(optax.adam(1.0), loss_fn, "all")  # <- was adam(5e-4)
    _, losses = fit_to_data(
        jax.random.key(1),
        flow,
        x,
        loss_fn=loss_fn,  # <- new
        optimizer=optimizer,
        max_epochs=epochs,
        show_progress=False,
    )
    return losses["train"]


if __name__ == "__main__":
    print(f"negative log-likelihood {main(20)[-1]:.3f}")
