"""What kills a run: small problems as people report them, and the optimizer that is usual."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import Problem, descend
from benchmarks.problems import small
from benchmarks.problems.small import apply, by_path, dense, first_key


class Report(NamedTuple):
    """A problem, and what is usual there.

    Attributes:
      problem: judged by its training loss on all the data.
      optimizer: the name and rate of the usual one.
      rate: that is usual.
      runs: the rows of the table: seeds, or initial rates of `hidlr` where `of_rates`.
      of_rates: whether they are.
    """

    problem: Problem
    optimizer: str
    rate: float
    runs: tuple[Any, ...] = (0, 1, 2)
    of_rates: bool = False


def small_batch_lora() -> Report:
    """Rank 4, B = 0, four examples a step: the noise is as large as the signal."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    w1, w2 = normal(16, 64) / 4, normal(64, 5) / 8
    change = normal(16, 2) @ normal(2, 64) / 6
    x = normal(1024, 16)
    y = jnp.argmax(jax.nn.gelu(x @ (w1 + change)) @ w2 + 0.3 * normal(1024, 5), 1)
    x, y = x[:768], y[:768]

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = jax.nn.gelu(batch[0] @ (w1 + 2 * params["A"] @ params["B"])) @ w2
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = Problem(
        init=lambda key: {"A": jax.random.normal(key, (16, 4)) / 4, "B": jnp.zeros((4, 64))},
        loss=loss,
        steps=300,
        splits={"train": (x, y)},
        batch_size=4,
        groupings={"": first_key},
        direction=optax.adamw,
    )
    return Report(problem, "AdamW 1e-2", 1e-2, runs=tuple(range(8)))


def rosenbrock() -> Report:
    """Full gradients from the origin; the initial rate should hardly matter."""

    def loss(params: Any, batch: Any = None) -> jax.Array:
        del batch
        return (1 - params["x"]) ** 2 + 100 * (params["y"] - params["x"] ** 2) ** 2

    problem = Problem(
        init=lambda _: {"x": jnp.zeros(()), "y": jnp.zeros(())},
        loss=loss,
        steps=3000,
        groupings={"": first_key},
        direction=optax.sgd,
    )
    return Report(
        problem, "SGD 1e-3", 1e-3, runs=(None, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), of_rates=True
    )


def burgers() -> Report:
    """A physics-informed network for Burgers' equation, new collocation points at every step."""
    viscosity, edge = 0.01 / np.pi, jnp.linspace(-1, 1, 64)

    def net(params: Any, t: Any, x: Any) -> jax.Array:
        hidden = jnp.stack([t, x])
        for n in range(len(params) - 1):
            hidden = jnp.tanh(apply(params[f"layer{n}"], hidden))
        return apply(params[f"layer{len(params) - 1}"], hidden)[0]

    def residual(params: Any, t: Any, x: Any) -> jax.Array:
        slope = jax.grad(net, 2)
        u, u_t, u_x = net(params, t, x), jax.grad(net, 1)(params, t, x), slope(params, t, x)
        return u_t + u * u_x - viscosity * jax.grad(slope, 2)(params, t, x)

    def loss(params: Any, batch: Any) -> jax.Array:
        times = batch[:64, 0]
        inner = jax.vmap(residual, (None, 0, 0))(params, batch[:, 0], batch[:, 1])
        start = jax.vmap(net, (None, None, 0))(params, 0.0, edge) + jnp.sin(jnp.pi * edge)
        sides = [jax.vmap(net, (None, 0, None))(params, times, side) for side in (1.0, -1.0)]
        return jnp.mean(inner**2) + jnp.mean(start**2) + sum(jnp.mean(s**2) for s in sides)

    def sample(key: jax.Array, size: int = 256) -> jax.Array:
        return jax.random.uniform(key, (size, 2)) * jnp.array([1, 2]) - jnp.array([0, 1])

    problem = Problem(
        init=functools.partial(small.mlp_init, (2, 48, 48, 48, 1)),
        loss=loss,
        steps=1000,
        sample=sample,
        evaluate=lambda params: loss(params, sample(jax.random.key(9), 2048)),
        groupings={"": hd.label_by_role},
        direction=optax.adam,
    )
    return Report(problem, "Adam 1e-3", 1e-3)


def gaussian_process() -> Report:
    """Classification in GPJax's parametrization: whitened latent values, all at zero, and kernel.

    The loss is −log p(y, v): 100 (log 2 + ½ log 2π) = 161 at the start, whatever the kernel is.
    Seeds differ in the lengthscale that it starts from.
    """
    rng = np.random.default_rng(123)
    x = np.sort(rng.uniform(-1, 1, 100))
    signs = jnp.sign(jnp.asarray(np.cos(3 * x + rng.normal(0, 0.25, 100)), jnp.float32))
    squares = jnp.asarray((x[:, None] - x) ** 2, jnp.float32)

    def loss(params: Any, batch: Any = None) -> jax.Array:
        del batch
        positive = jax.tree.map(jax.nn.softplus, params["kernel"])
        kernel = positive["variance"] * jnp.exp(-squares / (2 * positive["lengthscale"] ** 2))
        kernel = kernel + 1e-4 * jnp.eye(len(x))
        latent = params["mean"] + jnp.linalg.cholesky(kernel) @ params["latent"]
        likelihood = jax.scipy.stats.norm.logcdf(signs * latent).sum()
        return -likelihood - jax.scipy.stats.norm.logpdf(params["latent"]).sum()

    def init(key: jax.Array) -> Any:
        lengthscale = jnp.exp(jax.random.uniform(key, minval=-1.0, maxval=1.0))
        positive = {"lengthscale": lengthscale, "variance": jnp.ones(())}
        kernel = jax.tree.map(lambda value: jnp.log(jnp.expm1(value)), positive)
        return {"kernel": kernel, "mean": jnp.zeros(()), "latent": jnp.zeros(len(x))}

    problem = Problem(
        init=init,
        loss=loss,
        steps=1000,
        evaluate=loss,
        groupings={"": first_key},
        direction=optax.adam,
    )
    return Report(problem, "Adam 1e-2", 1e-2)


def normalised_cnn() -> Report:
    """MNIST-5k, batch norm by the statistics of the batch, dropout, momentum at ResNet's rate."""
    splits = small.mnist_cnn().splits
    images, digits = splits["train"]

    def norm(params: Any, x: jax.Array) -> jax.Array:
        x = x - x.mean((0, 1, 2))
        return x / jnp.sqrt((x**2).mean((0, 1, 2)) + 1e-5) * params["scale"] + params["bias"]

    def loss(params: Any, batch: Any, dropout: float = 0.5) -> jax.Array:
        x, y, key = batch
        x = x.reshape(-1, 28, 28, 1)
        for n in "01":
            x = small.patches(x) @ params[f"conv{n}"]["kernel"]
            x = jax.nn.relu(norm(params[f"norm{n}"], x))
        x = jax.nn.relu(apply(params["hidden"], x.reshape(x.shape[0], -1)))
        kept = jax.random.bernoulli(key, 1 - dropout, x.shape)
        logits = apply(params["head"], jnp.where(kept, x / (1 - dropout), 0.0))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        shapes = {"conv0": (9, 16), "conv1": (144, 32), "hidden": (1568, 64), "head": (64, 10)}
        layers = {n: dense(k, *shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}
        for n in "01":
            del layers[f"conv{n}"]["bias"]
        norms = {
            f"norm{n}": {"scale": jnp.ones(size), "bias": jnp.zeros(size)}
            for n, size in enumerate((16, 32))
        }
        return layers | norms

    def sample(key: jax.Array) -> Any:
        rows = jax.random.randint(key, (64,), 0, len(images))
        return images[rows], digits[rows], key

    rules = [("head/.*", "head"), ("norm.*", "norm"), (".*/bias", "bias"), ("conv.*", "conv")]
    problem = Problem(
        init=init,
        loss=loss,
        steps=300,
        sample=sample,
        evaluate=lambda params: loss(params, (images, digits, jax.random.key(0)), dropout=0.0),
        groupings={"": by_path(rules, "rest")},
        direction=functools.partial(optax.sgd, momentum=0.9),
    )
    return Report(problem, "momentum 1e-1", 1e-1)


def language_model() -> Report:
    """The transformer of `small.text`, for twice as long."""
    text = small.text()
    labels = {"": text.groupings["roles"]}
    problem = text._replace(steps=600, groupings=labels, direction=optax.adamw)
    return Report(problem, "AdamW 3e-3", 3e-3)


def plateau() -> Report:
    """A deep tanh network that starts small: flat for 60 steps, and then sharply curved."""
    digits = small.PROBLEMS["digits"]()
    depth, shrunk = 6, 0.4

    def model(params: Any, x: jax.Array) -> jax.Array:
        for n in range(depth - 1):
            x = jnp.tanh(apply(params[f"layer{n}"], x))
        return apply(params[f"layer{depth - 1}"], x)

    def init(key: jax.Array) -> Any:
        params = small.mlp_init((64, *(48,) * (depth - 1), 10), key)
        return jax.tree.map(lambda w: shrunk * w, params)

    loss = functools.partial(small.cross_entropy, model)
    momentum = functools.partial(optax.sgd, momentum=0.9)
    problem = digits._replace(init=init, loss=loss, groupings={"": first_key}, direction=momentum)
    return Report(problem, "momentum 1e-1", 1e-1)


def turned_digits() -> Report:
    """LoRA in both layers of a trained MLP, whose images are then turned by 90 degrees."""
    digits = small.PROBLEMS["digits"]()
    hidden = "layer0", "layer1"

    def model(params: Any, x: jax.Array) -> jax.Array:
        for name in hidden:
            x = jax.nn.relu(apply(params[name], x))
        return apply(params["layer2"], x)

    upright = functools.partial(small.cross_entropy, model)
    start = small.mlp_init((64, 128, 64, 10), jax.random.key(0))
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 300))
    keys = jax.random.split(jax.random.key(1), 300)
    task = digits._replace(loss=upright)
    trained = jax.jit(lambda: descend(task, tx, (start, tx.init(start)), keys)[0][0])()
    images, labels = digits.splits["train"]
    images = jnp.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

    def adapted(params: Any) -> Any:
        layers = {
            n: trained[n] | {"kernel": trained[n]["kernel"] + params["A"][n] @ params["B"][n]}
            for n in hidden
        }
        return layers | {"layer2": params["head"]}

    def init(key: jax.Array) -> Any:
        keys = dict(zip(hidden, jax.random.split(key), strict=True))
        sizes = {n: trained[n]["kernel"].shape for n in hidden}
        scale = jax.nn.initializers.he_uniform()
        return {
            "A": {n: scale(keys[n], (sizes[n][0], 8)) for n in hidden},
            "B": {n: jnp.zeros((8, sizes[n][1])) for n in hidden},
            "head": trained["layer2"],
        }

    def loss(params: Any, batch: Any) -> jax.Array:
        return upright(adapted(params), batch)

    problem = Problem(
        init=init,
        loss=loss,
        steps=300,
        splits={"train": (images, labels)},
        batch_size=64,
        groupings={"": first_key},
        direction=optax.adamw,
    )
    return Report(problem, "AdamW 3e-2", 3e-2)


CASES: dict[str, Callable[[], Report]] = {
    "turned digits": turned_digits,
    "LoRA": small_batch_lora,
    "Rosenbrock": rosenbrock,
    "PINN": burgers,
    "Gaussian process": gaussian_process,
    "CNN": normalised_cnn,
    "language model": language_model,
    "plateau": plateau,
}
