"""PPO on CartPole in plain JAX, one file from the environment to the returns.

    python -m benchmarks.scripts.ppo --optimizer adam --seeds 3
    python -m benchmarks.scripts.ppo --optimizer hidlr --seeds 3

The environment is Gymnasium's CartPole-v1. The settings are CleanRL's: four environments of 128
steps, four epochs of four mini-batches. Adam's rate is tuned: at CleanRL's 2.5e-4, one seed of
three ends at a return of 170. The objective moves with every collection, so that the loss rises in
healthy runs too. A run of 500,000 steps is one `lax.scan`.
"""

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd

ENVIRONMENTS, LENGTH, EPOCHS, MINI_BATCHES = 4, 128, 4, 4
COLLECTED = ENVIRONMENTS * LENGTH
GAMMA, LAMBDA = 0.99, 0.95
CLIP, VALUE, ENTROPY, MAX_NORM = 0.2, 0.5, 0.01, 0.5
LIMIT = 500  # steps of an episode
WINDOW = 10  # collections whose episodes are averaged at the end


class Batch(NamedTuple):
    """What the loss needs of each step.

    Attributes:
      observation: of the pole and the cart.
      action: 0 or 1.
      log_probability: of that action when it was taken.
      advantage: estimated, over the mean of its state.
      target: of the value.
    """

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array
    advantage: jax.Array
    target: jax.Array


class World(NamedTuple):
    """All environments.

    Attributes:
      state: (environments, 4): place, speed, angle, angular speed.
      age: steps since the start of the episode.
    """

    state: jax.Array
    age: jax.Array


def reset(key: jax.Array) -> jax.Array:
    """States near rest."""
    return jax.random.uniform(key, (ENVIRONMENTS, 4), minval=-0.05, maxval=0.05)


def push(state: jax.Array, action: jax.Array) -> jax.Array:
    """A fiftieth of a second with a force of 10 N to the left or to the right, Euler's method."""
    _, speed, angle, spin = state.T
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    force = jnp.where(action == 1, 10.0, -10.0)
    pole = 0.1 * 0.5  # mass times half the length
    common = (force + pole * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * common) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    drive = common - pole * turn * cos / 1.1
    return state + 0.02 * jnp.stack([speed, drive, spin, turn], 1)


def step_world(world: World, action: jax.Array, key: jax.Array) -> tuple[World, Any]:
    """The next states, and (fallen, over, length of the episode, state before a restart)."""
    state, age = push(world.state, action), world.age + 1
    fallen = (jnp.abs(state[:, 0]) > 2.4) | (jnp.abs(state[:, 2]) > 12 * jnp.pi / 180)
    over = fallen | (age >= LIMIT)
    begun = World(jnp.where(over[:, None], reset(key), state), jnp.where(over, 0, age))
    return begun, (fallen, over, age, state)


def init(key: jax.Array) -> dict[str, Any]:
    """An actor and a critic: orthogonal layers, the last of the actor small."""

    def network(key: jax.Array, outputs: int, last: float) -> list[dict[str, jax.Array]]:
        sizes, gains = ((4, 64), (64, 64), (64, outputs)), (np.sqrt(2), np.sqrt(2), last)
        make = jax.nn.initializers.orthogonal
        keys = jax.random.split(key, 3)
        return [
            {"kernel": make(gain)(key, shape), "bias": jnp.zeros(shape[1])}
            for key, shape, gain in zip(keys, sizes, gains, strict=True)
        ]

    a, b = jax.random.split(key)
    return {"actor": network(a, 2, 0.01), "critic": network(b, 1, 1.0)}


def apply(network: Any, x: jax.Array) -> jax.Array:
    """Two hidden layers of 64, tanh."""
    *hidden, last = network
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss_fn(params: Any, batch: Batch) -> jax.Array:
    """The clipped objective, half the squared error of the value, and the entropy bonus."""
    logits = jax.nn.log_softmax(apply(params["actor"], batch.observation))
    taken = jnp.take_along_axis(logits, batch.action[:, None], 1)[:, 0]
    ratio = jnp.exp(taken - batch.log_probability)
    gain = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    policy = -jnp.mean(jnp.minimum(ratio * gain, clipped * gain))
    value = apply(params["critic"], batch.observation)[:, 0]
    entropy = -jnp.mean(jnp.sum(jnp.exp(logits) * logits, 1))
    return policy + VALUE * 0.5 * jnp.mean((value - batch.target) ** 2) - ENTROPY * entropy


def collect(params: Any, world: World, key: jax.Array) -> tuple[World, Batch, jax.Array]:
    """A batch of 128 steps of each environment, and (sum of returns, number) of ended episodes."""

    def step(world: World, key: jax.Array) -> Any:
        act, again = jax.random.split(key)
        logits = jax.nn.log_softmax(apply(params["actor"], world.state))
        action = jax.random.categorical(act, logits)
        taken = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        after, (fallen, over, age, reached) = step_world(world, action, again)
        return after, (world.state, action, taken, reached, fallen, over, age)

    keys = jax.random.split(key, LENGTH)
    world, seen = jax.lax.scan(step, world, keys)
    observation, action, taken, reached, fallen, over, age = seen
    value = apply(params["critic"], observation)[..., 0]
    # Time that is up ends no value: the state that was reached still has one.
    later = jnp.where(fallen, 0.0, apply(params["critic"], reached)[..., 0])
    surprise = 1.0 + GAMMA * later - value

    def back(advantage: jax.Array, at: Any) -> Any:
        surprise, over = at
        advantage = surprise + GAMMA * LAMBDA * jnp.where(over, 0.0, advantage)
        return advantage, advantage

    start = jnp.zeros(ENVIRONMENTS)
    _, advantage = jax.lax.scan(back, start, (surprise, over), reverse=True)
    batch = Batch(observation, action, taken, advantage, advantage + value)
    batch = jax.tree.map(lambda x: x.reshape(COLLECTED, *x.shape[2:]), batch)
    return world, batch, jnp.stack([jnp.sum(over * age), jnp.sum(over)])


def optimizer(name: str, rate: float, updates: int) -> optax.GradientTransformationExtraArgs:
    """Adam with a tuned rate, or `hidlr` with one rate for each network; both fall to zero."""
    clip = optax.clip_by_global_norm(MAX_NORM)
    if name == "adam":
        schedule = optax.linear_schedule(rate, 0.0, updates)
        return optax.with_extra_args_support(optax.chain(clip, optax.adam(schedule, eps=1e-5)))

    def labels(params: Any) -> Any:
        return {name: jax.tree.map(lambda _, name=name: name, params[name]) for name in params}

    rates = hd.hidlr(loss_fn, labels, schedule=optax.linear_schedule(1.0, 0.0, updates))
    return optax.chain(clip, optax.adam(1.0, eps=1e-5), rates)


def train(
    tx: optax.GradientTransformationExtraArgs, collections: int, seed: Any
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """One run, to be jitted.

    Returns:
      Of each collection (sum of returns, number of episodes), its mean loss, and the last rates.
    """
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    params = init(first)
    world = World(reset(second), jnp.zeros(ENVIRONMENTS, int))

    def update(carry: Any, batch: Batch) -> Any:
        params, state = carry
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return (optax.apply_updates(params, updates), state), value

    def iteration(carry: Any, key: jax.Array) -> Any:
        world, learner = carry
        act, shuffle = jax.random.split(key)
        world, batch, returns = collect(learner[0], world, act)
        orders = jax.vmap(lambda key: jax.random.permutation(key, COLLECTED))
        rows = orders(jax.random.split(shuffle, EPOCHS)).reshape(EPOCHS * MINI_BATCHES, -1)
        batches = jax.tree.map(lambda x: x[rows], batch)
        learner, losses = jax.lax.scan(update, learner, batches)
        return (world, learner), (returns, losses.mean())

    start = world, (params, tx.init(params))
    end, (returns, losses) = jax.lax.scan(iteration, start, jax.random.split(third, collections))
    return returns, losses, optax.tree.get(end[1][1], "group_learning_rates", {})


def main() -> None:
    """Trains once for every seed, and prints the mean return of the last episodes."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--optimizer", choices=("adam", "hidlr"), default="adam")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam, at the start")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500_000, help="of all environments together")
    args = parser.parse_args()
    collections = args.steps // COLLECTED
    tx = optimizer(args.optimizer, args.rate, collections * EPOCHS * MINI_BATCHES)
    run = jax.jit(lambda seed: train(tx, collections, seed))
    for seed in range(args.seeds):
        start = time.perf_counter()
        returns, losses, rates = jax.tree.map(np.asarray, run(seed))
        total, episodes = returns[-WINDOW:].sum(0)
        found = " ".join(f"{name} {float(rate):.2g}" for name, rate in rates.items())
        print(
            f"{args.optimizer} seed {seed}: mean return {total / max(episodes, 1):.1f} of the last "
            f"{episodes} episodes, last loss {losses[-1]:.3g}, "
            f"{time.perf_counter() - start:.1f} s {found}",
            flush=True,
        )


if __name__ == "__main__":
    main()
