"""Averaged parameters against a plain Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hidlr_optax as hd


def _walk(seed=0, steps=12):
    return np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 8.0])
def test_the_average_is_that_of_plain_python(gamma):
    mean, average = 0.0, hd.averaging.start({"w": jnp.ones(3)})
    add = jax.jit(lambda average, params: hd.averaging.accumulate(average, params, gamma))
    for t, point in enumerate(_walk(), start=1):
        share = (gamma + 1) / (t + gamma)
        mean = (1 - share) * mean + share * point.astype(float)
        average = add(average, {"w": jnp.asarray(point)})
        np.testing.assert_allclose(average.params["w"], mean, rtol=1e-5, atol=1e-6)
    assert int(average.count) == 12


def test_narrow_parameters_are_averaged_in_float32_and_integers_are_carried_along():
    params = {"w": jnp.ones(2, jnp.bfloat16), "step": jnp.int32(7), "z": jnp.ones(2, jnp.complex64)}
    average = hd.averaging.start(params)
    average = hd.averaging.accumulate(average, params)
    assert average.params["w"].dtype == jnp.float32
    assert int(average.params["step"]) == 7
    assert average.params["z"].dtype == jnp.complex64


def test_start_makes_buffers_of_its_own_so_that_parameters_can_be_donated():
    params = {"w": jnp.ones(3)}
    average = hd.averaging.start(params)
    jax.jit(lambda p: jax.tree.map(jnp.negative, p), donate_argnums=0)(params)
    np.testing.assert_array_equal(average.params["w"], np.ones(3))


def test_a_negative_gamma_is_refused():
    with pytest.raises(ValueError, match="gamma must be >= 0, got -1"):
        hd.averaging.accumulate(hd.averaging.start({"w": jnp.ones(1)}), {"w": jnp.ones(1)}, -1.0)


def test_the_average_of_a_noisy_run_is_better_than_its_end():
    def loss(w, batch):
        return jnp.mean((w - batch) ** 2)

    def step(carry, key):
        w, average = carry
        w = w - 0.3 * jax.grad(loss)(w, jax.random.normal(key, (4,)))
        return (w, hd.averaging.accumulate(average, w)), w**2

    keys = jax.random.split(jax.random.key(0), 400)
    start = jnp.float32(5.0), hd.averaging.start(jnp.float32(5.0))
    (_, average), ends = jax.lax.scan(step, start, keys)
    assert float(average.params) ** 2 < 0.2 * float(jnp.mean(ends[100:]))
