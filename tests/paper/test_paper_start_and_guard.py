"""How `one_step` begins, what it costs, what is refused and when its guard steps in."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paper_kit import bare
from support import counted, enable_x64, promoting

import hidlr_optax as hd
from hidlr_optax._diagnostics import Kept
from hidlr_optax.paper._refresh import first_rates, guard_factor

NAN, INF = math.nan, math.inf


def _rates(state):
    rates = optax.tree.get(state, "group_learning_rates")
    return {name: float(rate) for name, rate in rates.items()}


def _assert_all_equal(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


# The rates to begin with.


def _first_rates_in_python(rates, value, slope):
    """A hundredth of the loss over the sum of slopes, and no rate further than ten times off."""
    total = sum(abs(b) for b in slope)
    part = 0.01 * abs(value)
    found = part / total if total > 0 and math.isfinite(total) and math.isfinite(part) else 0.0
    if found <= 0:
        return [rate if rate > 0 else 1e-3 for rate in rates]
    return [found if rate == 0 else min(max(rate, found / 10), found * 10) for rate in rates]


@pytest.mark.parametrize(
    ("rates", "value", "slope"),
    [
        pytest.param([0, 0, 0], 2.0, [1, 2, 1], id="none asked for"),
        pytest.param([1e-9, 1e-9, 1e-9], 2.0, [1, 2, 1], id="too small"),
        pytest.param([1e6, 1e6, 1e6], 2.0, [1, 2, 1], id="too large"),
        pytest.param([2e-3, 5e-3, 4e-2], 2.0, [1, 2, 1], id="in between"),
        pytest.param([1e-9, 5e-3, 1e6], 2.0, [1, 2, 1], id="one of each"),
        pytest.param([0, 5e-3, 1e6], -2.0, [1, 2, 1], id="negative loss"),
        pytest.param([0, 5e-3, 1e6], 2.0, [1, -2, 1], id="slopes of opposite sign"),
        pytest.param([0, 5e-3, 1e6], 2.0, [1, -1, 0], id="slopes that sum to zero"),
        pytest.param([0, 5e-3, 1e6], 2.0, [0, 2, 0], id="groups without a slope"),
        pytest.param([0, 5e-3, 1e6], 2.0, [0, 0, 0], id="no slope at all"),
        pytest.param([0, 5e-3, 1e6], 0.0, [1, 2, 1], id="no loss"),
        pytest.param([0, 5e-3, 1e6], 0.0, [0, 0, 0], id="neither"),
        *(
            pytest.param([0, 5e-3, 1e6], bad, [1, 2, 1], id=f"loss {bad}")
            for bad in (NAN, INF, -INF)
        ),
        *(
            pytest.param([0, 5e-3, 1e6], 2.0, [1, bad, 1], id=f"slope {bad}")
            for bad in (NAN, INF, -INF)
        ),
    ],
)
def test_the_first_rates_are_those_of_plain_python(rates, value, slope):
    found = jax.jit(first_rates)(*map(jnp.float32, (rates, value, slope)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _first_rates_in_python(rates, value, slope), rtol=1e-6)


def _regression(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"] - y) ** 2)


_LABELS = {"w": "body", "v": "head", "b": "bias"}


def _noise_free_case():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5)).astype(np.float32)
    truth, start = (
        {
            "w": (rng.normal(size=(5, 6)) / 2).astype(np.float32),
            "v": (rng.normal(size=6) / 2).astype(np.float32),
            "b": np.float32(0.3 * n),
        }
        for n in (1, 0)
    )
    y = np.tanh(x @ truth["w"]) @ truth["v"] + truth["b"]
    return jax.tree.map(jnp.asarray, start), (jnp.asarray(x), jnp.asarray(y))


def _trained(loss_fn, tx, params, batch, steps):
    """Parameters, state and losses after so many steps, all information given."""

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, state), length=steps)

    (params, state), losses = run(params, tx.init(params))
    return params, state, np.asarray(losses)


def _adamw():
    return promoting("standard", optax.adamw(1.0))


def test_where_the_rates_begin_does_not_matter():
    params, batch = _noise_free_case()
    found = []
    for rate in (1e-9, 1e6, None):
        tx = optax.chain(_adamw(), hd.paper.one_step(_regression, _LABELS, init_learning_rate=rate))
        _, state, losses = _trained(_regression, tx, params, batch, 60)
        assert losses[-1] < 0.1 * losses[0]
        found.append(np.array([_rates(state)[name] for name in ("bias", "body", "head")]))
    for rates in found[1:]:
        ratio = rates / found[0]
        assert ratio.max() < 2
        assert ratio.min() > 0.5


def test_rates_that_are_found_can_be_injected_hyperparameters():
    params, batch = _noise_free_case()
    inject = optax.inject_hyperparams(hd.paper.one_step, ("loss_fn", "param_labels"))
    found = []
    for factory in (hd.paper.one_step, inject):
        tx = optax.chain(optax.sgd(1.0), factory(_regression, _LABELS, init_learning_rate=None))
        found.append(_rates(_trained(_regression, tx, params, batch, 12)[1]))
    for name, rate in found[0].items():
        assert found[1][name] == pytest.approx(rate, rel=1e-3)


def test_a_group_whose_gradient_is_zero_at_first_begins_at_the_common_rate():
    # Of two factors, the second begins at zero: the first has no gradient until it has moved.
    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((x @ params["a"] @ params["b"] - y) ** 2)

    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=(32, 4)), jnp.float32) for _ in range(2))
    params = {"a": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "b": jnp.zeros((2, 4))}
    tx = hd.paper.one_step(loss_fn, {"a": "a", "b": "b"}, init_learning_rate=None)
    value, grad = jax.value_and_grad(loss_fn)(params, (x, y))
    assert not np.any(grad["a"])
    direction = jax.tree.map(jnp.negative, grad)
    _, state = jax.jit(tx.update)(
        direction, tx.init(params), params, batch=(x, y), value=value, grad=grad
    )
    common = 0.01 * float(value) / float(jnp.sum(grad["b"] ** 2))
    assert _rates(state)["a"] == pytest.approx(common, rel=1e-5)
    assert int(state.diagnostics.kept["a"]) == Kept.NO_SLOPE
    assert int(state.diagnostics.kept["b"]) == Kept.UPDATED
    tx = optax.chain(_adamw(), tx)
    trained, state, losses = _trained(loss_fn, tx, params, (x, y), 40)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((trained, state)))
    assert int(optax.tree.get(state, "measurements")["a"]) > 0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("skipped", [1, 3])
def test_rates_are_found_at_the_first_refresh_even_if_that_is_not_the_first_update(skipped):
    params, batch = _noise_free_case()
    value, grad = jax.value_and_grad(_regression)(params, batch)
    direction = jax.tree.map(jnp.negative, grad)
    tx = hd.paper.one_step(_regression, _LABELS, init_learning_rate=None)
    update = jax.jit(functools.partial(tx.update, batch=batch, value=value, grad=grad))
    state = tx.init(params)
    for _ in range(skipped):
        updates, state = update(direction, state, params, refresh=jnp.asarray(False))
        assert set(_rates(state).values()) == {0.0}
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    _, state = update(direction, state, params, refresh=jnp.asarray(True))
    common = 0.01 * float(value) / sum(float(jnp.sum(leaf**2)) for leaf in grad.values())
    for rate in _rates(state).values():
        assert common / 2 * 0.999 <= rate <= common * 2 * 1.001


def test_the_lagged_slope_goes_back_by_the_rate_that_was_taken_not_by_the_one_put_in_its_place():
    def loss_fn(params, batch):
        del batch
        return 1 + params["x"] ** 2 / 2

    tx = hd.paper.one_step(loss_fn, "all", init_learning_rate=0.3, warmup=10)
    update = jax.jit(tx.update)
    params = {"x": jnp.ones(())}
    state = tx.init(params)
    for refresh in (False, True):
        value, grad = jax.value_and_grad(loss_fn)(params, 0)
        direction = jax.tree.map(jnp.negative, grad)
        updates, state = update(
            direction, state, params, batch=0, value=value, grad=grad, refresh=jnp.asarray(refresh)
        )
        params = optax.apply_updates(params, updates)
    # From 1, 0.3 along −1: slope 0.7 at the end, 1 at the start.
    assert float(state.diagnostics.slope["all"]) == pytest.approx(1.0, rel=2e-3)
    begun = 10 * 0.01 * (1 + 0.7**2 / 2) / 0.7**2  # as near to 0.3 as may be; then it doubles
    assert _rates(state)["all"] == pytest.approx(2 * begun, rel=1e-3)


# Warm-up.


def _refreshes_and_factors(updates, **kwargs):
    params, batch = _noise_free_case()
    tx = hd.paper.one_step(_regression, _LABELS, **kwargs)
    value, grad = jax.value_and_grad(_regression)(params, batch)
    direction = jax.tree.map(jnp.negative, grad)
    update = jax.jit(functools.partial(tx.update, batch=batch, value=value, grad=grad))
    state, refreshes, factors = tx.init(params), [], []
    for _ in range(updates):
        moved, state = update(direction, state, params)
        refreshes.append(int(state.diagnostics.refreshes))
        rate = float(state.applied[sorted(state.group_learning_rates).index("head")])
        factors.append(rate / float(state.group_learning_rates["head"]))
        np.testing.assert_allclose(moved["v"], direction["v"] * rate, rtol=1e-5)
    return refreshes, factors


@pytest.mark.parametrize(
    ("interval", "warmup", "schedule"),
    [
        (10, 10, None),
        (10, 4, None),
        (10, 0, None),
        (4, 10, None),
        (10, 10, lambda step: 1 / (1 + step)),
    ],
)
def test_warmup_refreshes_at_every_update_and_the_factor_is_that_of_the_schedule(
    interval, warmup, schedule
):
    refreshes, factors = _refreshes_and_factors(
        35, update_interval=interval, warmup=warmup, schedule=schedule
    )
    due = [step < warmup or step % interval == 0 for step in range(35)]
    assert refreshes == list(np.cumsum(due))
    expected = [1.0 if schedule is None else schedule(step) for step in range(35)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_the_defaults_are_a_warmup_of_twenty_and_a_refresh_every_ten():
    defaults = _refreshes_and_factors(35)
    assert defaults == _refreshes_and_factors(35, update_interval=10, warmup=20)
    assert defaults[0][-1] == 22  # the first twenty, and 20 and 30


# The guard.


def _cut_in_numpy(rates, change, value, slope, limit):
    if not np.isfinite(change):
        return 0.1
    if change <= limit * abs(value):
        return 1.0
    descent = 0.0 if slope is None else float(np.dot(slope, rates))
    curve = change + descent
    if not (descent > 0 and curve > 0):  # also where the slope is NaN
        return 0.5
    return float(np.clip(descent / (2 * curve), 0.1, 0.5))


@pytest.mark.parametrize("limit", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("value", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("change", [-1.0, 0.0, 0.1, 0.39, 0.41, 3.0, 1e30, NAN, INF, -INF])
def test_the_cut_is_that_of_numpy(change, value, limit):
    rates = np.array([0.1, 0.3])
    factor_of = jax.jit(functools.partial(guard_factor, limit=limit))
    for slope in (None, [1.0, 1.0], [30.0, 1.0], [3.0, -0.5], [-3.0, 1.0], [0.0, 0.0], [NAN, 1.0]):
        found = factor_of(
            jnp.float32(rates),
            jnp.float32(change),
            jnp.float32(value),
            None if slope is None else jnp.float32(slope),
        )
        assert found.dtype == jnp.float32
        naive = _cut_in_numpy(rates, change, value, slope, limit)
        assert float(found) == pytest.approx(naive, rel=1e-5), slope


def _walled(params, batch):
    """1 - x + x²/2, and from 0.02 on, beyond the probes and before the step, what `batch` says."""
    x = params["x"]
    beyond = jnp.where(x > 0.02, batch["steep"] * (x - 0.02) ** 2 + batch["poison"], 0.0)
    return 1 - x + x**2 / 2 + beyond


def _first_walled_step(steep=0.0, poison=0.0, direction=1.0, **kwargs):
    """The rate asked for is 0.1, and the first refresh doubles it."""
    tx = hd.paper.one_step(_walled, {"x": "x"}, init_learning_rate=0.1, warmup=10, **kwargs)
    params = {"x": jnp.zeros(())}
    updates, state = jax.jit(tx.update)(
        {"x": jnp.float32(direction)},
        tx.init(params),
        params,
        batch={"steep": jnp.float32(steep), "poison": jnp.float32(poison)},
        value=jnp.float32(1),
        grad={"x": jnp.float32(-1)},
    )
    return float(updates["x"]), _rates(state)["x"], int(state.diagnostics.cuts)


@pytest.mark.parametrize("steep", [0.0, 11.0, 12.0, 14.8, 20.0, 30.0, 1e4])
def test_a_step_that_raises_the_loss_too_much_is_cut(steep):
    moved, rate, cuts = _first_walled_step(steep)
    change = -0.2 + 0.2**2 / 2 + steep * (0.2 - 0.02) ** 2
    factor = 1.0 if change <= 0.2 else min(max(0.2 / (2 * (change + 0.2)), 0.1), 0.5)
    assert rate == pytest.approx(0.2 * factor, rel=1e-3)
    assert cuts == (factor < 1)
    assert moved == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_step_to_where_the_loss_is_not_finite_is_cut_to_a_tenth(poison):
    _, rate, cuts = _first_walled_step(poison=poison)
    assert rate == pytest.approx(0.02, rel=1e-3)
    assert cuts == 1


def test_a_step_that_ascends_is_cut_by_half():
    lenient, strict = (_first_walled_step(direction=-1.0, max_rise=rise)[1:] for rise in (0.2, 0.0))
    assert lenient == (pytest.approx(0.05, rel=1e-3), 0)
    assert strict == (pytest.approx(0.025, rel=1e-3), 1)


@pytest.mark.parametrize("rule", [{"max_rise": INF}, {"solver": hd.paper.diagonal()}])
def test_without_a_guard_nothing_is_cut(rule):
    _, rate, cuts = _first_walled_step(steep=1e4, **rule)
    assert rate == pytest.approx(0.2, rel=1e-3)
    assert cuts == 0


def test_the_diagonal_solver_can_be_guarded_too():
    _, rate, cuts = _first_walled_step(steep=1e4, solver=hd.paper.diagonal(), max_rise=0.2)
    assert rate == pytest.approx(0.2 / 10, rel=1e-3)
    assert cuts == 1


def test_cuts_are_counted():
    tx = hd.paper.one_step(_walled, {"x": "x"}, init_learning_rate=0.1)
    params, update = {"x": jnp.zeros(())}, jax.jit(tx.update)
    state = tx.init(params)
    for poison, cuts in ((NAN, 1), (0.0, 1), (NAN, 2), (NAN, 2)):
        _, state = update(
            {"x": jnp.float32(1)},
            state,
            params,
            batch={"steep": jnp.float32(0), "poison": jnp.float32(poison)},
            value=jnp.float32(1),
            grad={"x": jnp.float32(-1)},
        )
        assert int(state.diagnostics.cuts) == cuts, _rates(state)


# What is not finite leaves the state as it was.


def _bowl(params, batch):
    return batch + 1.5 * params["x"] ** 2 + 2.5 * params["y"] ** 2


_AT = {"x": jnp.array(1.0), "y": jnp.array(2.0)}
_DOWN = {"x": jnp.array(-1.0), "y": jnp.array(-1.0)}


@functools.cache
def _bowl_rule(max_rise=0.2):
    """The jitted update, and the states before and after one clean refresh."""
    tx = hd.paper.one_step(_bowl, {"x": "x", "y": "y"}, max_rise=max_rise)
    update = jax.jit(tx.update)
    state = tx.init(_AT)
    _, after = update(_DOWN, state, _AT, **_known())
    assert set(map(int, after.diagnostics.kept.values())) == {Kept.UPDATED}
    return update, state, after


def _known(batch=0.0, **other):
    value, grad = jax.value_and_grad(_bowl)(_AT, jnp.float32(batch))
    return {"batch": jnp.float32(batch), "value": value, "grad": grad} | other


def _assert_nothing_was_learned(state, before):
    for field in ("group_learning_rates", "slope", "curvature", "measurements", "cuts"):
        _assert_all_equal(optax.tree.get(state, field), optax.tree.get(before, field))
    assert int(state.diagnostics.refreshes) == int(before.diagnostics.refreshes) + 1
    assert Kept.UPDATED not in set(map(int, state.diagnostics.kept.values()))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("what", ["loss", "value", "grad"])
def test_bad_information_keeps_rates_averages_and_cuts(what, first, poison):
    update, *states = _bowl_rule()
    before, bad = states[0 if first else 1], jnp.float32(poison)
    grad = _known()["grad"]
    known = {
        "loss": lambda: _known(batch=poison, grad=grad),
        "value": lambda: _known(value=bad),
        "grad": lambda: _known(grad=grad | {"x": bad}),
    }[what]()
    updates, state = update(_DOWN, before, _AT, **known)
    _assert_nothing_was_learned(state, before)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
    _, recovered = update(_DOWN, state, _AT, **_known())
    assert set(map(int, recovered.diagnostics.kept.values())) == {Kept.UPDATED}
    assert _rates(recovered) != _rates(state)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_updates_that_are_not_finite_are_no_reason_to_cut(poison):
    update, before, after = _bowl_rule()
    bad = _DOWN | {"x": jnp.float32(poison)}
    _, first = update(bad, before, _AT, **_known())
    _assert_nothing_was_learned(first, before)
    # Later, the refresh looks back along a direction that was finite, and goes on as without guard.
    _, second = update(bad, after, _AT, **_known())
    unguarded, *_ = _bowl_rule(max_rise=INF)
    _, expected = unguarded(bad, after, _AT, **_known())
    assert set(map(int, second.diagnostics.kept.values())) == {Kept.UPDATED}
    assert int(second.diagnostics.cuts) == 0
    for name, rate in _rates(expected).items():
        assert _rates(second)[name] == pytest.approx(rate, rel=1e-5)
    # The one after looks back along the bad one.
    _, third = update(_DOWN, second, _AT, **_known())
    _assert_nothing_was_learned(third, second)
    _, fourth = update(_DOWN, third, _AT, **_known())
    assert set(map(int, fourth.diagnostics.kept.values())) == {Kept.UPDATED}


# What it costs.


@pytest.mark.parametrize(
    ("with_value", "dtype", "extra"),
    [(True, "float32", 1), (False, "float32", 2), (True, "bfloat16", 2), (False, "bfloat16", 2)],
)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_refresh_of_one_step_costs_two_evaluations_per_group_and_the_guard(
    groups, with_value, dtype, extra
):
    def loss_fn(params, batch):
        return batch + sum(jnp.sum((leaf.astype(jnp.float32) - 1) ** 2) for leaf in params.values())

    counting, calls = counted(loss_fn)
    params = {f"p{n}": jnp.zeros(2, dtype) for n in range(3)}
    labels = "all" if groups == 1 else {name: name for name in params}
    tx = hd.paper.one_step(counting, labels, warmup=10)
    value, grad = jax.value_and_grad(loss_fn)(params, 0.0)
    direction = jax.tree.map(jnp.negative, grad)
    update = jax.jit(tx.update)
    state, counts = tx.init(params), []
    for _ in range(22):
        before = len(calls)
        _, state = update(
            direction, state, params, batch=0.0, value=value if with_value else None, grad=grad
        )
        jax.effects_barrier()
        counts.append(len(calls) - before)
    once = 2 * groups + extra
    expected = [once if step < 10 or step % 10 == 0 else 0 for step in range(22)]
    assert counts == expected


# Types.


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("value_kind", ["float32", "float64"])
def test_a_loss_of_any_precision_beside_a_value_of_another_keeps_the_state_float32(
    kind, value_kind
):
    with enable_x64(True):

        def loss_fn(params, batch):
            return jnp.sum((params["w"] - 1) ** 2).astype(kind)

        params = {"w": jnp.zeros(3, jnp.float32)}
        tx = hd.paper.one_step(loss_fn, "all")
        update = jax.jit(tx.update)
        state = tx.init(params)
        types = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
        for _ in range(2):
            _, state = update(
                {"w": jnp.ones(3, jnp.float32)},
                state,
                params,
                batch=0,
                value=jnp.asarray(3, value_kind),
                grad={"w": jnp.full(3, -2, jnp.float32)},
            )
            now = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
            assert now == types


def test_bfloat16_parameters_are_trained_by_one_step():
    params, batch = _noise_free_case()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def loss_fn(params, batch):
        return _regression(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), batch)

    tx = optax.chain(_adamw(), hd.paper.one_step(loss_fn, _LABELS))
    trained, state, losses = _trained(loss_fn, tx, params, batch, 60)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.bfloat16)}
    assert all(0 < rate < INF for rate in _rates(state).values())
    assert losses[-1] < 0.1 * losses[0]


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hd.paper.one_step(None, "all", warmup=2.5),
            "warmup must be a whole number >= 0, got 2.5",
        ),
        (
            lambda: hd.paper.one_step(None, "all", warmup=-1),
            "warmup must be a whole number >= 0, got -1",
        ),
        (
            lambda: hd.paper.one_step(None, "all", init_learning_rate=None, warmup=0),
            "init_learning_rate=None is found during warm-up, but warmup is 0",
        ),
        (lambda: hd.paper.paper_hidlr(None, "all", init_learning_rate=None), "warmup is 0"),
        (lambda: hd.paper.one_step(None, "all", max_rise=-1), "max_rise must be >= 0, got -1"),
        (lambda: hd.paper.one_step(None, "all", max_rise=NAN), "max_rise must be >= 0, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_cannot_be_found_without_the_gradient():
    params, batch = _noise_free_case()
    tx = bare(_regression, _LABELS, init_learning_rate=None, warmup=10)
    with pytest.raises(ValueError, match="init_learning_rate=None is found from the gradient"):
        tx.update(params, tx.init(params), params, batch=batch)


def test_one_step_without_the_gradient_says_what_to_pass():
    params, batch = _noise_free_case()
    tx = hd.paper.one_step(_regression, _LABELS)
    with pytest.raises(ValueError, match=r"needs the raw gradient of the loss: pass grad="):
        tx.update(params, tx.init(params), params, batch=batch)
