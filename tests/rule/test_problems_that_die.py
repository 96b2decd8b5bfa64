"""Problems at which runs have died, or did not move, under an earlier rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hidlr_optax as hd
from benchmarks.kit.loop import Method, Problem, descend, run, train
from benchmarks.problems import small


@pytest.fixture(scope="module")
def turned_digits():
    """LoRA in a trained network whose images are turned by 90 degrees: its loss begins at 20."""
    with jax.numpy_dtype_promotion("standard"):
        return _turned_digits()


def _turned_digits():
    digits = small.PROBLEMS["digits"]()
    hidden = "layer0", "layer1"

    def model(params, x):
        for name in hidden:
            x = jax.nn.relu(small.apply(params[name], x))
        return small.apply(params["layer2"], x)

    upright = functools.partial(small.cross_entropy, model)
    start = small.mlp_init((64, 128, 64, 10), jax.random.key(0))
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 300))
    keys = jax.random.split(jax.random.key(1), 300)
    task = digits._replace(loss=upright)
    trained = jax.jit(lambda: descend(task, tx, (start, tx.init(start)), keys)[0][0])()
    images, labels = digits.splits["train"]
    images = jnp.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

    def adapted(params):
        layers = {
            n: trained[n] | {"kernel": trained[n]["kernel"] + params["A"][n] @ params["B"][n]}
            for n in hidden
        }
        return layers | {"layer2": params["head"]}

    def init(key):
        keys = dict(zip(hidden, jax.random.split(key), strict=True))
        sizes = {n: trained[n]["kernel"].shape for n in hidden}
        scale = jax.nn.initializers.he_uniform()
        return {
            "A": {n: scale(keys[n], (sizes[n][0], 8)) for n in hidden},
            "B": {n: jnp.zeros((8, sizes[n][1])) for n in hidden},
            "head": trained["layer2"],
        }

    def loss(params, batch):
        return upright(adapted(params), batch)

    return Problem(init, loss, 300, {"train": (images, labels)}, 64)


def _rosenbrock(params, batch):
    del batch
    return (1 - params[0]) ** 2 + 100 * (params[1] - params[0] ** 2) ** 2


@pytest.mark.parametrize("initial", [1e-4, 1e-3, 3e-3, None])
def test_no_rate_dies_on_rosenbrock_wherever_it_begins(initial):
    warmup = 20 if initial is None else 0
    rule = hd.hiulr(_rosenbrock, init_learning_rate=initial, warmup=warmup)
    tx = optax.chain(optax.sgd(1.0), rule)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(_rosenbrock)(params, None)
        updates, state = tx.update(grad, state, params, value=value, grad=grad)
        rate = state[1].group_learning_rates["all"]
        return (optax.apply_updates(params, updates), state), (value, rate)

    start = jnp.zeros(2), tx.init(jnp.zeros(2))
    _, (losses, rates) = jax.jit(lambda start: jax.lax.scan(step, start, length=3000))(start)
    assert np.all(np.isfinite(losses))
    assert np.all(np.asarray(rates[1:]) > 0.99e-4)  # the edge of stability is at 1e-3 to 5e-3
    assert float(losses[-1]) < 2e-2  # 1 at the start


@pytest.fixture(scope="module")
def adapters():
    """LoRA on a small network, whose loss untrained is 1.22; tuned AdamW reaches 0.78 to 0.86."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    first, second = normal(16, 64) / 4, normal(64, 5) / 8
    change, x = normal(16, 2) @ normal(2, 64) / 6, normal(1024, 16)
    y = jnp.argmax(jax.nn.gelu(x @ (first + change)) @ second + 0.3 * normal(1024, 5), 1)

    def loss(params, batch):
        logits = jax.nn.gelu(batch[0] @ (first + 2 * params["A"] @ params["B"])) @ second
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss, x, y


@pytest.mark.xfail(strict=False, reason="without a schedule one seed of eight ends at 1.82")
@pytest.mark.parametrize("steps", [None, 300], ids=["constant", "cosine"])
def test_small_batches_do_not_kill_adapters(adapters, steps):
    loss, x, y = adapters
    schedule = None if steps is None else optax.cosine_decay_schedule(1.0, steps)
    rates = hd.hidlr(loss, {"A": "A", "B": "B"}, schedule=schedule)
    tx = optax.chain(optax.adamw(1.0), rates)

    def run(a, key):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (4,), 0, 768)
            batch = x[rows], y[rows]
            value, grad = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
            return (optax.apply_updates(params, updates), state), None

        params = {"A": a, "B": jnp.zeros((4, 64))}
        with jax.numpy_dtype_promotion("standard"):  # AdamW's own
            (params, _), _ = jax.lax.scan(
                step, (params, tx.init(params)), jax.random.split(key, 300)
            )
        return loss(params, (x[:768], y[:768]))

    a = jnp.stack([jax.random.normal(jax.random.key(seed), (16, 4)) / 4 for seed in range(8)])
    losses = jax.jit(jax.vmap(run))(a, jax.random.split(jax.random.key(9), 8))
    assert np.max(losses) < (1.2 if steps is None else 1.0)
    assert np.median(losses) < (1.0 if steps is None else 0.9)


def _long_chain(params, batch):
    """A product of eight numbers: flat where they are small, and steeper than any parabola."""
    return jnp.mean((batch * jnp.prod(params["w"]) * jnp.prod(params["v"]) - batch) ** 2)


@pytest.mark.parametrize("labels", ["all", {"w": "w", "v": "v"}], ids=["one", "two"])
@pytest.mark.parametrize(
    "direction", [optax.sgd(1.0), optax.sgd(1.0, momentum=0.9)], ids=["SGD", "momentum"]
)
def test_no_run_dies_where_a_plateau_ends(direction, labels):
    """Rates grow where it is flat. With the first version, one run of six is lost to NaN."""
    tx = optax.chain(direction, hd.hidlr(_long_chain, labels))

    def run(key):
        def step(carry, key):
            params, state = carry
            batch = jax.random.normal(key, (16,))
            value, grad = jax.value_and_grad(_long_chain)(params, batch)
            updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
            return (optax.apply_updates(params, updates), state), value

        noise = jax.random.normal(key, (4,))
        params = {"w": 0.4 + 0.04 * noise, "v": jnp.full(4, 0.4)}
        start = params, tx.init(params)
        (params, _), losses = jax.lax.scan(step, start, jax.random.split(key, 300))
        return _long_chain(params, jnp.ones(1)), jnp.max(losses)

    last, highest = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 12))
    assert np.all(last < 5e-2)
    assert np.all(highest < 20)  # at the start 1 in the mean, up to 3


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("labels", [small.first_key, "all"], ids=["groups", "one"])
def test_no_run_dies_where_the_loss_has_fallen_far(turned_digits, labels, schedule):
    """From 20 to 2 in as many steps. Averages of the beginning made rates four times too large.

    The loss ended at chance, 2.3, in all three seeds.
    """
    problem = turned_digits
    decay = None if schedule == "constant" else optax.cosine_decay_schedule(1.0, problem.steps)
    tx = optax.chain(optax.adamw(1.0), hd.hidlr(problem.loss, labels, schedule=decay))

    @jax.jit
    def trained(key):
        start = problem.init(jax.random.split(key)[0])
        return problem.judged(start), problem.judged(run(problem, tx, key)[0])

    with jax.numpy_dtype_promotion("standard"):  # AdamW's own
        found = [trained(jax.random.key(seed)) for seed in range(3)]
    assert all(before > 10 and after < 1.5 for before, after in found)


def _rewarded(make, passes=2, iterations=100):
    """The mean reward of the last batches of a policy that is trained as proximal policies are.

    The ratio to the policy that has acted is 1 at the first pass, and advantages have mean zero: so
    the value of the loss is zero whatever the policy, and its gradient is not.
    """
    right = jax.random.normal(jax.random.key(9), (6, 8))

    def logits(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def log_likelihood(params, x, action):
        return jnp.take_along_axis(jax.nn.log_softmax(logits(params, x)), action[:, None], 1)[:, 0]

    def loss(params, batch):
        x, action, advantage, before = batch
        ratio = jnp.exp(log_likelihood(params, x, action) - before)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))

    tx = optax.with_extra_args_support(make(loss))

    def update(batch, carry):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state

    def iteration(carry, key):
        to_look, to_act = jax.random.split(key)
        x = jax.random.normal(to_look, (256, 6))
        action = jax.random.categorical(to_act, logits(carry[0], x))
        reward = (action == jnp.argmax(x @ right, 1)).astype(jnp.float32)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        batch = x, action, advantage, log_likelihood(carry[0], x, action)
        return jax.lax.fori_loop(0, passes, lambda _, c: update(batch, c), carry), reward.mean()

    def train(keys):
        to_w, to_v = jax.random.split(jax.random.key(1))
        params = {
            "w": jax.random.normal(to_w, (6, 32)) / 2.4,
            "v": 0.01 * jax.random.normal(to_v, (32, 8)),
        }
        return jax.lax.scan(iteration, (params, tx.init(params)), keys)[1]

    with jax.numpy_dtype_promotion("standard"):  # Adam's own
        rewards = jax.jit(train)(jax.random.split(jax.random.key(3), iterations))
    return float(jnp.mean(rewards[-10:]))


@pytest.mark.xfail(strict=False, reason="the reward of one seed of two is 0.12")
def test_a_policy_learns_whose_loss_is_zero_whatever_it_is():
    rewards = [
        _rewarded(lambda loss: optax.adam(0.01)),
        _rewarded(lambda loss: optax.chain(optax.adam(1.0), hd.hidlr(loss, {"w": "w", "v": "v"}))),
    ]
    assert min(rewards) > 0.5  # one eighth at the beginning


@pytest.mark.parametrize("direction", [optax.adamw(1.0), optax.sgd(1.0)], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("constant", [-1.0, 10.0])
def test_a_constant_in_the_loss_kills_no_run(direction, constant):
    rng = np.random.default_rng(0)
    x, to_hidden, to_classes = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((1024, 16), (16, 6), (16, 64))
    )
    y = jnp.argmax(x @ to_hidden, 1)

    def loss(params, batch):
        logits = jax.nn.relu(batch[0] @ params["a"]) @ params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean() + constant

    tx = optax.chain(direction, hd.hidlr(loss, {"a": "a", "b": "b"}))

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (32,), 0, len(x))
        batch = x[chosen], y[chosen]
        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return (optax.apply_updates(params, updates), state), None

    params = {"a": to_classes / 4, "b": jnp.zeros((64, 6))}
    keys = jax.random.split(jax.random.key(0), 200)
    with jax.numpy_dtype_promotion("standard"):  # AdamW's own
        (params, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, keys))(
            (params, tx.init(params))
        )
    assert float(loss(params, (x, y))) - constant < 0.5  # 1.79 at the beginning


@pytest.fixture(scope="module")
def language_model():
    """Two blocks on help texts: AdamW with cosine decay ends at 1.88 with 0.01, 2.76 with 0.06."""
    with jax.numpy_dtype_promotion("standard"):
        return small.text()._replace(steps=1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_rates_of_adam_do_not_rise_until_they_ruin_a_language_model(language_model, seed):
    schedule = optax.cosine_decay_schedule(1.0, language_model.steps)
    rule = hd.hiulr(language_model.loss, schedule=schedule)
    with jax.numpy_dtype_promotion("standard"):
        method = Method(optax.chain(optax.adamw(1.0), rule))
        found, _ = jax.jit(functools.partial(train, language_model, method))(jax.random.key(seed))
    assert float(found["train"]) < 2.1


@pytest.mark.parametrize("fresh", [False, True], ids=["one batch", "new batches"])
def test_a_bias_before_batch_norm_goes_at_the_rate_of_the_others(fresh):
    """The loss does not depend on it, and Adam steps along rounding."""

    def loss(params, batch):
        x, y = batch
        hidden = x @ params["kernel"] + params["bias"]
        hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        return jnp.mean((jnp.tanh(hidden * params["scale"]) @ params["head"] - y) ** 2)

    def init(key):
        a, b = jax.random.split(key)
        start = {"kernel": 0.5 * jax.random.normal(a, (4, 8)), "head": jax.random.normal(b, (8,))}
        return start | {"bias": jnp.zeros(8), "scale": jnp.ones(8)}

    def sample(key):
        x = jax.random.normal(key if fresh else jax.random.key(9), (64, 4))
        return x, x.sum(1)

    labels = {name: name for name in ("kernel", "head", "bias", "scale")}
    tx = optax.chain(optax.adam(1.0), hd.hidlr(loss, labels))
    problem = Problem(init, loss, 100, sample=sample)
    keys = jnp.stack([jax.random.key(seed) for seed in range(6)])
    with jax.numpy_dtype_promotion("standard"):
        params, state = jax.jit(jax.vmap(lambda key: run(problem, tx, key)))(keys)
    rates = hd.report.find_state(state).group_learning_rates
    assert np.all(rates["bias"] < 3 * rates["kernel"])
    assert np.all(np.abs(params["bias"]) < 10)
