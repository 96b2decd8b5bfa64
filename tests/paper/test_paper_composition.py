"""What works together with `one_step`, and what says no."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paper_kit import bare
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


def _best_rate(direction, label):
    grad, curvature = _gradient(), jax.tree.map(np.asarray, _BATCH["curvature"])
    direction = jax.tree.map(np.asarray, direction)
    leaves = [name for name, group in _LABELS.items() if group == label]
    slope = -sum(np.sum(grad[name] * direction[name]) for name in leaves)
    return slope / sum(np.sum(curvature[name] * direction[name] ** 2) for name in leaves)


_EXACT = {"solver": hd.paper.diagonal(max_change=1e6), "ema_decay": 0.0}


def _plain(loss_fn=_parabolas, labels=_LABELS, **kwargs):
    return bare(loss_fn, labels, **{"init_learning_rate": 0.1} | kwargs)


def _coupled(loss_fn=_parabolas, labels=_LABELS, **kwargs):
    return hd.paper.one_step(loss_fn, labels, **kwargs)


_both = pytest.mark.parametrize("rule", [_plain, _coupled], ids=["plain", "coupled"])


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


@pytest.mark.parametrize("direction", _DIRECTIONS.values(), ids=_DIRECTIONS.keys())
def test_rates_are_the_best_along_the_direction_of(direction):
    tx = optax.chain(direction, _plain(**_EXACT))
    grad = _gradient()
    steps, _ = jax.jit(direction.update)(grad, direction.init(_PARAMS), _PARAMS)
    update = jax.jit(functools.partial(tx.update, batch=_BATCH, grad=grad))
    updates, state = update(grad, tx.init(_PARAMS), _PARAMS)
    best = {label: _best_rate(steps, label) for label in ("body", "head")}
    _assert_all_close(_rates(state), best, rtol=1e-3)
    rates = {name: np.asarray(_rates(state)[_LABELS[name]]) for name in steps}
    expected = {name: np.asarray(step) * rates[name] for name, step in steps.items()}
    _assert_all_close(updates, expected, rtol=1e-4)


def test_a_group_frozen_by_set_to_zero_keeps_its_rate_and_stays_where_it_is():
    freeze = optax.partition({"body": optax.set_to_zero(), "head": optax.sgd(1.0)}, _LABELS)
    tx = optax.chain(freeze, _plain())
    params, state = jax.jit(_step(tx))(_PARAMS, tx.init(_PARAMS), _BATCH)
    np.testing.assert_array_equal(params["w"], _PARAMS["w"])
    assert _rates(state)["body"] == np.float32(0.1)
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
        around(_plain()).init(_PARAMS)


@pytest.mark.parametrize("around", [_AROUND["masked"], _AROUND["partition"]])
def test_labels_that_fit_any_tree_do_not_hide_the_masks(around):
    with pytest.raises(ValueError, match="hidlr has to be outermost"):
        around(bare(_parabolas, "all")).init(_PARAMS)


@pytest.mark.parametrize("known", [{}, {"grad": _PARAMS}], ids=["no grad", "grad"])
def test_flatten_around_labels_that_fit_any_tree_is_told_to_go_inside(known):
    tx = optax.flatten(bare(_parabolas, "all"))
    state = tx.init(_PARAMS)
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        tx.update(_PARAMS, state, _PARAMS, batch=_BATCH, **known)
    said = str(raised.value) + "".join(getattr(raised.value, "__notes__", ()))
    assert "optax.flatten" in said or "hidlr has to be outermost" in said


# Schedules, and wrappers that leave the tree alone.


def test_a_schedule_inside_gives_the_updates_of_one_after():
    decay = optax.linear_schedule(1.0, 0.1, 5)
    rule = {"slope": "gradient", "solver": hd.paper.diagonal(), "update_interval": 2}
    inside = optax.chain(optax.sgd(1.0), _plain(schedule=decay, **rule))
    after = optax.chain(optax.sgd(1.0), _plain(**rule), optax.scale_by_schedule(decay))
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
    rates = np.array(list(_rates(state).values()))
    np.testing.assert_allclose(optax.tree.get(state, "applied"), rates * factor, rtol=1e-6)


def test_injected_hyperparameters_can_be_changed_while_training():
    inject = optax.inject_hyperparams(hd.paper.one_step, ("loss_fn", "param_labels"))
    rule = inject(_parabolas, _LABELS, update_interval=100, warmup=2)
    tx = optax.chain(optax.sgd(1.0), rule)
    step = jax.jit(_step(tx))
    params, state, refreshes = _PARAMS, tx.init(_PARAMS), []
    for hyperparams in (
        {},
        {},
        {},
        {"update_interval": 1},
        {"update_interval": 100},
        {"warmup": 9},
    ):
        state = optax.tree.set(state, **{name: jnp.asarray(x) for name, x in hyperparams.items()})
        params, state = step(params, state, _BATCH)
        refreshes.append(int(optax.tree.get(state, "refreshes")))
    assert refreshes == [1, 2, 2, 3, 3, 4]
    rates = np.array(list(_rates(state).values()))
    np.testing.assert_array_equal(optax.tree.get(state, "applied"), rates)


@_both
def test_conditionally_transform_leaves_the_rates_alone_until_the_condition_holds(rule):
    tx = optax.conditionally_transform(rule(), lambda step, **_: step >= 1)
    direction = _downhill()
    update = jax.jit(functools.partial(tx.update, batch=_BATCH, grad=_gradient()))
    first, state = update(direction, tx.init(_PARAMS), _PARAMS)
    _assert_all_equal(first, direction)
    assert optax.tree.get(state, "refreshes") == 0
    second, state = update(direction, state, _PARAMS)
    assert optax.tree.get(state, "refreshes") == 1
    rate = _rates(state)["body"]
    assert rate > 0
    np.testing.assert_allclose(second["w"], direction["w"] * rate, rtol=1e-6)


@_both
def test_apply_if_finite_skips_a_bad_gradient_and_goes_on(rule):
    tx = optax.apply_if_finite(optax.chain(optax.sgd(1.0), rule()), 3)
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


@pytest.mark.parametrize(
    ("known", "evaluations"), [((), 9), (("grad",), 9), (("value",), 8), (("value", "grad"), 8)]
)
def test_a_refresh_costs_four_evaluations_per_group_and_the_value_if_not_given(known, evaluations):
    loss_fn, calls = counted(_parabolas)
    tx = _plain(loss_fn)
    free = {"value": _parabolas(_PARAMS, _BATCH), "grad": _gradient()}
    free = {name: free[name] for name in known}
    update = jax.jit(functools.partial(tx.update, batch=_BATCH, **free))
    state = tx.init(_PARAMS)
    for _ in range(3):  # one refresh in ten steps
        _, state = update(_downhill(), state, _PARAMS)
    jax.effects_barrier()
    assert len(calls) == evaluations


def test_refresh_false_leaves_the_rates_alone_and_evaluates_nothing():
    loss_fn, calls = counted(_parabolas)
    tx = _plain(loss_fn)
    update = jax.jit(functools.partial(tx.update, batch=_BATCH))
    updates, state = update(_PARAMS, tx.init(_PARAMS), _PARAMS, refresh=jnp.asarray(False))
    jax.effects_barrier()
    assert not calls
    _assert_all_equal(_rates(state), {"body": np.float32(0.1), "head": np.float32(0.1)})
    np.testing.assert_allclose(updates["v"], _PARAMS["v"] * 0.1, rtol=1e-6)


def test_two_programs_one_without_refresh_train_as_one_with_a_branch():
    """`refresh` as a static argument: nothing of the refresh is left in the steps between."""
    tx = optax.chain(optax.sgd(1.0), _coupled(labels="all", warmup=5))

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
        due = n < 5 or n % 10 == 0
        branched, divided = one(*branched, jnp.asarray(True)), two(*divided, due)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), divided, branched)


# Losses, gradients and updates that are not finite.


_AT = {"x": jnp.array(1.0), "y": jnp.array(2.0)}
_DOWN = {"x": jnp.array(-1.0), "y": jnp.array(-1.0)}
_NOWHERE = {"point": jnp.array([1e3, 1e3]), "poison": jnp.array(0.0)}


def _poisoned(params, batch):
    """A parabola whose value at one point is replaced."""
    point = jnp.stack([params["x"], params["y"]])
    hit = jnp.all(jnp.abs(point - batch["point"]) < 1e-5)
    return jnp.where(hit, batch["poison"], 1.5 * params["x"] ** 2 + 2.5 * params["y"] ** 2)


@functools.cache
def _poisoned_rule(design):
    """The transformation, its jitted update and the state after one clean refresh."""
    rule = {"axis": bare, "gaussian": hd.paper.paper_hidlr}[design]
    tx = rule(_poisoned, {"x": "x", "y": "y"}, init_learning_rate=0.1, update_interval=1)
    update = jax.jit(tx.update)
    _, state = update(_DOWN, tx.init(_AT), _AT, batch=_NOWHERE)
    assert set(_kept(state).values()) == {hd.Kept.UPDATED}
    return update, state


def _assert_nothing_was_learned(state, before):
    for field in ("group_learning_rates", "slope", "curvature", "influence", "measurements"):
        _assert_all_equal(optax.tree.get(state, field), optax.tree.get(before, field))
    assert state.diagnostics.refreshes == before.diagnostics.refreshes + 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def _assert_it_recovers(update, state, **known):
    updates, recovered = update(_DOWN, state, _AT, batch=_NOWHERE, **known)
    assert set(_kept(recovered).values()) == {hd.Kept.UPDATED}
    assert _rates(recovered) != _rates(state)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, recovered)))


def _reach(design, state):
    """Joint draws are scaled by the rates; axis probes bend the loss at `_AT` by 0.002 of it."""
    rates, curvature = (
        np.array([float(group["x"]), float(group["y"])])
        for group in (_rates(state), state.diagnostics.curvature)
    )
    if design == "gaussian":
        return rates
    return np.clip(np.sqrt(0.002 * (1.5 * 1 + 2.5 * 4) / curvature), rates / 10, rates * 30)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("probe", range(-1, 8))  # −1 is the loss at the parameters
@pytest.mark.parametrize("design", ["axis", "gaussian"])
def test_one_bad_probe_keeps_every_rate_and_every_average(design, probe, poison):
    update, before = _poisoned_rule(design)
    points = hd.paper.probes(design, per_group=4).points(2, before.count)
    reach = jnp.asarray(_reach(design, before), jnp.float32)
    offset = points[probe] * reach if probe >= 0 else jnp.zeros(2)
    batch = {"point": jnp.array([1.0, 2.0]) - offset, "poison": jnp.float32(poison)}
    updates, state = update(_DOWN, before, _AT, batch=batch)
    _assert_nothing_was_learned(state, before)
    kept = _kept(state)
    if design == "gaussian" or probe == -1:
        assert kept == {"x": hd.Kept.NON_FINITE, "y": hd.Kept.NON_FINITE}
    else:
        bad, good = ("x", "y") if probe < 4 else ("y", "x")
        assert kept == {bad: hd.Kept.NON_FINITE, good: hd.Kept.OTHER_GROUP}
    _assert_all_equal(updates, {"x": -_rates(before)["x"], "y": -_rates(before)["y"]})
    _assert_it_recovers(update, state)


_ALL_BAD = {"x": hd.Kept.NON_FINITE, "y": hd.Kept.NON_FINITE}
_X_BAD = {"x": hd.Kept.NON_FINITE, "y": hd.Kept.OTHER_GROUP}
_Y_BAD = {"x": hd.Kept.OTHER_GROUP, "y": hd.Kept.NON_FINITE}


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("value", "grad", "update", "kept"),
    [
        pytest.param("all", None, None, _ALL_BAD, id="value"),
        pytest.param(None, "x", None, _X_BAD, id="grad-x"),
        pytest.param(None, "y", None, _Y_BAD, id="grad-y"),
        pytest.param(None, None, "x", None, id="update-x"),
        pytest.param(None, None, "y", None, id="update-y"),
    ],
)
def test_bad_information_keeps_every_rate_and_every_average(value, grad, update, kept, poison):
    poison = jnp.float32(poison)
    jitted, before = _poisoned_rule("axis")
    true_value, true_grad = jax.value_and_grad(_poisoned)(_AT, _NOWHERE)
    known = {
        "value": poison if value else true_value,
        "grad": true_grad | ({grad: poison} if grad else {}),
    }
    direction = _DOWN | ({update: poison} if update else {})
    updates, state = jitted(direction, before, _AT, batch=_NOWHERE, **known)
    _assert_nothing_was_learned(state, before)
    assert hd.Kept.UPDATED not in _kept(state).values()
    if kept is not None:
        assert _kept(state) == kept
    if update is not None:
        assert _kept(state)[update] == hd.Kept.NON_FINITE
    assert all(np.all(np.isfinite(leaf)) for name, leaf in updates.items() if name != update)
    _assert_it_recovers(jitted, state, value=true_value, grad=true_grad)


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


def _network_tx(rule, loss_fn=_network):
    kwargs = {"init_learning_rate": 0.02, "update_interval": 2}
    if rule is _coupled:
        kwargs |= {"warmup": 3}  # both steps with and without a refresh, in six
    return optax.chain(_adam(), rule(loss_fn, **kwargs))


def _run(step, params, state, batches):
    for batch in zip(*batches, strict=True):
        params, state = step(params, state, batch)
    return params, state


@functools.cache
def _network_step(rule):
    return jax.jit(_step(_network_tx(rule), _network))


@functools.cache
def _reference_run(rule):
    params = _network_params()
    return _run(_network_step(rule), params, _network_tx(rule).init(params), _network_batches(6))


@_both
def test_the_run_the_others_are_compared_with_moves_the_rates(rule):
    _, state = _reference_run(rule)
    assert optax.tree.get(state, "refreshes") == (4 if rule is _coupled else 3)
    assert set(_kept(state).values()) == {hd.Kept.UPDATED}
    assert all(rate != np.float32(0.02) for rate in _rates(state).values())


@_both
def test_scan_equals_the_loop(rule):
    tx = _network_tx(rule)
    step = _step(tx, _network)
    params = _network_params()

    @jax.jit
    def train(params, state, batches):
        def body(carry, batch):
            return step(*carry, batch), None

        return jax.lax.scan(body, (params, state), batches)[0]

    scanned = train(params, tx.init(params), _network_batches(6))
    _assert_all_close(scanned, _reference_run(rule), 1e-3)


@_both
def test_vmap_over_runs_equals_each_run(rule):
    tx = _network_tx(rule)
    step = _step(tx, _network)
    runs = [(_network_params(seed), _network_batches(4, seed)) for seed in range(3)]
    params, batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    state = jax.vmap(tx.init)(params)
    together = jax.jit(jax.vmap(step))
    for n in range(4):
        batch = jax.tree.map(lambda leaf, n=n: leaf[:, n], batches)
        params, state = together(params, state, batch)
    for n, (one, its_batches) in enumerate(runs):
        expected = _run(_network_step(rule), one, tx.init(one), its_batches)
        actual = jax.tree.map(lambda leaf, n=n: leaf[n], (params, state))
        # A curvature along the whole step is a difference of losses: it multiplies their rounding.
        _assert_all_close(actual, expected, rtol=1e-3 if rule is _plain else 1e-2, atol=1e-5)


@pytest.mark.usefixtures("optimized")
@_both
def test_params_and_state_can_be_donated(rule):
    tx = _network_tx(rule)
    params = _network_params()
    state = tx.init(params)
    step = _step(tx, _network)
    expected = _run(jax.jit(step), params, state, _network_batches(6))
    donated = jax.tree.leaves((params, state[0], _rates(state)))
    result = _run(jax.jit(step, donate_argnums=(0, 1)), params, state, _network_batches(6))
    assert all(leaf.is_deleted() for leaf in donated)
    _assert_all_equal(result, expected)


@_both
def test_an_update_outside_jit_equals_the_jitted_one(rule):
    tx = _network_tx(rule)
    params = _network_params()
    batch = jax.tree.map(lambda leaf: leaf[0], _network_batches(1))
    state = tx.init(params)
    eager = _step(tx, _network)(params, state, batch)
    _assert_all_close(eager, _network_step(rule)(params, state, batch), rtol=5e-3)


# Precision.


@pytest.mark.parametrize(
    ("dtype", "slope"),
    [(jnp.bfloat16, "gradient"), (jnp.bfloat16, "probes"), (jnp.float16, "probes")],
)
def test_a_curvature_is_found_at_offsets_that_the_parameters_cannot_hold(dtype, slope):
    params = jnp.full(3, 256.0, dtype)
    direction = jnp.full(3, -1.0, dtype)
    centre, rate = 255.75, 0.03
    assert params[0] + (direction[0].astype(jnp.float32) * 2 * rate).astype(dtype) == params[0]

    def loss(params):
        return jnp.sum((params.astype(jnp.float32) - centre) ** 2)

    tx = bare(None, "all", init_learning_rate=rate, slope=slope, **_EXACT)
    grad = jax.grad(loss)(params)
    _, state = tx.update(direction, tx.init(params), params, value_fn=loss, grad=grad)
    np.testing.assert_allclose(state.diagnostics.curvature["all"], 6.0, rtol=1e-2)
    np.testing.assert_allclose(state.group_learning_rates["all"], 0.25, rtol=1e-2)


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

        tx = bare(None, "all", init_learning_rate=0.1)
        update = jax.jit(functools.partial(tx.update, value_fn=loss))
        _, state = update(-params, tx.init(params), params)
        # The loss is 5: where a value is believed, this one changes what is found.
        _, told = update(-params, tx.init(params), params, value=jnp.array(4.5, value_dtype))
        found, expected = (float(x.diagnostics.curvature["all"]) for x in (told, state))
        assert (found != pytest.approx(expected, rel=1e-3)) == trusted


def _scan_loss(params, batch):
    def layer(carry, kernel):
        return carry + jnp.tanh(carry @ kernel), None

    hidden, _ = jax.lax.scan(layer, batch, params["layers"])
    return jnp.mean((hidden @ params["head"] - batch.sum(1)).astype(jnp.float32) ** 2)


def test_bfloat16_parameters_are_probed_in_their_own_type_where_wider_ones_do_not_fit():
    params = {"layers": jnp.full((3, 4, 4), 0.1, jnp.bfloat16), "head": jnp.ones(4, jnp.bfloat16)}
    batch = jnp.linspace(-1.0, 1.0, 64).reshape(16, 4).astype(jnp.bfloat16)
    tx = optax.chain(optax.sgd(1.0), _coupled(_scan_loss, {"layers": "layers", "head": "head"}))
    step, state = jax.jit(_step(tx, _scan_loss)), tx.init(params)
    first = _scan_loss(params, batch)
    for _ in range(20):
        params, state = step(params, state, batch)
    assert _scan_loss(params, batch) < 0.7 * first


@pytest.mark.parametrize(
    "curvature", [hd.paper.probes(batch_size=1), hd.paper.probes("gaussian", 3, 1)]
)
def test_one_probe_at_a_time_needs_no_batching_rule(curvature):
    def on_host(x):
        assert np.shape(x) == (3,)
        return np.asarray(np.sum(np.sin(x)), np.float32)

    def loss(params, batch):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(on_host, shape, params, vmap_method=None)

    tx = _coupled(loss, "all", curvature=curvature, slope="probes")
    params = jnp.ones(3)
    _, state = jax.jit(tx.update)(-params, tx.init(params), params, batch=0)
    assert int(state.diagnostics.refreshes) == 1


# Many devices.


def _mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


@_both
def test_sharded_parameters_and_data_give_the_rates_of_one_device(rule):
    params, batches, mesh = _network_params(), _network_batches(6), _mesh()
    tx = _network_tx(rule)
    layout = {"w": (None, "x"), "v": ("x",), "b": ()}
    put = {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*layout[name])))
        for name, leaf in params.items()
    }
    data = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "x")))
    state = jax.device_put(tx.init(params), NamedSharding(mesh, PartitionSpec()))
    result, state = _run(jax.jit(_step(tx, _network)), put, state, data)
    assert len(result["w"].sharding.device_set) == 8
    # Sums in another order: rounding, over the 2e-3 of the loss that a pair of probes bends it.
    rtol = 2e-3 if rule is _plain else 1e-2
    _assert_all_close((result, state), _reference_run(rule), rtol=rtol, atol=1e-5)


def _shard_mapped(rule, loss_fn, **kwargs):
    everywhere, split = PartitionSpec(), PartitionSpec("x")
    step = shard_map(
        _step(_network_tx(rule, loss_fn), loss_fn),
        mesh=_mesh(),
        in_specs=(everywhere, everywhere, split),
        out_specs=(everywhere, everywhere),
        **kwargs,
    )
    params = _network_params()
    state = _network_tx(rule).init(params)
    return _run(jax.jit(step), params, state, _network_batches(6))


@_both
def test_shard_map_with_pmean_in_the_loss_equals_one_device(rule):
    def loss_fn(params, batch):
        return jax.lax.pmean(_network(params, batch), "x")

    # Devices sum in another order, and a curvature multiplies the rounding of losses.
    rtol = 1e-3 if rule is _plain else 3e-2
    _assert_all_close(_shard_mapped(rule, loss_fn), _reference_run(rule), rtol=rtol, atol=1e-5)


@_both
def test_shard_map_without_pmean_is_an_error_and_replicas_do_not_drift_apart(rule):
    # Older versions of jax refuse before hidlr does, in value_and_grad.
    with pytest.raises((TypeError, ValueError), match=r"pmean on the loss|argument to vjp"):
        _shard_mapped(rule, _network)


# What the state looks like from outside.


def test_fields_of_the_state_are_not_mistaken_for_those_of_others():
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(0.5), _plain())
    state = tx.init(_PARAMS)
    assert not {"value", "grad", "learning_rate"} & set(state[-1]._fields)
    assert not optax.tree.get_all_with_path(state[-1], "value")
    assert not optax.tree.get_all_with_path(state[-1], "grad")
    assert optax.tree.get(state, "learning_rate") == 0.5


@pytest.mark.parametrize("curvature", [hd.paper.probes(), hd.paper.hessian()])
def test_every_field_of_the_state_is_found_by_its_name(curvature):
    state = optax.chain(optax.sgd(1.0), _coupled(curvature=curvature)).init(_PARAMS)
    for holder in (state[-1], state[-1].diagnostics):
        for name in holder._fields:
            # `get` raises a KeyError where the state has two of a name.
            found = optax.tree.get(state, name)
            assert jax.tree.structure(found) == jax.tree.structure(getattr(holder, name))


def test_a_group_may_be_named_like_a_field():
    tx = bare(_parabolas, {"w": "slope", "v": "kept", "b": "count"})
    _, state = tx.update(_downhill(), tx.init(_PARAMS), _PARAMS, batch=_BATCH)
    assert set(state.diagnostics.kept) == {"slope", "kept", "count"}
    assert set(map(int, state.diagnostics.kept.values())) == {hd.Kept.UPDATED}


def test_a_state_of_other_labels_is_refused():
    state = bare(_parabolas, {"w": "body", "v": "head", "b": "bias"}).init(_PARAMS)
    with pytest.raises(ValueError, match="the state has the rates of other groups"):
        bare(_parabolas, _LABELS).update(_PARAMS, state, _PARAMS, batch=_BATCH)


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
        bare(_parabolas, labels).init(_PARAMS)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("rule", [hd.paper.one_step, hd.paper.paper_hidlr])
def test_an_initial_rate_that_is_no_rate_is_refused(rule, rate):
    with pytest.raises(ValueError, match=f"init_learning_rate must be finite and > 0, got {rate}"):
        rule(_parabolas, _LABELS, init_learning_rate=rate)
    rates = {"body": 0.1, "head": rate}
    with pytest.raises(ValueError, match=r"init_learning_rate\['head'\] must be finite and > 0"):
        rule(_parabolas, _LABELS, init_learning_rate=rates)


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
        bare(_parabolas, _LABELS, init_learning_rate=rates).init(_PARAMS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"update_interval": 0}, "update_interval must be a whole number >= 1, got 0"),
        ({"update_interval": -3}, "update_interval must be .* got -3"),
        ({"update_interval": 2.5}, "update_interval must be .* got 2.5"),
        ({"init_learning_rate": optax.constant_schedule(1.0)}, "schedule goes into schedule="),
        ({"schedule": 0.5}, "schedule must be a callable step -> factor, or None, got 0.5"),
        ({"slope": "guess"}, "slope must be .* got 'guess'"),
        (
            {"slope": "probes", "curvature": hd.paper.probes(per_group=1)},
            "needs per_group >= 2, got Probes",
        ),
        ({"curvature": "axis"}, "curvature must be an estimator .* got 'axis'"),
        ({"solver": 0.9}, "solver must be a solver .* got 0.9"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        bare(_parabolas, _LABELS, **kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bare("loss", _LABELS), "loss_fn must be a callable .* got str"),
        (lambda: hd.paper.probes(per_group=0), "per_group must be 1 or more, got 0"),
        (lambda: hd.paper.probes(batch_size=0), "batch_size must be 1 or more, .* got 0"),
        (lambda: hd.paper.probes("grid"), "design must be .* got 'grid'"),
        (
            lambda: hd.paper.paper_hidlr(None, "all", per_group=1),
            "needs per_group >= 2, got Probes",
        ),
        (
            lambda: hd.paper.diagonal(max_change=1.0),
            "max_change must be finite and > 1, .* got 1.0",
        ),
    ],
)
def test_parts_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@dataclasses.dataclass(frozen=True)
class _Refused:
    """A call of `update` that is refused: what differs from a good call, and what is said."""

    message: str
    call: dict = dataclasses.field(default_factory=dict)
    rule: dict = dataclasses.field(default_factory=dict)
    loss_fn: Any = _parabolas


_NO_GRAD = {"grad": None}
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
    "slope without grad": _Refused(
        "slope='gradient' needs the raw gradient", _NO_GRAD, {"slope": "gradient"}
    ),
    "one probe without grad": _Refused(
        r"per_group=1.* cannot fit", _NO_GRAD, {"curvature": hd.paper.probes(per_group=1)}
    ),
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
    tx = bare(loss_fn, _LABELS, **case.rule)
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

    tx = _plain(never)
    state = tx.init(_PARAMS)
    result = tx.update(_downhill(), state, _PARAMS, value_fn=value_fn, batch=object())
    expected = _plain().update(_downhill(), state, _PARAMS, batch=_BATCH)
    _assert_all_close(result, expected, rtol=1e-4)


def test_value_fn_is_handed_the_keywords_that_it_names():
    def value_fn(params, batch, weight):
        return weight * _parabolas(params, batch)

    tx = _plain(None)
    state = tx.init(_PARAMS)
    weight = jnp.array(1.0)
    result = tx.update(
        _downhill(), state, _PARAMS, value_fn=value_fn, batch=_BATCH, weight=weight, other=None
    )
    expected = _plain().update(_downhill(), state, _PARAMS, batch=_BATCH)
    _assert_all_close(result, expected, rtol=1e-4)


def test_a_loss_that_fails_for_its_own_reasons_says_so():
    def broken(params, batch):
        return params["w"] @ params["v"] @ batch["missing"]

    tx = _plain(broken)
    with pytest.raises(KeyError, match="missing") as raised:
        tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=_BATCH)
    assert "hidlr was tracing the loss" in "".join(raised.value.__notes__)
