"""GPJax: `fit`, which tells the optimizer nothing. Lines that differ are marked.

pip install gpjax
python examples/adapters/gpjax_fit.py
"""

import gpjax as gpx
import jax
import jax.numpy as jnp
import optax

import hidlr_optax as hd  # <- new


def main(steps=150):
    x = jnp.linspace(0.0, 10.0, 60)[:, None]
    y = jnp.sin(x) + 0.1 * jax.random.normal(jax.random.key(0), x.shape)
    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Zero(), kernel=gpx.kernels.RBF())
    posterior = prior * gpx.likelihoods.Gaussian()

    @hd.remember_batch  # <- new
    def objective(model, data):
        return -gpx.objectives.conjugate_mll(model, data)

    optim = hd.hessian_informed(optax.adam(1.0), objective, "all")  # <- was adam(1e-2)
    _, history = gpx.fit(
        model=posterior,
        objective=objective,
        train_data=gpx.Dataset(X=x, y=y),
        optim=optim,
        num_iters=steps,
        verbose=False,
    )
    return [float(value) for value in history]


if __name__ == "__main__":
    print(f"negative log-likelihood {main()[-1]:.2f}")
