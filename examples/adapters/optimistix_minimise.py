"""Optimistix: `OptaxMinimiser` around hidlr, as around optax.lbfgs. Lines that differ are marked.

pip install optimistix
python examples/adapters/optimistix_minimise.py
"""

import jax.numpy as jnp
import optax
import optimistix as optx

import hidlr_optax as hd  # <- new


def rosenbrock(y, args):
    del args
    return jnp.sum((1 - y["x"]) ** 2 + 100 * (y["y"] - y["x"] ** 2) ** 2)


def main(steps=1500):
    start = {"x": jnp.zeros(2), "y": jnp.zeros(2)}
    optim = hd.hessian_informed(optax.adam(1.0), None, {"x": "x", "y": "y"})  # <- was adam(3e-2)
    solver = optx.OptaxMinimiser(optim, rtol=1e-6, atol=1e-6)
    found = optx.minimise(rosenbrock, solver, start, max_steps=steps, throw=False)
    print(hd.explain(found.state.opt_state))  # <- new
    return [float(rosenbrock(y, None)) for y in (start, found.value)]


if __name__ == "__main__":
    print(f"loss {main()[-1]:.2g}")
