"""Inputs that killed runs, or hid what was wrong, under the rule before: one of each kind.

Each test says what is right, and knows it from runs with tuned rates, which are done beside it
where they take no time.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from support import promoting

import hidlr_optax as hd

_lenient = functools.partial(promoting, "standard")
pytestmark = pytest.mark.usefixtures("optimized")


def _normal(seed, *size):
    return jax.random.normal(jax.random.key(seed), size)


def _scan(tx, loss_fn, params, batches, seen=lambda state, loss: loss, batch_of=lambda n: n):
    """Parameters, state, and what was seen at each step of a run."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, now):
        *carry, loss = hd.take_step(tx, loss_fn, *carry, batch_of(now))
        return tuple(carry), seen(carry[1], loss)

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, tx.init(params)), batches)

    (params, state), found = run(params, batches)
    return params, state, jax.tree.map(np.asarray, found)


def _rate(name):
    return lambda state, loss: optax.tree.get(state, "group_learning_rates")[name]


def _by_leaf(params):
    return {name: name for name in params}


# One odd batch at the start.


@pytest.mark.parametrize("disturbed", [False, True], ids=["clean", "disturbed"])
@pytest.mark.parametrize(
    "direction",
    [optax.sgd(1.0, momentum=0.9), optax.adamw(1.0), optax.sgd(1.0)],
    ids=["momentum", "AdamW", "SGD"],
)
def test_one_odd_batch_early_does_no_lasting_harm(direction, disturbed):
    """The noise of the targets alone is a loss of 0.01."""
    target = jnp.arange(1.0, 9.0) / 4

    def batch_of(now):
        n, key = now
        x = jax.random.normal(key, (64, 8))
        y = x @ target + 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (64,))
        return x, jnp.where(disturbed & (n == 1), -0.5 * y, y)

    def loss_fn(params, batch):
        return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)

    tx = optax.chain(_lenient(direction), hd.hiulr(None))
    keys = jnp.arange(1000), jax.random.split(jax.random.key(0), 1000)
    *_, losses = _scan(tx, loss_fn, {"w": jnp.zeros(8)}, keys, batch_of=batch_of)
    assert losses[-50:].mean() < 0.02  # a constant rate of AdamW adds to the noise


# Batch losses with a heavy tail.


@pytest.mark.parametrize("tail", ["normal", "outlying", "skewed"])
def test_a_healthy_run_keeps_its_rates_whatever_the_distribution_of_its_losses(tail):
    steps = 8000
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, 4, 50)) / np.sqrt(np.arange(1, 51))
    noise = rng.normal(size=(steps, 4))
    if tail == "outlying":
        noise *= np.where(rng.random((steps, 1)) < 0.05, 5, 1)
    if tail == "skewed":
        noise = rng.exponential(size=(steps, 4)) ** 2
    y = x @ rng.normal(size=50) + noise

    def loss_fn(params, batch):
        return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)

    tx = optax.chain(_lenient(optax.adam(1.0)), hd.hiulr(None))
    batches = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    *_, rates = _scan(tx, loss_fn, {"w": jnp.zeros(50)}, batches, _rate("all"))
    assert rates[-1] > rates[500] / 4


# The loss rises because the objective moves.


def test_rates_follow_the_task_and_not_the_value_of_the_loss():
    """Every 500 steps another task, each a tenth heavier than the one before."""

    def batch_of(now):
        n, key = now
        task = n // 500
        x, turn = jax.random.normal(key, (32, 4)), task.astype(jnp.float32)
        frequency = (1 + task % 3).astype(jnp.float32)
        return x, jnp.sin(x[:, :1] * frequency + turn), 1.1**turn

    def loss_fn(params, batch):
        x, goal, weight = batch
        return weight * jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - goal) ** 2)

    def seen(state, loss):
        return loss, optax.tree.get(state, "group_learning_rates", {"a": jnp.ones(())})["a"]

    params = {"a": _normal(0, 4, 32) / 2, "b": _normal(1, 32, 1) / 6}
    steps = jnp.arange(6000), jax.random.split(jax.random.key(2), 6000)
    late, rates = {}, {}
    for name, tx in {
        "tuned": _lenient(optax.adam(0.03)),
        "found": optax.chain(_lenient(optax.adam(1.0)), hd.hidlr(None, _by_leaf(params))),
    }.items():
        *_, (losses, rates[name]) = _scan(tx, loss_fn, params, steps, seen, batch_of)
        unweighted = losses / 1.1 ** (np.arange(6000) // 500)
        late[name] = unweighted.reshape(12, 500)[:, 300:].mean()
    assert rates["found"][20:].min() > 0.003
    assert late["found"] < 1.2 * late["tuned"]


# A warm-up that is long against the steps in which rates are found.


@pytest.mark.parametrize("warmup", [0, 2000])
@pytest.mark.parametrize(
    ("direction", "tuned"),
    [
        pytest.param(
            optax.adamw(1.0),
            0.135,
            marks=pytest.mark.xfail(strict=False, reason="0.231 without a warm-up, 0.301 with one"),
        ),
        (optax.sgd(1.0), 0.13),
    ],
    ids=["AdamW", "SGD"],
)
def test_a_warmup_of_any_length_ends_near_the_tuned_run(direction, tuned, warmup):
    """Untrained 1.73; the rule before ended at 0.40 and 1.22."""
    first, second = _normal(6, 16, 32), _normal(8, 32, 5)

    def data(key, size=64):
        x = jax.random.normal(key, (size, 16))
        return x, jnp.argmax(jnp.tanh(x @ first / 3) @ second, -1)

    def loss_fn(params, batch):
        hidden = jnp.tanh(batch[0] @ params["a"] + params["b"])
        logits = hidden @ params["h"] + params["c"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = {"a": _normal(7, 16, 64) / 4, "b": jnp.zeros(64)}
    params |= {"h": _normal(9, 64, 5) / 8, "c": jnp.zeros(5)}
    labels = {"a": "body", "b": "body", "h": "head", "c": "head"}
    schedule = optax.cosine_decay_schedule(1.0, 4000)
    if warmup:
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, 4000)
    tx = _lenient(optax.chain(direction, hd.hidlr(None, labels, schedule=schedule)))
    keys = jax.random.split(jax.random.key(0), 4000)
    with jax.numpy_dtype_promotion("standard"):
        params, *_ = _scan(tx, loss_fn, params, keys, batch_of=data)
    assert loss_fn(params, data(jax.random.key(99), 2000)) < 1.3 * tuned


# Digits: short last batches, and directions without momentum.


@functools.cache
def _digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16).astype(np.float32), y[order].astype(np.int32)


def _layer(seed, inputs, outputs):
    return {"w": _normal(seed, inputs, outputs) / inputs**0.5, "b": jnp.zeros(outputs)}


def _logits(params, x):
    for layer in list(params.values())[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    last = list(params.values())[-1]
    return x @ last["w"] + last["b"]


def _digits_loss(params, batch):
    rows, weights = batch
    x, y = map(jnp.asarray, _digits())
    losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, x[rows]), y[rows])
    return jnp.sum(losses * weights) / jnp.sum(weights)


def _test_loss(params, begin):
    rows = jnp.arange(begin, len(_digits()[0]))
    return float(_digits_loss(params, (rows, jnp.ones(len(rows)))))


@pytest.mark.parametrize("tail", [64, 8, 2])
@pytest.mark.parametrize(
    ("direction", "rates"),
    [
        (optax.sgd, (0.1, 0.3, 1.0)),
        (functools.partial(optax.sgd, momentum=0.9), (0.01, 0.03, 0.1)),
        (optax.adamw, (1e-3, 3e-3, 1e-2)),
    ],
    ids=["SGD", "momentum", "AdamW"],
)
def test_a_short_last_batch_costs_nothing(request, direction, rates, tail):
    """Ten batches an epoch, the last of which has so many examples, however few."""
    if request.node.callspec.id == "SGD-2":
        request.applymarker(pytest.mark.xfail(strict=False, reason="rate 0.087, below 0.1"))
    params = {"body": _layer(0, 64, 32), "head": _layer(1, 32, 10)}

    def batch_of(n):
        rows = jax.random.permutation(jax.random.fold_in(jax.random.key(0), n // 10), 640)
        rows = jax.lax.dynamic_slice(rows, ((n % 10) * 64,), (64,))
        size = jnp.where(n % 10 == 9, tail, 64)
        return rows, (jnp.arange(64) < size).astype(jnp.float32)

    def trained(tx, seen=lambda state, loss: loss):
        run = _scan(tx, _digits_loss, params, jnp.arange(400), seen, batch_of)
        return _test_loss(run[0], 800), run[2]

    tuned = {rate: trained(_lenient(direction(rate)))[0] for rate in rates}
    tx = optax.chain(_lenient(direction(1.0)), hd.hidlr(None, lambda p: _by_leaf(p)))
    found, path = trained(tx, lambda state, loss: hd.metrics(state)["learning_rate/body"])
    assert found < 1.35 * min(tuned.values())
    assert path[-1] > min(rates)


@pytest.mark.slow
@pytest.mark.xfail(
    strict=False,
    reason="1.5 to 2.1 times the tuned loss: 0.074, 0.088, 0.087, 0.061",
)
@pytest.mark.parametrize(
    ("direction", "rates"),
    [
        (optax.adafactor, (1e-2, 3e-2, 1e-1)),
        (optax.rmsprop, (1e-3, 3e-3, 1e-2)),
        (functools.partial(optax.adam, b1=0.0), (1e-3, 3e-3, 1e-2)),
        (optax.adamw, (3e-3, 1e-2, 3e-2)),
    ],
    ids=["Adafactor", "RMSProp", "Adam with b1=0", "AdamW"],
)
def test_directions_without_momentum_are_not_starved(direction, rates):
    params = {"a": _layer(0, 64, 64), "b": _layer(1, 64, 64), "d": _layer(2, 64, 10)}
    cosine = optax.cosine_decay_schedule(1.0, 300)

    def batch_of(n):
        key = jax.random.fold_in(jax.random.key(0), n)
        return jax.random.randint(key, (64,), 0, 1400), jnp.ones(64)

    def trained(tx):
        with jax.numpy_dtype_promotion("standard"):
            return _test_loss(
                _scan(tx, _digits_loss, params, jnp.arange(300), batch_of=batch_of)[0], 1400
            )

    tuned = [
        trained(optax.chain(direction(rate), optax.scale_by_schedule(cosine))) for rate in rates
    ]
    rule = hd.hidlr(None, lambda p: _by_leaf(p), schedule=cosine)
    assert trained(optax.chain(direction(1.0), rule)) < 1.2 * min(tuned)


# Every tenth batch has no slope.


@pytest.mark.parametrize("interval", [10, 7])
def test_a_refresh_that_meets_a_masked_batch_is_put_off_to_the_next(interval):
    target = _normal(9, 8)

    def batch_of(n):
        key = jax.random.fold_in(jax.random.key(0), n)
        x = jax.random.normal(key, (32, 8))
        noise = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (32,))
        return x, jnp.sin(x @ target) + noise, jnp.where(n % 10 == 0, 0.0, 1.0)

    def loss_fn(params, batch):
        x, y, weight = batch
        return weight * jnp.mean((jnp.tanh(x @ params["w"]) @ params["o"] - y) ** 2)

    params = {"w": _normal(1, 8, 64) / 3, "o": _normal(2, 64) / 8}
    rule = hd.hidlr(None, _by_leaf(params), update_interval=interval)
    _, state, looks = _scan(
        optax.chain(optax.sgd(1.0), rule),
        loss_fn,
        params,
        jnp.arange(500),
        lambda state, loss: hd.report.find_state(state).memory.looks,
        batch_of,
    )
    # One a due refresh; 500 steps are less than 50 intervals of ten.
    assert looks[-1] - looks[20] >= 0.9 * 480 / max(interval, 10)
    assert "frozen" not in hd.explain(state)


# LoRA on a random base.


@pytest.mark.slow
@pytest.mark.xfail(strict=False, reason="ends at 3.25 where Prodigy ends at 2.07")
def test_adapters_of_a_random_transformer_do_not_overshoot():
    """Untrained 3.6; at most a tenth above Prodigy with nothing tuned."""
    words, width, length, rank, steps = 32, 32, 16, 4, 150
    shapes = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    chain = np.random.default_rng(0).dirichlet(np.full(words, 0.05), words).cumsum(1)

    def sequences(size, seed):
        rng = np.random.default_rng(seed)
        texts = np.zeros((size, length), np.int32)
        texts[:, 0] = rng.integers(0, words, size)
        for n in range(1, length):
            drawn = rng.random(size)[:, None] > chain[texts[:, n - 1]]
            texts[:, n] = np.minimum(drawn.sum(1), words - 1)
        return jnp.asarray(texts)

    keys = iter(jax.random.split(jax.random.key(0), 99))

    def kernel(*size):
        return jax.random.normal(next(keys), size) / size[0] ** 0.5

    embed, place = kernel(words, width), 0.1 * kernel(length, width)
    base = [{name: kernel(*size) for name, size in shapes.items()} for _ in range(2)]
    start = [
        {
            name: {"lora_A": kernel(size[0], rank), "lora_B": jnp.zeros((rank, size[1]))}
            for name, size in shapes.items()
        }
        for _ in range(2)
    ]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def loss_fn(adapters, texts):
        x = embed[texts] + place
        for layer, lora in zip(base, adapters, strict=True):

            def linear(name, x, layer=layer, lora=lora):
                return x @ layer[name] + (x @ lora[name]["lora_A"]) @ lora[name]["lora_B"]

            q, k, v = jnp.split(linear("qkv", norm(x)), 3, -1)
            scores = jnp.where(jnp.tri(length, dtype=bool), q @ k.mT / width**0.5, -1e9)
            x = x + linear("out", jax.nn.softmax(scores) @ v)
            x = x + linear("down", jax.nn.gelu(linear("up", norm(x))))
        logits = norm(x) @ embed.T * width**0.5
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], texts[:, 1:]).mean()

    batches = jnp.stack([sequences(16, n) for n in range(steps)])
    labels = hd.label_by_path(start, [(".*lora_A", "A"), (".*lora_B", "B")])
    ends = {}
    for name, tx in {
        "Prodigy": optax.contrib.prodigy(1.0),
        "found": optax.chain(optax.adamw(1.0), hd.hidlr(None, labels)),
    }.items():
        with jax.numpy_dtype_promotion("standard"):
            adapters, *_ = _scan(tx, loss_fn, start, batches)
            ends[name] = float(loss_fn(adapters, sequences(256, 9999)))
    assert ends["found"] < 1.1 * ends["Prodigy"]


# A schedule that rises again.


@pytest.mark.parametrize(
    "direction", [optax.sgd(1.0, momentum=0.9), optax.adamw(1.0)], ids=["momentum", "AdamW"]
)
def test_the_peaks_of_all_cycles_of_warm_restarts_are_alike(direction):
    cycles, length = 8, 150

    def stack(seed, *widths):
        sizes = itertools.pairwise(widths)
        return {f"layer{n}": _layer(10 * seed + n, *size) for n, size in enumerate(sizes)}

    def network(params, x):
        for n in range(3):
            x = x @ params[f"layer{n}"]["w"] + params[f"layer{n}"]["b"]
            x = jnp.tanh(x) if n < 2 else x
        return x

    teacher = jax.tree.map(lambda leaf: 2 * leaf, stack(7, 16, 32, 32, 1))

    def loss_fn(params, key):
        x = jax.random.normal(key, (32, 16))
        noise = 0.5 * jax.random.normal(jax.random.fold_in(key, 1), (32, 1))
        return jnp.mean((network(params, x) - network(teacher, x) - noise) ** 2)

    def cosine(n):
        return 0.5 * (1 + jnp.cos(jnp.pi * (n % length).astype(jnp.float32) / length))

    tx = optax.chain(_lenient(direction), hd.hidlr(None, hd.label_by_depth, schedule=cosine))
    keys = jax.random.split(jax.random.key(0), cycles * length)
    *_, rates = _scan(
        tx,
        loss_fn,
        stack(0, 16, 64, 64, 1),
        keys,
        lambda state, loss: hd.metrics(state)["learning_rate/depth_1"],
    )
    peaks = rates.reshape(cycles, length)[1:].max(axis=1)
    assert peaks.max() < 2 * peaks.min()


# What is said of a run, and what a run may be put into.


@pytest.mark.xfail(
    strict=False, reason="nothing compares gradients along the step: Nothing stands out"
)
def test_explain_names_a_gradient_that_is_deliberately_another():
    """The semi-gradient of temporal differences; all arithmetic is in float32."""
    features, following = (
        _normal(0, 64, 16),
        jax.random.randint(jax.random.key(1), (64,), 0, 64),
    )

    def value(params, x):
        return jnp.tanh(x @ params["w"]) @ params["o"]

    def loss_fn(params, rows):
        later = jax.lax.stop_gradient(value(params, features[following[rows]]))
        return jnp.mean((1.0 + 0.95 * later - value(params, features[rows])) ** 2)

    params = {"w": _normal(2, 16, 64) / 4, "o": _normal(3, 64) / 8}
    tx = optax.chain(_lenient(optax.adamw(1.0)), hd.hidlr(None, _by_leaf(params)))
    keys = jax.random.split(jax.random.key(4), 200)
    _, state, _ = _scan(
        tx, loss_fn, params, keys, batch_of=lambda key: jax.random.randint(key, (64,), 0, 64)
    )
    assert "bfloat16" not in hd.explain(state)
    assert "`grad` is not the gradient" in hd.explain(state)


def _small_loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - 1.0) ** 2)


def _small_run(key, steps=30):
    params = {"w": jax.random.normal(key, (3, 4)), "v": jnp.ones(4) / 4}
    tx = optax.chain(_lenient(optax.adam(1.0)), hd.hiulr(None))
    keys = jax.random.split(key, steps)
    return _scan(
        tx, _small_loss, params, keys, batch_of=lambda key: jax.random.normal(key, (16, 3))
    )[1]


def test_explain_of_many_runs_says_how_to_take_one():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jnp.ones((3, 3, 4)), "v": jnp.ones((3, 4)) / 4}
    tx = optax.chain(_lenient(optax.adam(1.0)), hd.hiulr(None))

    def train(params, key):
        x = jax.random.normal(key, (16, 3))
        return hd.take_step(tx, _small_loss, params, tx.init(params), x)[1]

    states = jax.jit(jax.vmap(train))(params, keys)
    with pytest.raises(ValueError, match=r"of \(3,\) runs.*jax\.tree\.map\(lambda leaf: leaf\[0\]"):
        hd.explain(states)
    assert "1 updates" in hd.explain(jax.tree.map(lambda leaf: leaf[0], states))


@pytest.mark.parametrize("labels", ["all", {"w": "w", "v": "v"}], ids=["one", "two"])
def test_a_training_step_can_be_differentiated(labels):
    """Forwards and backwards alike; the rates themselves are constants."""
    tx, x = optax.chain(optax.sgd(1.0), hd.hidlr(None, labels)), _normal(0, 16, 3)

    def after(params):
        state = tx.init(params)
        for _ in range(2):
            params, state, _ = hd.take_step(tx, _small_loss, params, state, x)
        return _small_loss(params, x)

    start = {"w": _normal(1, 3, 4), "v": _normal(2, 4)}
    backwards, forwards = (jax.jit(d(after))(start) for d in (jax.grad, jax.jacfwd))
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(backwards))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), forwards, backwards
    )


def test_no_number_of_a_healthy_run_is_infinite():
    state = hd.hidlr(None, "all").init({"w": jnp.zeros(2)})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    jax.config.update("jax_debug_infs", True)
    try:
        assert np.isfinite(hd.metrics(_small_run(jax.random.key(0), steps=3))["learning_rate/all"])
    finally:
        jax.config.update("jax_debug_infs", False)
