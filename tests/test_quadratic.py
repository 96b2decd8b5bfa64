"""The quadratic in other units, and influence, against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from hidlr_optax._quadratic import Quadratic, influence_per_parameter


def test_scaled_is_the_same_quadratic_in_other_units():
    b, a = np.array([3.0, -2.0]), np.array([4.0, 0.25])
    units, eta = np.array([10.0, 0.5]), np.array([0.7, -1.3])
    scaled = Quadratic(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32)).scaled(
        jnp.asarray(units, jnp.float32)
    )
    own = eta / units
    ours = -np.dot(scaled.slope, own) + np.dot(scaled.curvature, own**2) / 2
    assert ours == pytest.approx(-b @ eta + a @ eta**2 / 2, rel=1e-6)


def test_influence_is_b_squared_over_a_d_in_any_units():
    b, a, sizes = np.array([3.0, -2.0]), np.array([4.0, 0.25]), np.array([5.0, 2000.0])
    quadratic = Quadratic(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32))
    for units in (1.0, 1e-6, 1e6):
        ours = influence_per_parameter(
            quadratic.scaled(jnp.full(2, units, jnp.float32)), jnp.asarray(sizes, jnp.float32)
        )
        np.testing.assert_allclose(ours, b**2 / (a * sizes), rtol=1e-5)


def test_influence_of_a_steep_group_does_not_overflow_on_the_way():
    """b² alone would be infinite in float32."""
    quadratic = Quadratic(jnp.full(1, 1e25, jnp.float32), jnp.full(1, 1e30, jnp.float32))
    found = influence_per_parameter(quadratic, jnp.ones(1, jnp.float32))
    assert float(found[0]) == pytest.approx(1e20)
