"""Train with an estimator of your own: curvatures by a central difference of gradients.

`paper.one_step` asks an estimator for slope and curvature along the group steps. Any frozen value
with `estimate` and `couples` is one. A small network learns a function; no extra needed.

    python examples/own_estimator.py
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hidlr_optax as hd
from hidlr_optax.paper import Measurement, StepLoss


@dataclasses.dataclass(frozen=True)
class CentralDifference:
    """(Aη)_k from two gradients, a little ahead of the parameters and a little behind them.

    Attributes:
      part: how far ahead and behind, in steps at the present rates.
    """

    part: float = 0.1
    couples = False  # measures no A_kl

    def estimate(
        self, step_loss: StepLoss, rates: jax.Array, *, slope: jax.Array | None = None, **known: Any
    ) -> Measurement:
        """ℓ′(pη) − ℓ′(−pη) = 2p Aη + O(p³), ℓ(η) = L(w + Σ_k η_k u_k)."""
        del known  # value, expected, batch, step: see hd.paper.Estimator
        gradient = jax.grad(step_loss)
        if slope is None:
            slope = jnp.negative(gradient(jnp.zeros_like(rates)))  # it is positive downhill
        offset = self.part * rates
        rows = (gradient(offset) - gradient(-offset)) / (2 * self.part)
        return Measurement.exact(hd.Quadratic(slope, rows / rates))


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Squared error of a network with one hidden layer."""
    x, y = batch
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"] - y) ** 2)


def main(steps: int = 400) -> float:
    """Trains on batches of 64, and returns the last loss."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.uniform(keys[0], (512, 2), minval=-2, maxval=2)
    y = jnp.sin(x[:, 0]) * x[:, 1]
    body = {"kernel": jax.random.normal(keys[1], (2, 32)), "bias": jnp.zeros(32)}
    params = {"body": body, "head": jnp.zeros(32)}
    labels = {"body": "body", "head": "head"}
    rule = hd.paper.one_step(loss_fn, labels, curvature=CentralDifference())
    tx = optax.chain(optax.adamw(1.0), rule)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grad = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=loss, grad=grad)
        return optax.apply_updates(params, updates), state, loss

    state, loss = tx.init(params), jnp.inf
    for n in range(steps):
        params, state, loss = step(params, state, (x[n % 8 :: 8], y[n % 8 :: 8]))
    print(f"loss {loss:.3g} after {steps} steps")
    print(hd.explain(state))
    return float(loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
