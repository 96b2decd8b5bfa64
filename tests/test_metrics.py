"""`metrics`, the state as flat scalars."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from support import bare

import hidlr_optax as hd

LABELS = {"x": "weight", "y": "bias", "z": "weight"}


def bowl(params, batch):
    """Separable: in each direction the best rate is known."""
    del batch
    return 0.5 * jnp.sum(params["x"] ** 2) + 50 * params["y"] ** 2 + 0.5 * params["z"] ** 2


def bowl_params():
    return {"x": jnp.asarray([3.0, -2.0]), "y": jnp.asarray(0.5), "z": jnp.asarray(-1.0)}


def descent(loss, params, batch=None):
    return jax.tree.map(jnp.negative, jax.grad(loss)(params, batch))


# Metrics.

FIELDS = ("learning_rate", "slope", "curvature", "ppi", "influence", "kept")
KEYS = {f"{field}/{label}" for field in FIELDS for label in ("bias", "weight")} | {
    "refreshes",
    "cuts",
    "ascents",
    "value_mismatches",
    "gradient_mismatches",
    "step_mismatches",
    "loss_noise",
}


def hidlr(**kwargs):
    exact = {"solver": hd.diagonal(max_change=None), "ema_decay": 0.0}
    return bare(bowl, LABELS, **{"init_learning_rate": 0.1} | exact | kwargs)


WRAPPERS = {
    "bare": lambda: hidlr(),
    "chain": lambda: optax.chain(optax.clip(1e9), hidlr()),
    "nested chain": lambda: optax.chain(optax.chain(optax.chain(hidlr()), optax.identity())),
    "apply_if_finite": lambda: optax.apply_if_finite(hidlr(), 3),
    "multi_steps": lambda: hd.multi_steps(optax.chain(hidlr()), 1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda init: hidlr(init_learning_rate=init)
    )(init=0.1),
}


@functools.cache
def _reference():
    tx, params = hidlr(), bowl_params()
    return tx, params, jax.jit(tx.update)(descent(bowl, params), tx.init(params), params)[1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_metrics_finds_the_state_at_any_depth(wrapper):
    found = hd.metrics(WRAPPERS[wrapper]().init(bowl_params()))
    assert set(found) == KEYS
    assert float(found["learning_rate/bias"]) == pytest.approx(0.1)
    assert int(found["refreshes"]) == int(found["cuts"]) == float(found["ppi/bias"]) == 0


def test_metrics_finds_the_state_in_containers_of_any_kind():
    *_, state = _reference()
    for tree in ({"opt": state}, [1, (state,)], (optax.EmptyState(), {"deep": [state]})):
        assert hd.metrics(tree) == hd.metrics(state)


def test_metrics_are_flat_scalars_with_the_numbers_of_the_state():
    *_, state = _reference()
    found = hd.metrics(state)
    assert all(isinstance(value, jax.Array) and value.shape == () for value in found.values())
    assert float(found["slope/weight"]) == pytest.approx(14, rel=1e-4)
    assert float(found["curvature/bias"]) == pytest.approx(100 * 50.0**2, rel=1e-4)
    assert float(found["ppi/weight"]) == pytest.approx(14 / 3, rel=1e-3)
    assert float(found["ppi/bias"]) == pytest.approx(25, rel=1e-3)
    for label in ("bias", "weight"):  # the key of before
        assert found[f"influence/{label}"] == found[f"ppi/{label}"]
    assert (int(found["kept/bias"]), int(found["kept/weight"])) == (0, 0)
    assert int(found["refreshes"]) == 1


def test_metrics_inside_jit_is_metrics_outside():
    tx, params, state = _reference()

    @jax.jit
    def step(state, params):
        _, state = tx.update(descent(bowl, params), tx.init(params), params)
        return hd.metrics(state)

    inside, outside = step(state, params), hd.metrics(state)
    assert set(inside) == set(outside)
    for key, value in inside.items():
        assert float(value) == pytest.approx(float(outside[key]), rel=1e-4)


def test_metrics_says_why_a_rate_was_kept():
    tx, params = hidlr(solver=hd.diagonal(), ema_decay=0.9), bowl_params()
    direction = descent(bowl, params) | {"y": jnp.asarray(0.0)}
    _, state = jax.jit(tx.update)(direction, tx.init(params), params)
    found = hd.metrics(state)
    assert hd.Kept(int(found["kept/bias"])) == hd.Kept.NO_SLOPE
    assert hd.Kept(int(found["kept/weight"])) == hd.Kept.UPDATED


def test_metrics_shows_the_rate_that_was_applied_schedule_included():
    tx = hidlr(schedule=lambda step: 1 / (1 + step), update_interval=1)
    params = bowl_params()
    state, update, direction = tx.init(params), jax.jit(tx.update), descent(bowl, params)
    for step in range(3):
        updates, state = update(direction, state, params)
        applied = float(updates["y"] / direction["y"])
        assert applied == pytest.approx(0.01 / (1 + step), rel=1e-3)
        assert float(hd.metrics(state)["learning_rate/bias"]) == pytest.approx(applied, rel=1e-6)
        # The rate itself is free of the factor.
        assert float(state.group_learning_rates["bias"]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("inside_jit", [False, True])
def test_metrics_of_an_nnx_optimizer_are_plain_arrays(inside_jit):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, bare(None, hd.label_by_role, init_learning_rate=0.5), wrt=nnx.Param
    )
    if inside_jit:
        found = nnx.jit(lambda optimizer: hd.metrics(optimizer.opt_state))(optimizer)
    else:
        found = hd.metrics(optimizer.opt_state)
    assert float(found["learning_rate/rest"]) == 0.5
    for value in found.values():
        assert isinstance(value, jax.Array)
        assert value.shape == ()


@pytest.mark.parametrize("state", [(), optax.sgd(1.0).init({}), {"params": jnp.zeros(2)}])
def test_metrics_without_hidlr_is_an_error(state):
    with pytest.raises(ValueError, match=r"expected one HiDLRState .* found 0"):
        hd.metrics(state)


def test_metrics_of_several_hidlrs_is_an_error():
    state = optax.chain(hidlr(), hidlr()).init(bowl_params())
    with pytest.raises(ValueError, match=r"expected one HiDLRState .* found 2"):
        hd.metrics(state)
    assert set(hd.metrics(state[1])) == KEYS
