"""An LSTM that reads "12+7=" and writes "19", in linen, as in Flax's examples.

A quarter as wide, and numbers of two digits.
"""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import hidlr_optax as hd
import hidlr_optax.flax as hdf
from benchmarks.scripts.script import Loop, Script, epochs

CHARACTERS = " 0123456789+="  # a space also ends an answer, and "=" begins it
QUESTION, ANSWER, HIDDEN = 6, 4, 128


class Seq2Seq(nn.Module):
    """The state of one LSTM is where the other begins."""

    @nn.compact
    def __call__(self, question: Any, before: Any) -> jax.Array:
        """Characters of the question, and those before each of the answer -> logits of these."""
        question, before = (jax.nn.one_hot(x, len(CHARACTERS)) for x in (question, before))
        encoder = nn.RNN(nn.OptimizedLSTMCell(HIDDEN), return_carry=True, name="encoder")
        decoder = nn.RNN(nn.OptimizedLSTMCell(HIDDEN), name="decoder")
        carry, _ = encoder(question)
        return nn.Dense(len(CHARACTERS), name="head")(decoder(before, initial_carry=carry))


def shifted(answer: Any) -> jax.Array:
    """What stands before each character of the answer."""
    first = jnp.full_like(answer[:, :1], CHARACTERS.index("="))
    return jnp.concatenate([first, answer[:, :-1]], axis=1)


def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the answer's characters, and how many of them were right."""
    question, answer = batch
    logits = Seq2Seq().apply({"params": params}, question, shifted(answer))
    assert isinstance(logits, jax.Array)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()
    return loss, jnp.mean(logits.argmax(-1) == answer)


def usual(learning_rate: Any) -> Loop:
    """As the example has it."""
    tx = optax.adam(learning_rate)

    def start(seed: int) -> Any:
        empty = jnp.zeros((1, QUESTION), int), jnp.zeros((1, ANSWER), int)
        params = Seq2Seq().init(jax.random.key(seed), *empty)["params"]
        return (train_state.TrainState.create(apply_fn=None, params=params, tx=tx),)

    @jax.jit
    def train_step(state: Any, batch: Any) -> Any:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, accuracy), grads = grad_fn(state.params, batch)
        state = state.apply_gradients(grads=grads)
        return state, {"loss": loss, "accuracy": accuracy}

    return Loop(start, train_step)


def with_hidlr(labels: Any, schedule: Any) -> Loop:
    """The same with `hidlr`."""
    tx = optax.chain(optax.adam(1.0), hd.hidlr(None, labels, schedule=schedule))

    def start(seed: int) -> Any:
        empty = jnp.zeros((1, QUESTION), int), jnp.zeros((1, ANSWER), int)
        params = Seq2Seq().init(jax.random.key(seed), *empty)["params"]
        return (hdf.TrainState.create(apply_fn=None, params=params, tx=tx),)

    @jax.jit
    def train_step(state: Any, batch: Any) -> Any:
        state, (loss, accuracy) = state.take_step(loss_fn, batch, has_aux=True)
        return state, {"loss": loss, "accuracy": accuracy}

    return Loop(start, train_step)


def encoded(texts: list[str], length: int) -> np.ndarray:
    """(n, length) places in `CHARACTERS`."""
    rows = [[CHARACTERS.index(character) for character in text.ljust(length)] for text in texts]
    return np.array(rows, np.int32)


@functools.cache
def sums() -> tuple[np.ndarray, np.ndarray]:
    """All 10,000 sums of two numbers below 100, in another order: questions and answers."""
    pairs = np.random.default_rng(0).permutation(10_000)
    questions = [f"{pair // 100}+{pair % 100}=" for pair in pairs]
    answers = [f"{pair // 100 + pair % 100}" for pair in pairs]
    return encoded(questions, QUESTION), encoded(answers, ANSWER)


def batches(seed: int) -> Iterator[Any]:
    """64 of 9,000 sums."""
    return epochs(seed, 64, *(part[1000:] for part in sums()))


@jax.jit
def _answered(params: Any, question: Any) -> jax.Array:
    answer = jnp.zeros((len(question), ANSWER), jnp.int32)
    for place in range(ANSWER):
        logits = Seq2Seq().apply({"params": params}, question, shifted(answer))
        assert isinstance(logits, jax.Array)
        answer = answer.at[:, place].set(logits[:, place].argmax(-1))
    return answer


def evaluate(state: Any) -> float:
    """Percent of 1,000 sums, which are not trained on, with a wrong answer."""
    question, answer = (part[:1000] for part in sums())
    return 100 * float(np.mean(np.any(_answered(state.params, question) != answer, axis=1)))


SCRIPT = Script(
    optimizer="Adam 3e-3",
    rate=3e-3,
    updates=1000,
    metric="wrong sums, %",
    usual=usual,
    with_hidlr=with_hidlr,
    batches=batches,
    evaluate=evaluate,
)
