"""`metrics`, the state as flat scalars."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

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

FIELDS = ("learning_rate", "unscheduled_rate", "slope", "curvature", "ppi", "kept")
KEYS = {f"{field}/{label}" for field in FIELDS for label in ("bias", "weight")} | {
    "refreshes",
    "measured",
    "cuts",
    "slips",
}


def hidlr(**kwargs):
    return hd.hidlr(bowl, LABELS, **kwargs)


def update(tx, state, params, **changed):
    grad = jax.grad(bowl)(params, None)
    direction = jax.tree.map(jnp.negative, grad) | changed
    return tx.update(direction, state, params, grad=grad)


WRAPPERS = {
    "bare": lambda: hidlr(),
    "chain": lambda: optax.chain(optax.clip(1e9), hidlr()),
    "nested chain": lambda: optax.chain(optax.chain(optax.chain(hidlr()), optax.identity())),
    "apply_if_finite": lambda: optax.apply_if_finite(hidlr(), 3),
    "multi_steps": lambda: hd.multi_steps(optax.chain(hidlr()), 1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda interval: hidlr(update_interval=interval)
    )(interval=3),
}


@functools.cache
def _reference():
    tx, params = hidlr(), bowl_params()
    return tx, params, jax.jit(lambda state: update(tx, state, params))(tx.init(params))[1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_metrics_finds_the_state_at_any_depth(wrapper):
    found = hd.metrics(WRAPPERS[wrapper]().init(bowl_params()))
    assert set(found) == KEYS
    assert float(found["learning_rate/bias"]) == 0  # no step has been taken
    assert int(found["refreshes"]) == int(found["cuts"]) == float(found["ppi/bias"]) == 0


def test_metrics_finds_the_state_in_containers_of_any_kind():
    *_, state = _reference()
    for tree in ({"opt": state}, [1, (state,)], (optax.EmptyState(), {"deep": [state]})):
        assert hd.metrics(tree) == hd.metrics(state)


def test_metrics_are_flat_scalars_with_the_numbers_of_the_state():
    """By hand: b = 14 + 50², a = 14 + 100 · 50², and four parameters."""
    tx, params = hd.hiulr(bowl), bowl_params()
    step = jax.jit(lambda state, params: update(tx, state, params))
    moved, state = step(tx.init(params), params)
    # The second update looks back along the first step, from where it led to where it began.
    _, state = step(state, optax.apply_updates(params, moved))
    found = hd.metrics(state)
    assert all(isinstance(value, jax.Array) and value.shape == () for value in found.values())
    assert float(found["slope/all"]) == pytest.approx(2514, rel=0.01)
    assert float(found["curvature/all"]) == pytest.approx(250014, rel=0.01)
    assert float(found["ppi/all"]) == pytest.approx(2514**2 / 250014 / 4, rel=0.03)
    assert int(found["kept/all"]) == 0
    assert int(found["refreshes"]) == 2


def test_metrics_inside_jit_is_metrics_outside():
    tx, params, state = _reference()

    @jax.jit
    def step(state, params):
        _, state = update(tx, tx.init(params), params)
        return hd.metrics(state)

    inside, outside = step(state, params), hd.metrics(state)
    assert set(inside) == set(outside)
    for key, value in inside.items():
        assert float(value) == pytest.approx(float(outside[key]), rel=1e-4)


def test_metrics_says_why_a_rate_was_kept():
    tx, params = hidlr(), bowl_params()
    frozen = {"y": jnp.asarray(0.0)}
    _, state = jax.jit(lambda state: update(tx, state, params, **frozen))(tx.init(params))
    found = hd.metrics(state)
    assert hd.Kept(int(found["kept/bias"])) == hd.Kept.NO_SLOPE
    assert hd.Kept(int(found["kept/weight"])) == hd.Kept.UPDATED


def test_metrics_shows_the_rate_that_was_applied_schedule_included():
    tx = hidlr(
        schedule=lambda step: 1 / (1 + step.astype(jnp.float32)),
        update_interval=100,
        warmup=0,
        init_learning_rate=1e-3,
    )
    params = bowl_params()
    direction = descent(bowl, params)
    # The first update is a refresh. The three after it leave the rates alone.
    jitted, state = jax.jit(lambda state, params: update(tx, state, params)), tx.init(params)
    rate = None
    for step in range(4):
        updates, state = jitted(state, params)
        applied = float(updates["y"] / direction["y"])
        assert float(hd.metrics(state)["learning_rate/bias"]) == pytest.approx(applied, rel=1e-6)
        found = float(state.group_learning_rates["bias"])
        assert applied == pytest.approx(found / (1 + step), rel=1e-3)
        assert rate is None or found == rate  # free of the factor
        rate = found


@pytest.mark.parametrize("inside_jit", [False, True])
def test_metrics_of_an_nnx_optimizer_are_plain_arrays(inside_jit):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, hd.hidlr(None, hd.label_by_role), wrt=nnx.Param)
    if inside_jit:
        found = nnx.jit(lambda optimizer: hd.metrics(optimizer.opt_state))(optimizer)
    else:
        found = hd.metrics(optimizer.opt_state)
    assert float(found["learning_rate/rest"]) == 0
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


def test_a_history_has_the_metrics_of_each_step_as_python_numbers():
    tx, params = hidlr(), bowl_params()
    step = jax.jit(lambda state: update(tx, state, params)[1])
    state, history = tx.init(params), hd.History()
    for n in range(3):
        state = step(state)
        row = history.add((optax.EmptyState(), state), loss=jnp.float32(n), width=4)
        assert row is history[-1]
        assert {type(number) for number in row.values()} == {float}
        expected = jax.device_get(hd.metrics(state)) | {"loss": n, "width": 4, "step": n}
        assert row == {name: float(number) for name, number in expected.items()}
    assert [row["step"] for row in history] == [0, 1, 2]
    with pytest.raises(ValueError, match="expected one HiDLRState"):
        history.add(optax.EmptyState())


def test_a_history_reads_the_state_of_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, hd.hessian_informed(optax.sgd(1.0), None, "all"), wrt=nnx.Param
    )
    assert hd.History().add(optimizer.opt_state)["refreshes"] == 0.0
