"""Four more problems whose groups of parameters have different units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.kit.loop import Problem
from benchmarks.problems.small import apply, dense
from benchmarks.units.problems import photograph, runge_kutta


def render(p: Any, places: jax.Array) -> jax.Array:
    """Colours at (n, 2) places, in widths of the image from its centre: the sum of all Gaussians.

    A Gaussian is exp(−½ |S⁻¹ Rᵀ (x − position)|²) · sigmoid(opacity) · colour. Its exponent is a
    quadratic function of the place, so that a product of matrices finds all exponents at once.
    """
    cos, sin = jnp.cos(p["rotation"]), jnp.sin(p["rotation"])
    long, short = jnp.exp(-2 * p["log_scale"].T)
    xx, yy = long * cos**2 + short * sin**2, long * sin**2 + short * cos**2
    xy = (long - short) * cos * sin
    x, y = p["position"].T
    linear = xx * x + xy * y, xy * x + yy * y
    constant = -0.5 * (linear[0] * x + linear[1] * y)
    form = jnp.stack([-0.5 * xx, -xy, -0.5 * yy, *linear, constant])
    a, b = places.T
    powers = jnp.stack([a * a, a * b, b * b, a, b, jnp.ones_like(a)], 1)
    paint = jax.nn.sigmoid(p["opacity"])[:, None] * p["colour"]
    return jnp.exp(jnp.minimum(powers @ form, 0.0)) @ paint


def splats(size: int = 128, gaussians: int = 400, steps: int = 500, batch: int = 2048) -> Problem:
    """A photograph as a sum of Gaussians: position, scale, rotation, colour and opacity.

    Positions and scales are widths of the image, the latter logarithms, rotations are radians,
    opacities are logits. The published code of 3-D Gaussian splatting has a rate for each of the
    five, from 1.6e-4 (position) to 0.05 (opacity).
    """
    image = photograph(size)
    colours, middle = image.reshape(-1, 3), (size - 1) / 2
    rows, columns = jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij")
    places = jnp.stack([columns.ravel(), rows.ravel()], 1) / size - middle / size

    def init(key: jax.Array) -> dict[str, Any]:
        a, b, c = jax.random.split(key, 3)
        position = jax.random.uniform(a, (gaussians, 2), minval=-0.5, maxval=0.5)
        column, row = jnp.round((position + 0.5) * (size - 1)).astype(int).T
        spacing = jnp.log(0.6 / np.sqrt(gaussians))
        return {
            "position": position,
            "log_scale": spacing + 0.2 * jax.random.normal(b, (gaussians, 2)),
            "rotation": jax.random.uniform(c, (gaussians,), maxval=np.pi),
            "colour": image[row, column],
            "opacity": jnp.full(gaussians, -2.0),
        }

    def loss(p: Any, rows: jax.Array) -> jax.Array:
        return jnp.mean((render(p, places[rows]) - colours[rows]) ** 2)

    def sample(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (batch,), 0, size * size)

    return Problem(
        init, loss, steps, sample=sample, evaluate=lambda p: loss(p, jnp.arange(size * size))
    )


ENZYME = {"kcat": 40.0, "km": 50.0, "ki": 12.0, "extinction": 0.00622, "baseline": 0.05}


def _absorbance(p: Any, substrate: jax.Array, inhibitor: jax.Array) -> jax.Array:
    """(60, curves) absorbance, every ten seconds, with 0.02 µM of enzyme."""

    def rate(left: jax.Array) -> jax.Array:
        return -0.02 * p["kcat"] * left / (p["km"] * (1 + inhibitor / p["ki"]) + left)

    left = runge_kutta(rate, substrate, 10.0, 60)
    return p["baseline"] + p["extinction"] * (substrate - left)


def enzyme_kinetics(steps: int = 500) -> Problem:
    """Constants of an enzyme with a competitive inhibitor, from nine curves of absorbance.

    kcat is per second, Km and Ki are µM, the extinction coefficient is that of NADH, per µM and cm.
    The direction is SGD with momentum.
    """
    substrate, inhibitor = (
        jnp.repeat(jnp.array([20.0, 60, 200]), 3),
        jnp.tile(jnp.array([0.0, 10, 40]), 3),
    )
    exact = _absorbance(jax.tree.map(jnp.asarray, ENZYME), substrate, inhibitor)
    noise = np.random.default_rng(0).normal(size=exact.shape)
    measured = exact + 0.005 * jnp.asarray(noise, jnp.float32)
    variance = measured.var()

    def init(key: jax.Array) -> dict[str, Any]:
        shifts = np.array([-0.4, 0.4, 0.4, 0.1, 0.2]) + 0.1 * jax.random.normal(key, (5,))
        named = zip(ENZYME.items(), shifts, strict=True)
        return {name: true * jnp.exp(shift) for (name, true), shift in named}

    def loss(p: Any, batch: Any) -> jax.Array:
        del batch
        return jnp.mean((_absorbance(p, substrate, inhibitor) - measured) ** 2) / variance

    def momentum(rate: float) -> optax.GradientTransformation:
        return optax.sgd(rate, momentum=0.9)

    return Problem(init, loss, steps, direction=momentum)


BEST_NATS = 902.824  # of 200 patients, by SciPy's L-BFGS-B in double precision, from three starts


def gaussian_process(steps: int = 300, patients: int = 200) -> Problem:
    """Hyper-parameters of a Gaussian process on the diabetes table, all in the units of the table.

    There is one length per column (years, kg/m², mmHg, …), the mean of the target, and two
    variances in its square. As usual, softplus keeps lengths and variances positive. A run is
    judged by the nats of evidence that it lacks, and one more: nobody can tell less than a nat.
    """
    from sklearn.datasets import load_diabetes

    x, y = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    x, y = jnp.asarray(x[:patients], jnp.float32), jnp.asarray(y[:patients], jnp.float32)
    spread = x.std(0)

    def nats(p: Any) -> jax.Array:
        lengths, variance, noise = map(jax.nn.softplus, (p["length"], p["variance"], p["noise"]))
        scaled = x / lengths
        squares = jnp.sum(scaled**2, 1)
        distance = squares[:, None] + squares - 2 * scaled @ scaled.T
        kernel = variance * jnp.exp(-0.5 * jnp.maximum(distance, 0.0))
        factor = jnp.linalg.cholesky(kernel + (noise + 1e-4 * variance) * jnp.eye(patients))
        white = jax.scipy.linalg.solve_triangular(factor, y - p["mean"], lower=True)
        return 0.5 * jnp.sum(white**2) + jnp.sum(jnp.log(jnp.diagonal(factor)))

    def init(key: jax.Array) -> dict[str, Any]:
        a, b = jax.random.split(key)
        off = jnp.exp(0.3 * jax.random.normal(a, (4,)))
        lengths = 2 * spread * jnp.exp(0.2 * jax.random.normal(b, spread.shape))
        start = {"length": lengths, "variance": y.var() * off[1], "noise": y.var() * off[2]}
        return start | {"mean": y.mean() * off[3]}

    def loss(p: Any, batch: Any) -> jax.Array:
        del batch
        return nats(p) / patients

    def lacking(p: Any) -> jax.Array:
        return nats(p) - BEST_NATS + 1

    return Problem(init, loss, steps, evaluate=lacking)


WOUND = {"diffusivity": 530.0, "growth": 0.06, "capacity": 1.7e-3}
WIDTH, HOURS, DENSITY = 1900.0, 48.0, 1e-3  # µm, h, cells/µm²


def _cells() -> tuple[np.ndarray, np.ndarray]:
    """Densities after 0, 12, … 48 hours in 38 columns of 50 µm, by finite differences."""
    x = np.arange(25.0, WIDTH, 50.0)
    fine = np.arange(5.0, WIDTH, 10.0)
    u = 0.35e-3 * (2 + np.tanh((fine - 1350) / 100) - np.tanh((fine - 550) / 100))
    dt, kept = 0.02, [u]
    for step in range(1, round(HOURS / dt) + 1):
        around = np.pad(u, 1, mode="edge")
        u = u + dt * (
            WOUND["diffusivity"] * (around[2:] - 2 * u + around[:-2]) / 100
            + WOUND["growth"] * u * (1 - u / WOUND["capacity"])
        )
        if step % round(12 / dt) == 0:
            kept.append(u)
    seen = np.stack(kept).reshape(5, 38, 5).mean(2)
    return x, seen


def _density(network: Any, t: jax.Array, x: jax.Array) -> jax.Array:
    """The network's cells per µm² at one hour and one place."""
    h = jnp.stack([2 * t / HOURS - 1, 2 * x / WIDTH - 1])
    for name in "01":
        h = jnp.tanh(apply(network[name], h))
    return DENSITY * jax.nn.softplus(apply(network["2"], h)[0])


def _left_over(p: Any, t: jax.Array, x: jax.Array) -> jax.Array:
    """What u_t = D u_xx + r u (1 − u/K) leaves over, in DENSITY per 12 hours."""
    net = p["network"]
    u, u_t = jax.jvp(lambda t: _density(net, t, x), (t,), (jnp.ones_like(t),))

    def slope(x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: _density(net, t, x), (x,), (jnp.ones_like(x),))[1]

    _, u_xx = jax.jvp(slope, (x,), (jnp.ones_like(x),))
    right = p["diffusivity"] * u_xx + p["growth"] * u * (1 - u / p["capacity"])
    return (u_t - right) * 12 / DENSITY


def wound_healing(steps: int = 800, batch: int = 256) -> Problem:
    """Constants of the equation that closes a wound, beside a network for the density of cells.

    u_t = D u_xx + r u (1 − u/K), with the constants of scratch assays: D is µm² per hour, r is per
    hour, K is cells per µm². The network fits 190 noisy counts, and the equation at random points.
    """
    x, seen = _cells()
    noise = np.random.default_rng(0).normal(size=seen.shape)
    counts = jnp.asarray(seen / DENSITY + 0.03 * noise, jnp.float32).ravel()
    hours, columns = (a.ravel() for a in np.meshgrid(np.arange(0, 49, 12.0), x, indexing="ij"))
    hours, columns = jnp.asarray(hours, jnp.float32), jnp.asarray(columns, jnp.float32)

    def init(key: jax.Array) -> dict[str, Any]:
        a, b, c, d = jax.random.split(key, 4)
        shapes = (2, 32), (32, 32), (32, 1)
        network = {
            f"{n}": dense(k, *s) for n, (k, s) in enumerate(zip((a, b, c), shapes, strict=True))
        }
        shifts = np.array([-1.0, 0.5, 0.5]) + 0.2 * jax.random.normal(d, (3,))
        named = zip(WOUND.items(), shifts, strict=True)
        return {"network": network} | {name: true * jnp.exp(shift) for (name, true), shift in named}

    def loss(p: Any, points: jax.Array) -> jax.Array:
        fitted = jax.vmap(_density, (None, 0, 0))(p["network"], hours, columns) / DENSITY
        left = jax.vmap(_left_over, (None, 0, 0))(p, *(points * jnp.array([HOURS, WIDTH])).T)
        return jnp.mean((fitted - counts) ** 2) + jnp.mean(left**2)

    def sample(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (batch, 2))

    many = jax.random.uniform(jax.random.key(5), (2048, 2))
    return Problem(init, loss, steps, sample=sample, evaluate=lambda p: loss(p, many))
