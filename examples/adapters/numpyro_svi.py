"""NumPyro: stochastic variational inference. Lines that differ are marked.

NumPyro hands Optax the value alone, so a subclass of its optimizer of 14 lines hands the loss on.
Without mutable state in the model, the closure that it has is a function of the parameters alone.

    pip install numpyro
    python examples/adapters/numpyro_svi.py
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import _NumPyroOptim

import hidlr_optax as hd  # <- new


class Informed(_NumPyroOptim):  # <- new, all of it
    """An Optax transformation that is told the loss."""

    def __init__(self, tx):
        self.tx = tx
        super().__init__(lambda: (lambda p: (p, tx.init(p)), None, lambda state: state[0]))

    def eval_and_update(self, fn, state, forward_mode_differentiation=False):
        step, (params, opt_state) = state
        (value, aux), grads = jax.value_and_grad(fn, has_aux=True)(params)
        updates, opt_state = self.tx.update(
            grads, opt_state, params, value=value, value_fn=lambda params: fn(params)[0]
        )
        return (value, aux), (step + 1, (optax.apply_updates(params, updates), opt_state))


def model(x, y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(100.0))
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 10.0).to_event(1))
    numpyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


def main(steps=500):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (200, 3)) * jnp.array([1.0, 10.0, 0.1])
    y = x @ jnp.array([1.0, -0.2, 5.0]) + 0.1 * jax.random.normal(keys[1], (200,))
    tx = hd.hessian_informed(optax.adam(1.0), None, "all")  # <- new
    svi = SVI(model, AutoNormal(model), Informed(tx), Trace_ELBO())  # <- was adam(1e-2)
    result = svi.run(jax.random.key(1), steps, x, y, progress_bar=False)
    print(hd.explain(result.state.optim_state[1][1]))  # <- new
    return [float(loss) for loss in result.losses]


if __name__ == "__main__":
    print(f"negative ELBO {main()[-1]:.1f}")
