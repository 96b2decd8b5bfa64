"""Four problems whose groups of parameters have different units. Four more are in `more.py`.

A group is a top-level key of the parameters. People set one learning rate per group by hand in such
problems. Each problem is plain arrays and a loss, so that a whole run fits into one `lax.scan`. The
data is bundled with scikit-learn, or made here with a fixed seed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kit.loop import Problem
from benchmarks.problems.small import apply, dense


def runge_kutta(rate: Callable[[Any], Any], start: Any, dt: float, steps: int) -> Any:
    """The states after each of `steps` steps of dz/dt = rate(z), fourth order."""

    def step(z: Any, _: None) -> Any:
        k1 = rate(z)
        k2 = rate(z + dt / 2 * k1)
        k3 = rate(z + dt / 2 * k2)
        k4 = rate(z + dt * k3)
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z, z

    return jax.lax.scan(step, start, None, length=steps)[1]


def photograph(size: int) -> jax.Array:
    """A square of scikit-learn's flower, (size, size, 3), colours in [0, 1]; size divides 384."""
    from sklearn.datasets import load_sample_image

    image = np.asarray(load_sample_image("flower.jpg"), np.float32)[20:404, 150:534] / 255.0
    block = 384 // size
    return jnp.asarray(image.reshape(size, block, size, block, 3).mean((1, 3)))


PREDATOR_PREY = {
    "alpha": 0.6,
    "beta": 0.0025,
    "delta": 0.0012,
    "gamma": 0.5,
    "start": np.array([300.0, 120.0]),
}


def predator_prey(steps: int = 400) -> Problem:
    """Rates and starting populations of Lotka and Volterra's equations, from 126 noisy counts.

    The rates are per year and per animal, the populations are animals.
    """
    times = np.linspace(0, 25, 126)

    def simulate(p: Any) -> jax.Array:
        def rate(z: jax.Array) -> jax.Array:
            prey, predator = z
            eaten = prey * predator
            born, died = p["alpha"] * prey, p["gamma"] * predator
            return jnp.stack([born - p["beta"] * eaten, p["delta"] * eaten - died])

        return runge_kutta(rate, p["start"], times[1] - times[0], 125)

    exact = np.asarray(simulate(jax.tree.map(jnp.asarray, PREDATOR_PREY)))
    noise = np.random.default_rng(0).normal(size=exact.shape)
    counts = jnp.asarray(exact * np.exp(0.05 * noise))
    scale = counts.std(0)

    def init(key: jax.Array) -> dict[str, Any]:
        shifts = np.array([0.3, -0.2, 0.2, -0.2, 0.2]) + 0.1 * jax.random.normal(key, (5,))
        named = zip(PREDATOR_PREY.items(), shifts, strict=True)
        return {name: jnp.asarray(true) * jnp.exp(shift) for (name, true), shift in named}

    def loss(p: Any, batch: Any) -> jax.Array:
        del batch
        return jnp.mean(((simulate(p) - counts) / scale) ** 2)

    return Problem(init, loss, steps)


def rotation_matrix(v: jax.Array) -> jax.Array:
    """The rotation about `v` by its length, Rodrigues' formula."""
    angle = jnp.sqrt(jnp.sum(v**2) + 1e-12)
    x, y, z = v / angle
    cross = jnp.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) * cross @ cross


def project(p: Any, camera: jax.Array, point: jax.Array) -> jax.Array:
    """Where cameras see points, pixels."""
    rotations = jax.vmap(rotation_matrix)(p["rotation"])[camera]
    rotated = jnp.einsum("nij,nj->ni", rotations, p["points"][point])
    seen = rotated + p["translation"][camera]
    return p["focal"] * seen[:, :2] / seen[:, 2:]


def huber(error: jax.Array) -> jax.Array:
    """Half the mean square, linear above five pixels."""
    distance = jnp.abs(error)
    return jnp.mean(jnp.where(distance < 5, 0.5 * error**2, 5 * (distance - 2.5)))


def _scene(rng: np.random.Generator, cameras: int, points: int) -> dict[str, jax.Array]:
    """Points in a cube of two metres, and cameras on an arc around it."""
    world = rng.uniform(-1, 1, (points, 3))
    turn = np.linspace(0, 1.2, cameras)
    rotation = np.stack([0 * turn, turn, 0 * turn], 1)
    translation = np.stack([0.1 * np.sin(3 * turn), 0.1 * np.cos(3 * turn), 4 + 0 * turn], 1)
    return {
        "rotation": jnp.asarray(rotation, jnp.float32),
        "translation": jnp.asarray(translation, jnp.float32),
        "points": jnp.asarray(world, jnp.float32),
        "focal": jnp.float32(500.0),
    }


def bundle_adjustment(
    steps: int = 500, cameras: int = 12, points: int = 80, batch: int = 256
) -> Problem:
    """Twelve poses (radians, metres), 80 points (metres) and a focal length, from noisy pixels."""
    rng = np.random.default_rng(0)
    true, size = _scene(rng, cameras, points), cameras * points
    camera, point = map(jnp.asarray, np.divmod(np.arange(size), points))
    noise = jnp.asarray(rng.normal(size=(size, 2)), jnp.float32)
    pixels = project(true, camera, point) + noise

    def init(key: jax.Array) -> dict[str, Any]:
        a, b, c = jax.random.split(key, 3)
        return {
            "rotation": true["rotation"] + 0.05 * jax.random.normal(a, (cameras, 3)),
            "translation": true["translation"] + 0.1 * jax.random.normal(b, (cameras, 3)),
            "points": true["points"] + 0.1 * jax.random.normal(c, (points, 3)),
            "focal": jnp.float32(430.0),
        }

    def loss(p: Any, rows: jax.Array) -> jax.Array:
        return huber(project(p, camera[rows], point[rows]) - pixels[rows])

    def sample(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (batch,), 0, size)

    return Problem(init, loss, steps, sample=sample, evaluate=lambda p: loss(p, jnp.arange(size)))


def interpolate(level: jax.Array, at: jax.Array) -> jax.Array:
    """Features at (n, 2) places in the unit square, bilinear, from a (rows, columns, f) grid."""
    z = at * (level.shape[0] - 1)
    corner = jnp.clip(jnp.floor(z).astype(int), 0, level.shape[0] - 2)
    x, y = corner[:, 0], corner[:, 1]
    a, b = (z - corner)[:, :1], (z - corner)[:, 1:]
    top = level[y, x] * (1 - a) + level[y, x + 1] * a
    return top * (1 - b) + (level[y + 1, x] * (1 - a) + level[y + 1, x + 1] * a) * b


def _field(p: Any, at: jax.Array) -> jax.Array:
    """Colours at (n, 2) places, from features of all levels."""
    levels = sorted(p["grid"], key=lambda name: len(p["grid"][name]))
    h = jnp.concatenate([interpolate(p["grid"][name], at) for name in levels], 1)
    for name in "01":
        h = jax.nn.relu(apply(p["mlp"][name], h))
    return apply(p["mlp"]["2"], h)


def neural_field(size: int = 96, steps: int = 400, batch: int = 1024) -> Problem:
    """A photograph as a feature grid of four resolutions and a small network.

    Published code gives the grid ten times the rate of the network.
    """
    resolutions, colours = (8, 16, 32, 64), photograph(size).reshape(-1, 3)
    rows, columns = jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij")
    places = jnp.stack([columns.ravel(), rows.ravel()], 1) / (size - 1.0)

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 8)
        grid = {
            f"level{r}": jax.random.uniform(k, (r, r, 2), minval=-1e-4, maxval=1e-4)
            for r, k in zip(resolutions, keys, strict=False)
        }
        shapes = (8, 32), (32, 32), (32, 3)
        mlp = {f"{n}": dense(keys[4 + n], *shape) for n, shape in enumerate(shapes)}
        return {"grid": grid, "mlp": mlp}

    def loss(p: Any, rows: jax.Array) -> jax.Array:
        return jnp.mean((_field(p, places[rows]) - colours[rows]) ** 2)

    def sample(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (batch,), 0, size * size)

    return Problem(
        init, loss, steps, sample=sample, evaluate=lambda p: loss(p, jnp.arange(size * size))
    )


def variational_inference(steps: int = 600, batch: int = 64) -> Problem:
    """Bayesian logistic regression on 569 patients: a control, where one rate is enough.

    The posterior is a Gaussian with a location and a log scale; the scale of the prior is fitted.
    """
    from sklearn.datasets import load_breast_cancer

    x, y = map(np.asarray, load_breast_cancer(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    x, y = jnp.asarray(np.c_[x, np.ones(len(x))], jnp.float32), jnp.asarray(y, jnp.float32)
    size, width = x.shape
    many = jax.random.normal(jax.random.key(5), (256, width))

    def init(key: jax.Array) -> dict[str, Any]:
        del key
        zeros = jnp.zeros(width)
        return {"location": zeros, "log_scale": zeros - 1.0, "log_tau": jnp.zeros(())}

    def negative_elbo(p: Any, x: jax.Array, y: jax.Array, noise: jax.Array) -> jax.Array:
        weights = p["location"] + jnp.exp(p["log_scale"]) * noise
        fit = jnp.mean(jnp.logaddexp(0, -(2 * y - 1) * (weights @ x.T))) * size
        tau = p["log_tau"]
        spread = jnp.exp(2 * p["log_scale"]) + p["location"] ** 2
        terms = -p["log_scale"] + 0.5 * spread * jnp.exp(-2 * tau) + tau - 0.5
        return (jnp.sum(terms) + 0.5 * (tau / 2) ** 2 + fit) / size

    def loss(p: Any, batch: Any) -> jax.Array:
        rows, noise = batch
        return negative_elbo(p, x[rows], y[rows], noise)

    def sample(key: jax.Array) -> Any:
        a, b = jax.random.split(key)
        return jax.random.randint(a, (batch,), 0, size), jax.random.normal(b, (4, width))

    return Problem(
        init, loss, steps, sample=sample, evaluate=lambda p: negative_elbo(p, x, y, many)
    )
