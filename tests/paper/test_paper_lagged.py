"""`slope="lagged"`: the slope along the previous direction, on a batch that it has not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paper_kit import bare

import hidlr_optax as hd

_LABELS = {"w": "body", "v": "head"}
_PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "v": jnp.array([2.0, -1.0])}
_EXACT = {"solver": hd.paper.diagonal(max_change=None), "ema_decay": 0.0}


def _loss(params, batch):
    """A quadratic that couples the groups and differs from batch to batch."""
    flat = jnp.concatenate([params["v"], params["w"].ravel()])
    return flat @ batch["matrix"] @ flat / 2 - batch["vector"] @ flat


def _batch(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(6, 6))
    matrix = root @ root.T / 6 + np.eye(6)
    return {
        "matrix": jnp.asarray(matrix, jnp.float32),
        "vector": jnp.asarray(rng.normal(size=6), jnp.float32),
    }


_BATCHES = [_batch(seed) for seed in range(4)]


def _lagged(**kwargs):
    defaults = {"slope": "lagged", "init_learning_rate": 0.1, "update_interval": 1}
    return bare(_loss, _LABELS, **defaults | _EXACT | kwargs)


def _step(tx):
    @jax.jit
    def step(params, state, batch):
        value, grad = jax.value_and_grad(_loss)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state

    return step


def _rates(state):
    return {
        name: float(rate) for name, rate in optax.tree.get(state, "group_learning_rates").items()
    }


def _numpy_rates(schedule):
    """Algorithm by hand, in float64: SGD's directions, slopes and curvatures from the matrices."""
    groups = {"head": slice(0, 2), "body": slice(2, 6)}
    w = np.concatenate([np.ravel(_PARAMS[name]) for name in ("v", "w")]).astype(float)
    previous, rates, history = None, None, []
    for step, batch in enumerate(_BATCHES):
        matrix, vector = (np.asarray(batch[name], float) for name in ("matrix", "vector"))
        gradient = matrix @ w - vector
        along = -gradient if previous is None else previous
        found = {}
        for name, part in groups.items():
            curvature = along[part] @ matrix[part, part] @ along[part]
            travelled = 0.0 if previous is None else rates[name] * schedule(step - 1)
            slope = -gradient[part] @ along[part] + curvature * travelled
            found[name] = slope / curvature
        rates = found
        history.append(rates)
        for name, part in groups.items():
            w[part] -= schedule(step) * rates[name] * gradient[part]
        previous = -gradient
    return history


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("per_group", [1, 2, 4])
def test_rates_equal_those_worked_out_by_hand(decay, per_group):
    schedule = None if decay is None else lambda step: decay ** jnp.asarray(step, jnp.float32)
    tx = optax.chain(
        optax.sgd(1.0), _lagged(schedule=schedule, curvature=hd.paper.probes(per_group=per_group))
    )
    step, params, state = _step(tx), _PARAMS, tx.init(_PARAMS)
    for batch, expected in zip(_BATCHES, _numpy_rates(schedule or (lambda step: 1.0)), strict=True):
        params, state = step(params, state, batch)
        found = _rates(state)
        for name, rate in expected.items():
            np.testing.assert_allclose(found[name], rate, rtol=2e-3)


def test_the_first_refresh_is_that_of_the_gradient():
    found = []
    for slope in ("lagged", "gradient"):
        tx = optax.chain(optax.sgd(1.0), _lagged(slope=slope))
        found.append(_rates(_step(tx)(_PARAMS, tx.init(_PARAMS), _BATCHES[0])[1]))
    assert found[0] == found[1]


def test_a_step_that_ended_where_the_loss_is_flat_keeps_its_rate_whatever_the_curvature():
    tx = _lagged(init_learning_rate={"body": 0.3, "head": 0.7}, update_interval=3)
    state = tx.init(_PARAMS)._replace(
        count=jnp.array(3), direction=jax.tree.map(jnp.ones_like, _PARAMS)
    )
    # The gradient is orthogonal to the previous direction in each group.
    grad = {"w": jnp.array([[1.0, -1.0], [2.0, -2.0]]), "v": jnp.array([3.0, -3.0])}
    update = jax.jit(lambda batch: tx.update(grad, state, _PARAMS, batch=batch, grad=grad))
    for batch in _BATCHES:
        _, after = update(batch)
        np.testing.assert_allclose(_rates(after)["body"], 0.3, rtol=1e-5)
        np.testing.assert_allclose(_rates(after)["head"], 0.7, rtol=1e-5)


def test_the_slope_on_the_batch_of_the_direction_is_too_steep_and_the_lagged_one_is_not():
    # Pure noise: gradients are independent from batch to batch, and every step makes it worse.
    def noise(params, batch):
        return jnp.sum(params["x"] ** 2) / 2 - batch @ params["x"]

    def final_rate(slope):
        tx = bare(noise, "all", slope=slope, init_learning_rate=0.1, update_interval=1)

        @jax.jit
        def run(key):
            def body(carry, batch):
                params, state = carry
                grad = jax.grad(noise)(params, batch)
                updates = jax.tree.map(jnp.negative, grad)
                updates, state = tx.update(updates, state, params, batch=batch, grad=grad)
                return (optax.apply_updates(params, updates), state), None

            params = {"x": jnp.zeros(100)}
            batches = jax.random.normal(key, (60, 100))
            (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), batches)
            return state.group_learning_rates["all"]

        return float(run(jax.random.key(0)))

    assert final_rate("gradient") > 0.9
    assert final_rate("lagged") < 0.05


# What is stored.


def test_a_direction_is_stored_for_lagged_alone():
    assert jax.tree.leaves(_lagged(slope="gradient").init(_PARAMS).direction) == []
    assert jax.tree.structure(_lagged().init(_PARAMS).direction) == jax.tree.structure(_PARAMS)


def test_map_params_reaches_the_direction_and_nothing_else():
    tx = _lagged()
    state = tx.init(_PARAMS)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    np.testing.assert_array_equal(mapped.direction["v"], state.direction["v"] + 1)
    assert _rates(mapped) == _rates(state)


def test_the_direction_is_sharded_like_the_parameters():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), _PARAMS)
    tx = optax.chain(optax.sgd(1.0), _lagged())
    step, state = _step(tx), tx.init(params)
    alone, alone_state = _PARAMS, tx.init(_PARAMS)
    for batch in _BATCHES:
        params, state = step(params, state, batch)
        alone, alone_state = step(alone, alone_state, batch)
    assert state[1].direction["w"].sharding.is_equivalent_to(sharding, 2)
    for name, rate in _rates(alone_state).items():
        # Sums in another order: rounding, over the 2e-3 of the loss that a pair of probes bends it.
        np.testing.assert_allclose(_rates(state)[name], rate, rtol=1e-3)


# What goes wrong.


def test_lagged_without_the_gradient_is_refused():
    tx = _lagged()
    with pytest.raises(ValueError, match="slope='lagged' needs the raw gradient"):
        tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=_BATCHES[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_direction_keeps_the_rates_at_the_refresh_that_looks_back_on_it(poison):
    tx = _lagged(update_interval=2)
    update = jax.jit(tx.update)
    good = jax.tree.map(jnp.negative, jax.grad(_loss)(_PARAMS, _BATCHES[0]))
    grad = jax.tree.map(jnp.negative, good)
    state = tx.init(_PARAMS)
    _, state = update(good, state, _PARAMS, batch=_BATCHES[0], grad=grad)
    bad = good | {"v": good["v"] * jnp.array([poison, 1.0])}
    _, state = update(bad, state, _PARAMS, batch=_BATCHES[0], grad=grad)
    before = _rates(state)
    _, state = update(good, state, _PARAMS, batch=_BATCHES[0], grad=grad)
    assert _rates(state) == before
    assert state.diagnostics.kept["head"] == hd.Kept.NON_FINITE
    _, state = update(good, state, _PARAMS, batch=_BATCHES[0], grad=grad)
    _, state = update(good, state, _PARAMS, batch=_BATCHES[0], grad=grad)
    assert set(map(int, state.diagnostics.kept.values())) == {hd.Kept.UPDATED}
