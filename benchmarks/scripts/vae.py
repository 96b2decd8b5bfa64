"""A variational autoencoder of MNIST in linen, as in Flax's examples, at half its width."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import hidlr_optax as hd
import hidlr_optax.flax as hdf
from benchmarks.scripts.script import Loop, Script, epochs, mnist


class VAE(nn.Module):
    """Twenty latent variables, one hidden layer on either side."""

    @nn.compact
    def __call__(self, x: Any, key: jax.Array) -> Any:
        """(n, 784) images -> logits of their pixels, means and log variances of the latents."""
        hidden = nn.relu(nn.Dense(250, name="encoder")(x))
        mean, logvar = nn.Dense(20, name="mean")(hidden), nn.Dense(20, name="logvar")(hidden)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        hidden = nn.relu(nn.Dense(250, name="decoder")(z))
        return nn.Dense(784, name="pixels")(hidden), mean, logvar


def negative_elbo(params: Any, x: Any, key: jax.Array) -> jax.Array:
    """Binary cross-entropy and divergence from the prior, nats per image."""
    outputs: Any = VAE().apply({"params": params}, x, key)
    logits, mean, logvar = outputs
    entropy = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
    divergence = -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar)).sum(-1)
    return jnp.mean(entropy + divergence)


def usual(learning_rate: Any) -> Loop:
    """As the example has it."""
    tx = optax.adam(learning_rate)

    def start(seed: int) -> Any:
        key = jax.random.key(seed)
        params = VAE().init(key, jnp.zeros((1, 784)), key)["params"]
        return (train_state.TrainState.create(apply_fn=None, params=params, tx=tx),)

    @jax.jit
    def train_step(state: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        loss, grads = jax.value_and_grad(negative_elbo)(state.params, batch, key)
        return state.apply_gradients(grads=grads), loss

    return Loop(start, train_step)


def with_hidlr(labels: Any, schedule: Any) -> Loop:
    """The same with `hidlr`."""
    tx = optax.chain(optax.adam(1.0), hd.hidlr(None, labels, schedule=schedule))

    def start(seed: int) -> Any:
        key = jax.random.key(seed)
        params = VAE().init(key, jnp.zeros((1, 784)), key)["params"]
        return (hdf.TrainState.create(apply_fn=None, params=params, tx=tx),)

    @jax.jit
    def train_step(state: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        return state.take_step(negative_elbo, batch, key)

    return Loop(start, train_step)


def batches(seed: int) -> Iterator[Any]:
    """128 images."""
    for images, _ in epochs(seed, 128, *mnist()[0]):
        yield images.reshape(-1, 784)


def evaluate(state: Any) -> float:
    """The negative evidence bound of 1,000 images that are not trained on."""
    return float(
        jax.jit(negative_elbo)(state.params, mnist()[1].images.reshape(-1, 784), jax.random.key(1))
    )


SCRIPT = Script(
    optimizer="Adam 1e-3",
    rate=1e-3,
    updates=600,
    metric="test −ELBO, nats",
    usual=usual,
    with_hidlr=with_hidlr,
    batches=batches,
    evaluate=evaluate,
)
