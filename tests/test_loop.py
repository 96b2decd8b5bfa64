"""The one loop of the benchmarks against plain Python: a line that is fitted by least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.kit import loop

X = np.linspace(-1, 1, 12, dtype=np.float32)
OFFSETS = {"train": 1.0, "validation": 1.5, "test": 3.0}
SPLITS = {name: (jnp.asarray(X), jnp.asarray(2 * X + offset)) for name, offset in OFFSETS.items()}


def _init(key):
    return {"slope": jax.random.normal(key), "offset": jnp.zeros(())}


def _loss(params, batch):
    x, y = batch
    return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


PROBLEM = loop.Problem(_init, _loss, 8, SPLITS)


def _by_hand(problem, rate, key):
    """Parameters before the first step and after each, by the gradient on paper."""
    init_key, batch_key = jax.random.split(key)
    slope, offset = float(_init(init_key)["slope"]), 0.0
    path = [(slope, offset)]
    for step_key in jax.random.split(batch_key, problem.steps):
        x, y = map(np.asarray, problem.batch(step_key))
        error = slope * x + offset - y
        slope, offset = slope - rate * 2 * np.mean(error * x), offset - rate * 2 * np.mean(error)
        path.append((slope, offset))
    return path


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_run_descends_as_by_hand(batch_size):
    problem, key = PROBLEM._replace(batch_size=batch_size), jax.random.key(3)
    assert problem.deterministic == (batch_size == 0)
    params, _ = jax.jit(lambda key: loop.run(problem, optax.sgd(0.1), key))(key)
    path = _by_hand(problem, 0.1, key)
    np.testing.assert_allclose([params["slope"], params["offset"]], path[-1], rtol=1e-5)


def test_a_sample_takes_the_place_of_the_split():
    problem = PROBLEM._replace(sample=lambda key: "drawn")
    assert problem.batch(jax.random.key(0)) == "drawn"
    assert not problem.deterministic


def test_the_best_check_is_kept():
    key, rate = jax.random.key(1), 0.3
    found, _ = jax.jit(lambda key: loop.train(PROBLEM, loop.Method(optax.sgd(rate)), key, 4))(key)
    checks = _by_hand(PROBLEM, rate, key)[2::2]
    curve = [np.mean((s * X + o - 2 * X - 1.5) ** 2) for s, o in checks]
    np.testing.assert_allclose(found["curve"], curve, rtol=1e-4)
    best = int(np.argmin(curve))
    assert int(found["best step"]) == 2 * (best + 1)
    slope, offset = checks[best]
    expected = np.mean((slope * X + offset - 2 * X - 3) ** 2)
    assert float(found["best test"]) == pytest.approx(expected, rel=1e-4)


def test_given_rates_are_those_of_their_entries():
    tx = loop.given({"a": 2.0, "b": -1.0})
    updates, _ = tx.update({"a": jnp.ones(2), "b": {"c": jnp.ones(1)}}, tx.init(None), None)
    np.testing.assert_array_equal(updates["a"], [2, 2])
    np.testing.assert_array_equal(updates["b"]["c"], [-1])
