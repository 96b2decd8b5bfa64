"""Units do not matter: a group measured in thousandths has another rate, and the same run.

The model multiplies the parameters of each group by a factor, and the run begins at the parameters
divided by it. No oracle is needed: the losses of both runs have to be the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import promoting

import hidlr_optax as hd
from hidlr_optax._rule import shape

STEPS = 60
GROUPS = ("first", "second", "third")


def _normal(seed, *size):
    return jax.random.normal(jax.random.key(seed), size)


_TARGET = _normal(9, 6, 6) / 2


def _network(params, x):
    """A small network of three layers."""
    hidden = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
    return jnp.mean((hidden @ params["third"] - jnp.sin(x[:, 0]) - x[:, 1] / 2) ** 2)


def _bilinear(params, x):
    """A product of three matrices: each group alone has hardly a curvature at first."""
    product = params["first"] @ params["second"] @ params["third"]
    return jnp.mean((x @ (product - _TARGET)) ** 2)


_PROBLEMS = {
    "network": (
        _network,
        {
            "first": _normal(0, 6, 12) / 6**0.5,
            "second": _normal(1, 12, 12) / 12**0.5,
            "third": _normal(2, 12) / 12**0.5,
        },
    ),
    "bilinear": (
        _bilinear,
        {
            "first": _normal(3, 6, 3) / 2,
            "second": _normal(4, 3, 3) / 2,
            "third": _normal(5, 3, 6) / 2,
        },
    ),
}
_DIRECTIONS = {
    "SGD": lambda: optax.sgd(1.0),
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
    "Adam": lambda: promoting("standard", optax.adam(1.0, eps=0.0)),
}


@functools.cache
def _compiled(problem, direction):
    """(factors of the groups, factor of the loss) -> the losses of a run, in their own unit."""
    loss_fn, start = _PROBLEMS[problem]

    @jax.jit
    def run(factors, scale):
        def scaled(params, x):
            return scale * loss_fn({name: factors[name] * params[name] for name in params}, x)

        tx = optax.chain(_DIRECTIONS[direction](), hd.hidlr(None, {name: name for name in GROUPS}))

        def step(carry, key):
            *carry, loss = hd.take_step(tx, scaled, *carry, jax.random.normal(key, (32, 6)))
            return tuple(carry), loss / scale

        params = {name: start[name] / factors[name] for name in GROUPS}
        keys = jax.random.split(jax.random.key(7), STEPS)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    return run


def _losses(problem, direction, exponents=(0, 0, 0), scale=0):
    factors = {name: jnp.float32(2.0**n) for name, n in zip(GROUPS, exponents, strict=True)}
    return np.asarray(_compiled(problem, direction)(factors, jnp.float32(2.0**scale)))


@pytest.fixture(scope="module")
def no_prior():
    """The prior towards equal rates switched off: differences are believed however small.

    Its logarithm cannot be zero itself, where the median group would have 0/0. At 1e-8, the belief
    is the identity to the last bits of float32.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "PRIOR", 1e-8)
        _compiled.cache_clear()
        yield
    _compiled.cache_clear()


def test_without_the_prior_differences_are_believed_as_they_are(no_prior):
    differences = jnp.array([0.0, 1e-3, -0.2, 3.0, -14.0])
    np.testing.assert_allclose(shape.believed(differences, shape.PRIOR), differences, rtol=1e-6)


_exponents = st.tuples(*[st.integers(-10, 10)] * len(GROUPS))


@pytest.mark.parametrize("problem", _PROBLEMS)
@pytest.mark.parametrize("direction", _DIRECTIONS)
@settings(max_examples=12, deadline=None)
@given(exponents=_exponents)
@example(exponents=(10, 0, 0))
@example(exponents=(0, -10, 0))
@example(exponents=(0, 0, 10))
@example(exponents=(-10, 10, -10))
def test_a_run_is_the_same_in_other_units(no_prior, problem, direction, exponents):
    losses = _losses(problem, direction, exponents)
    usual = _losses(problem, direction)
    assert usual[-1] < 0.3 * usual[0]  # there is something to compare
    # Float32 knows the momentum in a direction to 1e-5; under momentum that grows at a saddle.
    np.testing.assert_allclose(losses, usual, rtol=5e-3 if direction == "momentum" else 1e-3)


@pytest.mark.parametrize("problem", _PROBLEMS)
@settings(max_examples=12, deadline=None)
@given(scale=st.integers(-10, 10))
@example(scale=10)
@example(scale=-10)
def test_the_unit_of_the_loss_does_not_matter_to_adam(problem, scale):
    losses = _losses(problem, "Adam", scale=scale)
    np.testing.assert_allclose(losses, _losses(problem, "Adam"), rtol=1e-3)
