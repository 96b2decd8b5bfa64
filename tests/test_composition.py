"""What works together with `hidlr`, and what says no."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import counted, enable_x64, promoting, shard_map

import hidlr_optax as hd

_lenient = functools.partial(promoting, "standard")
_strict = functools.partial(promoting, "strict")


def _adam():
    return _lenient(optax.adam(1.0))


_BATCH = {
    "curvature": {"w": jnp.arange(1.0, 13.0).reshape(3, 4), "v": jnp.ones(4), "b": jnp.array(2.0)},
    "centre": {"w": jnp.zeros((3, 4)), "v": jnp.arange(4.0), "b": jnp.array(-1.0)},
}
_PARAMS = {"w": jnp.linspace(-2.0, 1.0, 12).reshape(3, 4), "v": jnp.ones(4), "b": jnp.array(1.0)}
_LABELS = {"w": "body", "v": "head", "b": "head"}


def _parabolas(params, batch):
    """½ Σ c (p − m)²: its best rate along any direction is known, group by group."""

    def half_square(param, curvature, centre):
        return jnp.sum(curvature * (param - centre) ** 2) / 2

    return sum(
        jax.tree.leaves(jax.tree.map(half_square, params, batch["curvature"], batch["centre"]))
    )


def _gradient():
    """Of `_parabolas`, in numpy."""

    def scaled_distance(param, curvature, centre):
        return np.asarray(curvature) * (np.asarray(param) - np.asarray(centre))

    return jax.tree.map(scaled_distance, _PARAMS, _BATCH["curvature"], _BATCH["centre"])


def _downhill():
    return {name: -leaf for name, leaf in _gradient().items()}


def _hidlr(loss_fn=_parabolas, labels=_LABELS, **kwargs):
    return hd.hidlr(loss_fn, labels, **kwargs)


def _rates(state):
    return optax.tree.get(state, "group_learning_rates")


def _kept(state):
    return {name: hd.Kept(int(kept)) for name, kept in optax.tree.get(state, "kept").items()}


def _step(tx, loss_fn=_parabolas):
    def step(params, state, batch):
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state

    return step


def _assert_all_equal(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def _assert_all_close(actual, desired, rtol=1e-5, atol=0.0):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, actual, desired)


# Directions before hidlr.


_DIRECTIONS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9, nesterov=True),
    "scale_by_adam": optax.chain(_lenient(optax.scale_by_adam()), optax.scale(-1.0)),
    "adamw": _lenient(optax.adamw(1.0)),
    "lion": _lenient(optax.lion(1.0)),
    "muon": _lenient(optax.contrib.muon(1.0)),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
    "partition": optax.partition({"body": _adam(), "head": optax.sgd(1.0)}, _LABELS),
    "flatten": optax.flatten(_adam()),
}


def _quadratic_along(direction):
    """Slope and curvature along a direction, in NumPy."""
    grad, curvature = _gradient(), jax.tree.map(np.asarray, _BATCH["curvature"])
    slope = -sum(np.sum(grad[name] * direction[name]) for name in grad)
    return slope, sum(np.sum(curvature[name] * direction[name] ** 2) for name in grad)


@pytest.mark.parametrize("direction", _DIRECTIONS.values(), ids=_DIRECTIONS.keys())
def test_slope_and_curvature_are_those_along_the_direction_of(direction):
    """At the second update, along the first step: the loss is a parabola."""
    tx = optax.chain(direction, hd.hiulr(_parabolas))
    grad = _gradient()
    steps, _ = jax.jit(direction.update)(grad, direction.init(_PARAMS), _PARAMS)
    update = jax.jit(functools.partial(tx.update, batch=_BATCH))
    updates, state = update(grad, tx.init(_PARAMS), _PARAMS, grad=grad)
    rate = np.asarray(hd.metrics(state)["learning_rate/all"])
    assert rate > 0
    _assert_all_close(updates, jax.tree.map(lambda step: rate * step, steps), rtol=1e-4)
    params = optax.apply_updates(_PARAMS, updates)
    grad = jax.grad(_parabolas)(params, _BATCH)
    _, state = update(grad, state, params, grad=grad)
    slope, curvature = _quadratic_along(jax.tree.map(np.asarray, steps))
    found = hd.metrics(state)
    np.testing.assert_allclose(found["slope/all"], slope, rtol=1e-3)
    np.testing.assert_allclose(found["curvature/all"], curvature, rtol=1e-2)


def test_a_group_frozen_by_set_to_zero_is_said_to_be_and_stays_where_it_is():
    freeze = optax.partition({"body": optax.set_to_zero(), "head": optax.sgd(1.0)}, _LABELS)
    tx = optax.chain(freeze, _hidlr())
    step = jax.jit(_step(tx))
    params, state = step(_PARAMS, tx.init(_PARAMS), _BATCH)
    params, state = step(params, state, _BATCH)
    np.testing.assert_array_equal(params["w"], _PARAMS["w"])
    assert all(np.isfinite(rate) and rate > 0 for rate in _rates(state).values())
    assert _kept(state) == {"body": hd.Kept.NO_SLOPE, "head": hd.Kept.UPDATED}


# Transformations around hidlr that change the tree.


_AROUND = {
    "masked": lambda tx: optax.masked(tx, {"w": True, "v": False, "b": False}),
    "partition": lambda tx: optax.partition({"body": tx, "head": optax.sgd(1.0)}, _LABELS),
    "flatten": optax.flatten,
}


@pytest.mark.parametrize("around", _AROUND.values(), ids=_AROUND.keys())
def test_a_wrapper_that_changes_the_tree_is_told_to_go_inside(around):
    with pytest.raises(ValueError, match="hidlr has to be outermost"):
        around(_hidlr()).init(_PARAMS)


@pytest.mark.parametrize("around", [_AROUND["masked"], _AROUND["partition"]])
def test_labels_that_fit_any_tree_do_not_hide_the_masks(around):
    with pytest.raises(ValueError, match="hidlr has to be outermost"):
        around(hd.hiulr(_parabolas)).init(_PARAMS)


def test_flatten_around_labels_that_fit_any_tree_is_told_to_go_inside():
    tx = optax.flatten(hd.hiulr(_parabolas))
    state = tx.init(_PARAMS)
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        tx.update(_PARAMS, state, _PARAMS, batch=_BATCH, grad=_PARAMS)
    said = str(raised.value) + "".join(getattr(raised.value, "__notes__", ()))
    assert "optax.flatten" in said or "hidlr has to be outermost" in said


# Schedules, and wrappers that leave the tree alone.


def test_a_schedule_inside_gives_the_updates_of_one_after():
    decay = optax.linear_schedule(1.0, 0.1, 5)
    rule = {"update_interval": 100, "warmup": 0, "init_learning_rate": 0.01}
    inside = optax.chain(optax.sgd(1.0), _hidlr(schedule=decay, **rule))
    after = optax.chain(optax.sgd(1.0), _hidlr(**rule), optax.scale_by_schedule(decay))
    runs = []
    for tx in (inside, after):
        step, params, state = jax.jit(_step(tx)), _PARAMS, tx.init(_PARAMS)
        for _ in range(4):
            params, state = step(params, state, _BATCH)
        runs.append((params, state))
    (params, state), (params_after, _) = runs
    _assert_all_close(params, params_after)
    factor = decay(3)
    assert factor < 0.5
    _assert_all_close(
        hd.metrics(state)["learning_rate/head"], _rates(state)["head"] * factor, rtol=1e-6
    )


def test_injected_hyperparameters_can_be_changed_while_training():
    inject = optax.inject_hyperparams(hd.hidlr, ("loss_fn", "param_labels"))
    rule = inject(_parabolas, _LABELS, update_interval=100, warmup=2)
    tx = optax.chain(optax.sgd(1.0), rule)
    step = jax.jit(_step(tx))
    params, state, refreshes = _PARAMS, tx.init(_PARAMS), []
    for hyperparams in (
        *[{}] * 6,
        {"update_interval": 1},
        {"update_interval": 100},
        {"warmup": 9},
    ):
        state = optax.tree.set(state, **{name: jnp.asarray(x) for name, x in hyperparams.items()})
        params, state = step(params, state, _BATCH)
        refreshes.append(int(optax.tree.get(state, "refreshes")))
    # Rates far from their goal are looked for until the fifth update, twice the warm-up.
    assert refreshes == [1, 2, 3, 4, 5, 5, 6, 6, 7]


def test_conditionally_transform_leaves_the_rates_alone_until_the_condition_holds():
    tx = optax.conditionally_transform(_hidlr(), lambda step, **_: step >= 1)
    direction = _downhill()
    update = jax.jit(functools.partial(tx.update, batch=_BATCH, grad=_gradient()))
    first, state = update(direction, tx.init(_PARAMS), _PARAMS)
    _assert_all_equal(first, direction)
    assert optax.tree.get(state, "refreshes") == 0
    second, state = update(direction, state, _PARAMS)
    assert optax.tree.get(state, "refreshes") == 1
    rate = hd.metrics(state)["learning_rate/body"]
    assert rate > 0
    np.testing.assert_allclose(second["w"], direction["w"] * rate, rtol=1e-6)


def test_apply_if_finite_skips_a_bad_gradient_and_goes_on():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(1.0), _hidlr()), 3)
    step = jax.jit(_step(tx))
    bad_batch = _BATCH | {"centre": jax.tree.map(lambda leaf: leaf * jnp.nan, _BATCH["centre"])}
    params, state = step(_PARAMS, tx.init(_PARAMS), _BATCH)
    skipped_params, skipped = step(params, state, bad_batch)
    _assert_all_equal(skipped_params, params)
    _assert_all_equal(skipped.inner_state, state.inner_state)
    _, state = step(skipped_params, skipped, _BATCH)
    assert optax.tree.get(state, "count") == 2
    assert state.total_notfinite == 1


# What a refresh costs, and when it happens.


@pytest.mark.parametrize(("known", "evaluations"), [(("grad",), 7), (("value", "grad"), 4)])
def test_a_refresh_costs_one_evaluation_and_the_value_if_not_given(known, evaluations):
    loss_fn, calls = counted(_parabolas)
    free = {"value": _parabolas(_PARAMS, _BATCH), "grad": _gradient()}
    free = {name: free[name] for name in known}
    tx = _hidlr(loss_fn, warmup=1)
    update = jax.jit(functools.partial(tx.update, batch=_BATCH, **free))
    state, params = tx.init(_PARAMS), _PARAMS
    for _ in range(4):
        _, state = update(_downhill(), state, params)
    jax.effects_barrier()
    # The first of three refreshes compares the value, and so evaluates at both ends; the others
    # look back; the fourth update has none.
    assert int(optax.tree.get(state, "refreshes")) == 3
    assert len(calls) == evaluations


def test_refresh_false_leaves_the_rates_alone_and_evaluates_nothing():
    loss_fn, calls = counted(_parabolas)
    tx = _hidlr(loss_fn, init_learning_rate=0.1, warmup=0)
    known = {"value": _parabolas(_PARAMS, _BATCH), "grad": _gradient()}
    update = jax.jit(functools.partial(tx.update, batch=_BATCH, **known))
    small = jax.tree.map(lambda leaf: leaf / 100, _downhill())
    updates, state = update(small, tx.init(_PARAMS), _PARAMS, refresh=jnp.asarray(False))
    jax.effects_barrier()
    assert not calls
    _assert_all_equal(_rates(state), {"body": np.float32(0.1), "head": np.float32(0.1)})
    np.testing.assert_allclose(updates["v"], small["v"] * 0.1, rtol=1e-6)


def test_two_programs_one_without_refresh_train_as_one_with_a_branch():
    """`refresh` as a static argument: nothing of the refresh is left in the steps between."""
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(_parabolas, "all", warmup=5))

    def step(params, state, refresh):
        value, grad = jax.value_and_grad(_parabolas)(params, _BATCH)
        updates, state = tx.update(
            grad, state, params, batch=_BATCH, value=value, grad=grad, refresh=refresh
        )
        return optax.apply_updates(params, updates), state

    one, two = jax.jit(step), jax.jit(step, static_argnums=2)
    start = _PARAMS, tx.init(_PARAMS)
    lazy, usual = (two.lower(*start, refresh).compile().as_text() for refresh in (False, True))
    assert "conditional" in usual
    assert "conditional" not in lazy
    branched = divided = start
    for n in range(30):
        due = hd.is_due(n, warmup=5)
        branched, divided = one(*branched, jnp.asarray(True)), two(*divided, due)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), divided, branched)


def _accumulated_run(accumulate, every):
    """Six mini-steps on different batches; also how often the loss was evaluated."""
    loss_fn, calls = counted(_parabolas)
    tx = optax.chain(optax.sgd(1.0), _hidlr(loss_fn, update_interval=1))
    tx = _lenient(accumulate(_strict(tx), every))
    step = jax.jit(_step(tx))  # value and gradient come from the loss that does not count
    params, state = _PARAMS, tx.init(_PARAMS)
    for n in range(6):
        centre = jax.tree.map(lambda leaf, n=n: leaf + 0.1 * n, _BATCH["centre"])
        params, state = step(params, state, _BATCH | {"centre": centre})
    jax.effects_barrier()
    return params, state, len(calls)


def test_multi_steps_equals_optax_but_probes_only_at_the_step_that_is_applied():
    params, state, evaluations = _accumulated_run(hd.multi_steps, 3)
    params_alone, state_alone, evaluations_alone = _accumulated_run(optax.MultiSteps, 3)
    assert evaluations == 2 + 1  # the first compares value and gradient
    assert evaluations_alone == 3 * evaluations
    assert optax.tree.get(state, "refreshes") == 2
    _assert_all_close(params, params_alone)
    _assert_all_close(_rates(state), _rates(state_alone))


def test_multi_steps_follows_a_schedule_of_mini_steps():
    *_, evaluations = _accumulated_run(hd.multi_steps, lambda step: jnp.where(step < 2, 1, 2))
    assert evaluations == 2 + 3  # mini-steps 0, 1, 3 and 5


def test_multi_steps_hands_keywords_on_inside_a_chain():
    tx = optax.chain(_lenient(hd.multi_steps(_strict(_hidlr()), 1)), optax.scale(-1.0))
    _, state = tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=_BATCH, grad=_PARAMS)
    assert optax.tree.get(state, "refreshes") == 1


# JAX's transformations.


def _network(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"])
    return jnp.mean((hidden @ params["v"] + params["b"] - y) ** 2)


def _network_params(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "w": jax.random.normal(keys[0], (4, 8)) / 2,
        "v": jax.random.normal(keys[1], (8,)) / 2,
        "b": jnp.zeros(()),
    }


def _network_batches(count, seed=0, examples=32):
    x = jax.random.normal(jax.random.key(seed), (count, examples, 4))
    return x, jnp.sin(jnp.sum(x, axis=-1))


def _network_tx(loss_fn=_network):
    # Both steps with and without a refresh, in six.
    return optax.chain(_adam(), _hidlr(loss_fn, update_interval=2, warmup=2))


def _run(step, params, state, batches):
    for batch in zip(*batches, strict=True):
        params, state = step(params, state, batch)
    return params, state


@functools.cache
def _network_step():
    return jax.jit(_step(_network_tx(), _network))


def _start():
    params = _network_params()
    return params, _network_tx().init(params)


@functools.cache
def _reference_run():
    return _run(_network_step(), *_start(), _network_batches(6))


def test_the_run_the_others_are_compared_with_moves_the_rates():
    _, state = _reference_run()
    assert 4 <= optax.tree.get(state, "refreshes") <= 6
    assert set(_kept(state).values()) == {hd.Kept.UPDATED}
    _, before = _run(_network_step(), *_start(), _network_batches(1))
    assert all(rate != _rates(before)[name] for name, rate in _rates(state).items())


def test_scan_equals_the_loop():
    tx = _network_tx()
    step = _step(tx, _network)
    params = _network_params()

    @jax.jit
    def train(params, state, batches):
        def body(carry, batch):
            return step(*carry, batch), None

        return jax.lax.scan(body, (params, state), batches)[0]

    scanned = train(params, tx.init(params), _network_batches(6))
    _assert_all_close(scanned, _reference_run(), rtol=1e-3, atol=1e-5)


def test_vmap_over_runs_equals_each_run():
    tx = _network_tx()
    step = _step(tx, _network)
    runs = [(_network_params(seed), _network_batches(4, seed)) for seed in range(3)]
    params, batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    state = jax.vmap(tx.init)(params)
    together = jax.jit(jax.vmap(step))
    for n in range(4):
        batch = jax.tree.map(lambda leaf, n=n: leaf[:, n], batches)
        params, state = together(params, state, batch)
    for n, (one, its_batches) in enumerate(runs):
        expected = _run(_network_step(), one, tx.init(one), its_batches)
        actual = jax.tree.map(lambda leaf, n=n: leaf[n], (params, state))
        # A curvature along the whole step is a difference of losses: it multiplies their rounding.
        _assert_all_close(actual, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("optimized")
def test_params_and_state_can_be_donated():
    tx = _network_tx()
    params = _network_params()
    state = tx.init(params)
    step = _step(tx, _network)
    expected = _run(jax.jit(step), params, state, _network_batches(6))
    donated = jax.tree.leaves((params, state[0], _rates(state)))
    result = _run(jax.jit(step, donate_argnums=(0, 1)), params, state, _network_batches(6))
    assert all(leaf.is_deleted() for leaf in donated)
    _assert_all_equal(result, expected)


def test_an_update_outside_jit_equals_the_jitted_one():
    tx = _network_tx()
    params = _network_params()
    batch = jax.tree.map(lambda leaf: leaf[0], _network_batches(1))
    state = tx.init(params)
    eager = _step(tx, _network)(params, state, batch)
    _assert_all_close(eager, _network_step()(params, state, batch), rtol=1e-3)


# Precision.


@pytest.mark.parametrize(
    ("params_dtype", "value_dtype", "trusted"),
    [
        ("float32", "float32", True),
        ("float32", "bfloat16", False),
        ("bfloat16", "float32", False),
        ("float64", "float64", True),
        ("float64", "float32", False),
    ],
)
def test_a_value_less_precise_than_the_probes_is_not_trusted(params_dtype, value_dtype, trusted):
    with enable_x64(params_dtype == "float64"):
        params = jnp.array([1.0, 2.0], params_dtype)

        def loss(params):
            return jnp.sum(params**2)

        tx = hd.hidlr(None, "all")
        update = jax.jit(functools.partial(tx.update, value_fn=loss, grad=2 * params))
        _, state = update(-params, tx.init(params), params)
        # The loss is 5: where a value is used at all, this one is found out.
        _, told = update(-params, tx.init(params), params, value=jnp.array(4.5, value_dtype))
        slips = hd.Slip(int(told.diagnostics.slips))
        assert slips == (hd.Slip.VALUE if trusted else hd.Slip(0))
        one, other = (s.diagnostics.curvature["all"] for s in (told, state))
        np.testing.assert_allclose(one, other, rtol=1e-2)


# Many devices.


def _mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def test_sharded_parameters_and_data_give_the_rates_of_one_device():
    params, batches, mesh = _network_params(), _network_batches(6), _mesh()
    tx = _network_tx()
    layout = {"w": (None, "x"), "v": ("x",), "b": ()}
    put = {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*layout[name])))
        for name, leaf in params.items()
    }
    data = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "x")))
    state = jax.device_put(tx.init(params), NamedSharding(mesh, PartitionSpec()))
    result, state = _run(jax.jit(_step(tx, _network)), put, state, data)
    assert len(result["w"].sharding.device_set) == 8
    _assert_all_close((result, state), _reference_run(), rtol=2e-3, atol=1e-5)


def _shard_mapped(loss_fn, **kwargs):
    everywhere, split = PartitionSpec(), PartitionSpec("x")
    step = shard_map(
        _step(_network_tx(loss_fn), loss_fn),
        mesh=_mesh(),
        in_specs=(everywhere, everywhere, split),
        out_specs=(everywhere, everywhere),
        **kwargs,
    )
    params = _network_params()
    state = _network_tx().init(params)
    return _run(jax.jit(step), params, state, _network_batches(6))


def test_shard_map_with_pmean_in_the_loss_equals_one_device():
    def loss_fn(params, batch):
        return jax.lax.pmean(_network(params, batch), "x")

    # A curvature along the whole step multiplies the rounding of sums in another order.
    _assert_all_close(_shard_mapped(loss_fn), _reference_run(), rtol=1e-2, atol=1e-4)


def test_shard_map_without_pmean_is_an_error_and_replicas_do_not_drift_apart():
    # Older versions of jax refuse before hidlr does, in value_and_grad.
    with pytest.raises((TypeError, ValueError), match=r"pmean on the loss|argument to vjp"):
        _shard_mapped(_network)


# Libraries of layers.


class _NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.body(x))))[:, 0]


def _nnx_loss(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def _nnx_step(model, optimizer, batch):
    value, grads = nnx.value_and_grad(_nnx_loss)(model, batch)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def value_fn(params):
        copied = jax.tree.map(jnp.asarray, rest)  # batch statistics that may change and are lost
        return _nnx_loss(nnx.merge(graph, params, copied), batch)

    optimizer.update(model, grads, value_fn=value_fn, value=value, grad=grads)
    return value, hd.metrics(optimizer.opt_state)


def _nnx_model_and_optimizer():
    model = _NnxModel(nnx.Rngs(0))
    tx = optax.chain(_adam(), hd.hidlr(None, hd.label_by_role, update_interval=2, warmup=2))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@functools.cache
def _nnx_run():
    model, optimizer = _nnx_model_and_optimizer()
    batch = jax.tree.map(lambda leaf: leaf[0], _network_batches(1))
    statistics = model.norm.mean[...]
    values, metrics = zip(*(_nnx_step(model, optimizer, batch) for _ in range(6)), strict=True)
    assert not np.array_equal(model.norm.mean[...], statistics)  # frozen in the probes alone
    return values, metrics[-1], optimizer


def test_nnx_optimizer_works_as_it_is():
    values, metrics, _ = _nnx_run()
    assert values[-1] < values[0]
    assert 4 <= int(metrics["refreshes"]) <= 6
    groups = ("rest", "norm", "bias", "head")
    assert {f"learning_rate/{group}" for group in groups} < set(metrics)
    assert float(metrics["learning_rate/head"]) > 0


def test_metrics_of_an_nnx_optimizer_are_plain_arrays():
    _, inside_jit, optimizer = _nnx_run()
    for metrics in (inside_jit, hd.metrics(optimizer.opt_state)):
        assert {type(value) for value in metrics.values()} == {type(jnp.ones(()))}


class _LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1, name="head")(x)[:, 0]


class _TrainState(NamedTuple):
    params: Any
    statistics: Any
    opt_state: Any


def test_a_linen_loop_with_batch_norm_and_dropout_learns():
    model = _LinenModel()
    x, y = jax.tree.map(lambda leaf: leaf[0], _network_batches(1))
    variables = model.init(jax.random.key(0), x, train=False)
    params = variables["params"]
    tx = optax.chain(_adam(), hd.hidlr(None, hd.label_by_role(params), update_interval=4))

    def loss_fn(params, statistics, key):
        out, changed = model.apply(
            {"params": params, "batch_stats": statistics},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.mean((out - y) ** 2), changed["batch_stats"]

    @jax.jit
    def step(state, key):
        def value_fn(params):  # the same key at all probes, the statistics discarded
            return loss_fn(params, state.statistics, key)[0]

        (value, statistics), grad = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.statistics, key
        )
        updates, opt_state = tx.update(
            grad, state.opt_state, state.params, value_fn=value_fn, value=value, grad=grad
        )
        return _TrainState(optax.apply_updates(state.params, updates), statistics, opt_state), value

    state = _TrainState(params, variables["batch_stats"], tx.init(params))
    values = []
    for key in jax.random.split(jax.random.key(1), 40):
        state, value = step(state, key)
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])


def test_an_equinox_model_is_split_into_arrays_and_the_rest():
    model = eqx.nn.MLP(4, "scalar", 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    batch = jax.tree.map(lambda leaf: leaf[0], _network_batches(1))

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    labels = hd.label_by_path(params, [(".*/bias", "bias")], default="weight")
    tx = optax.chain(_adam(), hd.hidlr(loss_fn, labels))
    step = jax.jit(_step(tx, loss_fn))
    new_params, state = step(params, tx.init(params), batch)
    assert set(_kept(state).values()) == {hd.Kept.UPDATED}
    assert loss_fn(new_params, batch) < loss_fn(params, batch)


# Checkpoints, and what the state looks like from outside.


def test_a_checkpoint_survives_another_order_of_groups(tmp_path):
    def build(rules, initial):
        params = _network_params()
        labels = hd.label_by_path(params, rules)
        tx = optax.chain(
            optax.sgd(1.0),
            _hidlr(_network, labels, init_learning_rate=initial, update_interval=2, warmup=0),
        )
        return tx, {"params": params, "state": tx.init(params)}

    rules = [("w", "first"), ("v", "second"), ("b", "third")]
    rates = {"first": 0.1, "second": 0.2, "third": 0.3}
    x, y = _network_batches(6)
    tx, saved = build(rules, rates)
    step = jax.jit(_step(tx, _network))
    saved["params"], saved["state"] = _run(step, *saved.values(), (x[:3], y[:3]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)

    other_tx, template = build(rules[::-1], dict(reversed(rates.items())))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", template)
    _assert_all_equal(restored, saved)
    other_step = jax.jit(_step(other_tx, _network))
    rest = (x[3:], y[3:])
    continued = _run(other_step, restored["params"], restored["state"], rest)
    _assert_all_equal(continued, _run(step, *saved.values(), rest))


def test_fields_of_the_state_are_not_mistaken_for_those_of_others():
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(0.5), _hidlr())
    state = tx.init(_PARAMS)
    assert not {"value", "grad", "learning_rate"} & set(hd.HiDLRState._fields)
    assert not optax.tree.get_all_with_path(state[-1], "value")
    assert not optax.tree.get_all_with_path(state[-1], "grad")
    assert optax.tree.get(state, "learning_rate") == 0.5


def test_a_group_named_like_a_field_does_not_hide_it():
    tx = hd.hidlr(_parabolas, {"w": "slope", "v": "kept", "b": "count"})
    state = tx.init(_PARAMS)
    assert set(hd.metrics(state)) >= {"learning_rate/slope", "learning_rate/kept"}


# What is refused, before anything is computed.


_NO_HEAD = {"w": "body", "v": "head"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (_NO_HEAD, r"no label for the parameters 'b' \(1 in all\)"),
        (_LABELS | {"extra": "head"}, r"no parameters for the labels at 'extra'"),
        ({"w": {"deeper": "body"}, "v": "head", "b": "head"}, "'w/deeper'"),
        (_LABELS | {"v": 3}, r"a label has to be a str, got 3 \(int\) at 'v'"),
        (lambda params: _NO_HEAD, "no label for the parameters 'b'"),
        ({}, "no label, so there is no group"),
        (None, "no label, so there is no group"),
    ],
)
def test_labels_that_do_not_match_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        hd.hidlr(_parabolas, labels).init(_PARAMS)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_an_initial_rate_that_is_no_rate_is_refused(rate):
    with pytest.raises(ValueError, match=f"init_learning_rate must be finite and > 0, got {rate}"):
        hd.hidlr(_parabolas, _LABELS, init_learning_rate=rate)
    rates = {"body": 0.1, "head": rate}
    with pytest.raises(ValueError, match=r"init_learning_rate\['head'\] must be finite and > 0"):
        hd.hidlr(_parabolas, _LABELS, init_learning_rate=rates)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"body": 0.1}, r"missing are \['head'\]"),
        ({"body": 0.1, "head": 0.1, "neck": 0.1}, r"not among them are \['neck'\]"),
        ({}, r"missing are \['body', 'head'\]"),
    ],
)
def test_initial_rates_must_name_every_group_and_no_other(rates, message):
    with pytest.raises(ValueError, match=message):
        hd.hidlr(_parabolas, _LABELS, init_learning_rate=rates).init(_PARAMS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"update_interval": 0}, "update_interval must be a whole number >= 1, got 0"),
        ({"update_interval": -3}, "update_interval must be .* got -3"),
        ({"update_interval": 2.5}, "update_interval must be .* got 2.5"),
        ({"init_learning_rate": optax.constant_schedule(1.0)}, "schedule goes into schedule="),
        ({"schedule": 0.5}, "schedule must be a callable step -> factor, or None, got 0.5"),
        ({"warmup": -1}, "warmup must be a whole number >= 0, got -1"),
        ({"warmup": 0}, "init_learning_rate=None is found during warm-up, but warmup is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hd.hidlr(_parabolas, _LABELS, **kwargs)


def test_a_loss_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match=r"loss_fn must be a callable .* got str"):
        hd.hidlr("loss", _LABELS)


@dataclasses.dataclass(frozen=True)
class _Refused:
    """A call of `update` that is refused: what differs from a good call, and what is said."""

    message: str
    call: dict = dataclasses.field(default_factory=dict)
    loss_fn: Any = _parabolas


_REFUSED = {
    "no params": _Refused(r"call update\(updates, state, params", {"params": None}),
    "no loss": _Refused("hidlr has no loss to probe.*value_fn=", loss_fn=None),
    "no batch": _Refused("update was called without a batch: pass batch=", {"batch": None}),
    "updates of another structure": _Refused(
        "updates must have the structure of params", {"updates": _NO_HEAD}
    ),
    "grad of another structure": _Refused(
        "grad must have the structure of params", {"grad": _NO_HEAD}
    ),
    "grad of another shape": _Refused(
        r"grad must have the shapes of params: \(4,\) at 'v', got \(4, 1\)",
        {"grad": _PARAMS | {"v": jnp.ones((4, 1))}},
    ),
    "value not scalar": _Refused("value must be the scalar loss", {"value": jnp.ones(2)}),
    "no gradient": _Refused("hidlr needs the raw gradient of the loss", {"grad": None}),
    "a loss per example": _Refused(
        r"must return a real scalar.*shape=\(3,\)", loss_fn=lambda p, batch: p["w"][:, 0]
    ),
    "an auxiliary output": _Refused(
        "a real scalar and nothing beside it", loss_fn=lambda p, batch: (p["b"], batch)
    ),
    "an integer loss": _Refused("a real scalar", loss_fn=lambda p, batch: jnp.array(1)),
    "no array": _Refused("a real scalar", loss_fn=lambda p, batch: None),
    "another tree": _Refused("no label for the parameters 'new'", {"params": {"new": jnp.ones(2)}}),
}


@pytest.mark.parametrize("case", _REFUSED.values(), ids=_REFUSED.keys())
def test_an_update_that_cannot_work_is_refused_before_the_loss_is_evaluated(case):
    loss_fn, calls = (None, []) if case.loss_fn is None else counted(case.loss_fn)
    tx = hd.hidlr(loss_fn, _LABELS)
    good = {"updates": _PARAMS, "params": _PARAMS, "batch": _BATCH, "grad": _PARAMS}
    call = good | case.call
    with pytest.raises(ValueError, match=case.message):
        tx.update(call.pop("updates"), tx.init(_PARAMS), **call)
    jax.effects_barrier()
    assert not calls


def test_value_fn_wins_over_loss_fn_and_leaves_the_batch_alone():
    def never(params, batch):
        raise AssertionError("value_fn was given")

    def value_fn(params):
        return _parabolas(params, _BATCH)

    tx = _hidlr(never)
    state = tx.init(_PARAMS)
    result = tx.update(
        _downhill(), state, _PARAMS, value_fn=value_fn, batch=object(), grad=_gradient()
    )
    expected = _hidlr().update(_downhill(), state, _PARAMS, batch=_BATCH, grad=_gradient())
    _assert_all_close(result, expected, rtol=1e-4)


def test_value_fn_is_handed_the_keywords_that_it_names():
    def value_fn(params, batch, weight):
        return weight * _parabolas(params, batch)

    tx = _hidlr(None)
    state = tx.init(_PARAMS)
    weight = jnp.array(1.0)
    result = tx.update(
        _downhill(),
        state,
        _PARAMS,
        value_fn=value_fn,
        batch=_BATCH,
        weight=weight,
        other=None,
        grad=_gradient(),
    )
    expected = _hidlr().update(_downhill(), state, _PARAMS, batch=_BATCH, grad=_gradient())
    _assert_all_close(result, expected, rtol=1e-4)


def test_a_loss_that_fails_for_its_own_reasons_says_so():
    def broken(params, batch):
        return params["w"] @ params["v"] @ batch["missing"]

    tx = _hidlr(broken)
    with pytest.raises(KeyError, match="missing") as raised:
        tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=_BATCH, grad=_PARAMS)
    assert "hidlr was tracing the loss" in "".join(raised.value.__notes__)
