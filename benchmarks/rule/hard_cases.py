"""What kills a run: seven small problems as people report them, nothing tuned.

Each is trained by the usual optimizer at the rate it is published with, by `hidlr` with the labels
one would give and by `hiulr`, with and without cosine, and judged by its training loss at the end.
Bold is worse than the untrained model, or not finite.

    python -m benchmarks.rule.hard_cases --out hard.md
    python -m benchmarks.rule.hard_cases --cases LoRA plateau --seeds 2
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.problems import small as workloads
from benchmarks.problems.small import apply, by_path, dense, first_key


class Problem(NamedTuple):
    """One report.

    Attributes:
      init: key -> params.
      loss: (params, batch) -> scalar, what is trained.
      sample: key -> batch.
      score: params -> the training loss on all the data, as it is judged.
      steps: of one run.
      labels: of the groups of `hidlr`.
      optimizer: its name and the usual rate.
      direction: the optimizer at a given rate.
      rate: that is usual.
      runs: the rows of the table: seeds, or initial rates of `hidlr` where `of_rates`.
      of_rates: whether they are.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    sample: Callable[[jax.Array], Any]
    score: Callable[[Any], jax.Array]
    steps: int
    labels: Any
    optimizer: str
    direction: Callable[[Any], optax.GradientTransformation]
    rate: float
    runs: tuple[Any, ...] = (0, 1, 2)
    of_rates: bool = False


def small_batch_lora() -> Problem:
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

    def sample(key: jax.Array) -> Any:
        rows = jax.random.randint(key, (4,), 0, len(x))
        return x[rows], y[rows]

    return Problem(
        init=lambda key: {"A": jax.random.normal(key, (16, 4)) / 4, "B": jnp.zeros((4, 64))},
        loss=loss,
        sample=sample,
        score=lambda params: loss(params, (x, y)),
        steps=300,
        labels=first_key,
        optimizer="AdamW 1e-2",
        direction=optax.adamw,
        rate=1e-2,
        runs=tuple(range(8)),
    )


def rosenbrock() -> Problem:
    """Full gradients from the origin; the initial rate should hardly matter."""

    def loss(params: Any, batch: Any = None) -> jax.Array:
        del batch
        return (1 - params["x"]) ** 2 + 100 * (params["y"] - params["x"] ** 2) ** 2

    return Problem(
        init=lambda _: {"x": jnp.zeros(()), "y": jnp.zeros(())},
        loss=loss,
        sample=lambda _: jnp.zeros(()),
        score=loss,
        steps=3000,
        labels=first_key,
        optimizer="SGD 1e-3",
        direction=optax.sgd,
        rate=1e-3,
        runs=(None, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        of_rates=True,
    )


def burgers() -> Problem:
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

    return Problem(
        init=functools.partial(workloads.mlp_init, (2, 48, 48, 48, 1)),
        loss=loss,
        sample=sample,
        score=lambda params: loss(params, sample(jax.random.key(9), 2048)),
        steps=1000,
        labels=hd.label_by_role,
        optimizer="Adam 1e-3",
        direction=optax.adam,
        rate=1e-3,
    )


def gaussian_process() -> Problem:
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

    return Problem(
        init=init,
        loss=loss,
        sample=lambda _: jnp.zeros(()),
        score=loss,
        steps=1000,
        labels=first_key,
        optimizer="Adam 1e-2",
        direction=optax.adam,
        rate=1e-2,
    )


def normalised_cnn() -> Problem:
    """MNIST-5k, batch norm by the statistics of the batch, dropout, momentum at ResNet's rate."""
    splits = workloads.mnist_cnn().splits
    images, digits = splits["train"]

    def norm(params: Any, x: jax.Array) -> jax.Array:
        x = x - x.mean((0, 1, 2))
        return x / jnp.sqrt((x**2).mean((0, 1, 2)) + 1e-5) * params["scale"] + params["bias"]

    def loss(params: Any, batch: Any, dropout: float = 0.5) -> jax.Array:
        x, y, key = batch
        x = x.reshape(-1, 28, 28, 1)
        for n in "01":
            x = workloads.patches(x) @ params[f"conv{n}"]["kernel"]
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
    return Problem(
        init=init,
        loss=loss,
        sample=sample,
        score=lambda params: loss(params, (images, digits, jax.random.key(0)), dropout=0.0),
        steps=300,
        labels=by_path(rules, "rest"),
        optimizer="momentum 1e-1",
        direction=functools.partial(optax.sgd, momentum=0.9),
        rate=1e-1,
    )


def language_model() -> Problem:
    """The transformer of `workloads.text`, for twice as long."""
    text = workloads.text()
    train = text.splits["train"]
    return Problem(
        init=text.init,
        loss=text.loss,
        sample=text.sample,
        score=lambda params: text.loss(params, train),
        steps=600,
        labels=text.groupings["roles"],
        optimizer="AdamW 3e-3",
        direction=optax.adamw,
        rate=3e-3,
    )


def plateau() -> Problem:
    """A deep tanh network that starts small: flat for 60 steps, and then sharply curved."""
    digits = workloads.WORKLOADS["digits"]()
    depth, shrunk = 6, 0.4

    def model(params: Any, x: jax.Array) -> jax.Array:
        for n in range(depth - 1):
            x = jnp.tanh(apply(params[f"layer{n}"], x))
        return apply(params[f"layer{depth - 1}"], x)

    def init(key: jax.Array) -> Any:
        params = workloads.mlp_init((64, *(48,) * (depth - 1), 10), key)
        return jax.tree.map(lambda w: shrunk * w, params)

    loss = functools.partial(workloads.cross_entropy, model)
    return Problem(
        init=init,
        loss=loss,
        sample=digits.sample,
        score=lambda params: loss(params, digits.splits["train"]),
        steps=400,
        labels=first_key,
        optimizer="momentum 1e-1",
        direction=functools.partial(optax.sgd, momentum=0.9),
        rate=1e-1,
    )


def turned_digits() -> Problem:
    """LoRA in both layers of a trained MLP, whose images are then turned by 90 degrees."""
    digits = workloads.WORKLOADS["digits"]()
    hidden = "layer0", "layer1"

    def model(params: Any, x: jax.Array) -> jax.Array:
        for name in hidden:
            x = jax.nn.relu(apply(params[name], x))
        return apply(params["layer2"], x)

    upright = functools.partial(workloads.cross_entropy, model)
    trained = _trained(upright, workloads.mlp_init((64, 128, 64, 10), jax.random.key(0)), digits)
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

    def sample(key: jax.Array) -> Any:
        rows = jax.random.randint(key, (64,), 0, len(images))
        return images[rows], labels[rows]

    return Problem(
        init=init,
        loss=loss,
        sample=sample,
        score=lambda params: loss(params, (images, labels)),
        steps=300,
        labels=first_key,
        optimizer="AdamW 3e-2",
        direction=optax.adamw,
        rate=3e-2,
    )


def _trained(loss: Any, params: Any, workload: Any, steps: int = 300) -> Any:
    """Parameters after a usual training run."""
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, workload.sample(key))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys)[0][0])()


CASES: dict[str, Callable[[], Problem]] = {
    "turned digits": turned_digits,
    "LoRA": small_batch_lora,
    "Rosenbrock": rosenbrock,
    "PINN": burgers,
    "Gaussian process": gaussian_process,
    "CNN": normalised_cnn,
    "language model": language_model,
    "plateau": plateau,
}
SCHEDULES = ("constant", "cosine")


def _schedule(name: str, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(1.0, steps) if name == "cosine" else lambda _: jnp.ones(())


def usual(problem: Problem, schedule: str, rate: Any) -> Any:
    """The published setting; `rate` is of `hidlr` alone."""
    del rate
    shape = _schedule(schedule, problem.steps)
    return problem.direction(lambda count: problem.rate * shape(count))


def ours(rule: Callable[..., Any], problem: Problem, schedule: str, rate: Any) -> Any:
    """A rule with its defaults."""
    settings: dict[str, Any] = {"init_learning_rate": rate} if problem.of_rates else {}
    if schedule == "cosine":
        settings["schedule"] = _schedule(schedule, problem.steps)
    return optax.chain(problem.direction(1.0), rule(problem, **settings))


def _groups(problem: Problem, **settings: Any) -> Any:
    return hd.hidlr(problem.loss, problem.labels, **settings)


def _one(problem: Problem, **settings: Any) -> Any:
    return hd.hiulr(problem.loss, **settings)


METHODS: dict[str, Callable[..., Any]] = {
    "usual": usual,
    "hidlr": functools.partial(ours, _groups),
    "hiulr": functools.partial(ours, _one),
}
COLUMNS = [f"{name}{tail}" for name in METHODS for tail in ("", ", cosine")]


def train(problem: Problem, tx: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One run -> the score before and after."""
    tx = optax.with_extra_args_support(tx)
    init_key, batch_key = jax.random.split(key)
    start = problem.init(init_key)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        batch = problem.sample(key)
        loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=loss, grad=grads)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batch_key, problem.steps)
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), keys)
    return problem.score(start), problem.score(params)


def results(problem: Problem, make: Any, schedule: str, runs: Any) -> Iterator[tuple[float, float]]:
    """The scores of one method, before and after, for each run of the problem."""

    @functools.cache
    def compiled(found: bool) -> Any:
        def run(key: jax.Array, rate: jax.Array) -> Any:
            return train(problem, make(problem, schedule, None if found else rate), key)

        return jax.jit(run)

    for run in runs:
        seed, rate = (0, run) if problem.of_rates else (run, None)
        before, after = compiled(rate is None)(jax.random.key(seed), jnp.float32(rate or 0.0))
        yield float(before), float(after)


def _cell(before: float, after: float) -> str:
    return f"{after:.3g}" if after <= before else f"**{after:.3g}**"


def rows(name: str, limit: int | None, progress: Any) -> list[str]:
    """The lines of one problem."""
    problem = CASES[name]()
    runs = problem.runs[:limit]
    columns = []
    for method, make in METHODS.items():
        for schedule in SCHEDULES:
            start = time.perf_counter()
            columns.append(list(results(problem, make, schedule, runs)))
            seconds = (time.perf_counter() - start) / len(runs)
            progress.set_postfix_str(f"{name}: {method}, {schedule}, {seconds:.1f} s a run")
            progress.update()
    lines = []
    for run, scores in zip(runs, zip(*columns, strict=True), strict=True):
        label = f"{run:g}" if run is not None else "found"
        row = f"from {label}" if problem.of_rates else f"seed {label}"
        cells = [name, row, problem.optimizer, f"{scores[0][0]:.3g}"]
        lines.append("| " + " | ".join([*cells, *(_cell(*score) for score in scores)]) + " |")
    return lines


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, help="rows per case, all of them where left out")
    parser.add_argument("--out", type=Path, help="the table goes there too")
    args = parser.parse_args()
    lines = ["| case | run | usual optimizer | untrained | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (4 + len(COLUMNS)) + "|")
    with tqdm(total=len(args.cases) * len(COLUMNS), disable=None) as progress:
        for name in args.cases:
            lines += rows(name, args.seeds, progress)
            if args.out is not None:
                args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
