"""What a new user gets wrong: each slip is noticed and named, with the change that fixes it."""

import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import promoting

import hidlr_optax as hd
from hidlr_optax import Kept, Slip

LABELS = {"body": "body", "head": "head"}


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - y) ** 2)


def _params():
    keys = jax.random.split(jax.random.key(0))
    body, head = jax.random.normal(keys[0], (8, 16)) / 3, jax.random.normal(keys[1], (16,)) / 4
    return {"body": body, "head": head}


def _batches(seed, steps, size=32):
    x = jax.random.normal(jax.random.key(seed), (steps, size, 9))
    return x[..., :8], x[..., 0] + x[..., 8] / 2


def _adamw():
    return promoting("standard", optax.adamw(1.0))


def _trained(rule, base=None, value_of=None, grad_of=None, steps=40, compiled=jax.jit):
    """The state after a run whose value and gradient are what these functions make of them.

    `value_of` gets the loss, and the loss of another batch.
    """
    tx = optax.chain(base or _adamw(), rule)

    @compiled
    def step(params, state, batch, other):
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        given = value if value_of is None else value_of(value, loss_fn(params, other))
        raw = grad if grad_of is None else grad_of(grad)
        updates, state = tx.update(grad, state, params, batch=batch, value=given, grad=raw)
        return optax.apply_updates(params, updates), state

    params = _params()
    state = tx.init(params)
    for batch, other in zip(
        zip(*_batches(1, steps), strict=True), zip(*_batches(2, steps), strict=True), strict=True
    ):
        params, state = step(params, state, batch, other)
    return state


def _rates(state):
    return [float(rate) for rate in optax.tree.get(state, "group_learning_rates").values()]


def _slips(state):
    return Slip(int(hd.metrics(state)["slips"]))


def _falling(peak):
    return lambda step: peak * (1 - step.astype(jnp.float32) / 40)


# 1. A direction that goes uphill.


@pytest.mark.parametrize("base", ["scale_by_adam", "identity"])
def test_a_direction_that_ascends_is_named_with_its_mend(base):
    bases = {"scale_by_adam": optax.scale_by_adam(), "identity": optax.identity()}
    state = _trained(hd.hidlr(loss_fn, LABELS), promoting("standard", bases[base]), steps=12)
    found = hd.metrics(state)
    assert {int(found[f"kept/{name}"]) for name in LABELS} == {Kept.ASCENDS}
    assert "scale(-1.0)" in hd.explain(state)
    assert "goes uphill" in hd.explain(state)


def test_a_direction_that_descends_is_not_said_to_ascend():
    state = _trained(hd.hidlr(loss_fn, LABELS))
    assert "uphill" not in hd.explain(state)


# Steps that are changed after `hidlr`.

CHANGED = {
    "sign": optax.scale(-1.0),
    "size": optax.scale(0.1),
    "clip": optax.clip_by_global_norm(1e-6),
    "dropped": optax.set_to_zero(),
    "optimizer": _adamw(),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_step_that_is_changed_after_hidlr_is_named(change):
    changed = optax.chain(hd.hidlr(loss_fn, LABELS), promoting("standard", CHANGED[change]))
    state = _trained(changed)
    assert _slips(state) == Slip.STEP
    assert "did not move by the step" in hd.explain(state)
    assert not any(line.endswith("ok") for line in hd.explain(state).splitlines())


@pytest.mark.parametrize("labels", [LABELS, "all"], ids=["two", "one"])
@pytest.mark.parametrize("interval", [1, 10])
def test_a_step_that_is_taken_as_it_is_is_not(labels, interval):
    told = {"update_interval": interval, "schedule": _falling(1.0)}
    state = _trained(hd.hidlr(loss_fn, labels, **told))
    assert _slips(state) == Slip(0)
    assert "did not move" not in hd.explain(state)


def test_steps_that_bfloat16_parameters_round_away_are_not_compared():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _params())
    tx = promoting("standard", optax.chain(optax.sgd(1.0), hd.hidlr(loss_fn, LABELS)))
    state = tx.init(params)
    batch = tuple(part[0] for part in _batches(1, 1))

    @jax.jit
    def update(state):
        with jax.numpy_dtype_promotion("standard"):
            grad = jax.grad(loss_fn)(params, batch)
            return tx.update(grad, state, params, batch=batch, grad=grad)[1]

    for _ in range(5):
        state = update(state)
    assert _slips(state) == Slip(0)


# 2. `value` and `grad` of another function.

OTHER_VALUES = {
    "of another batch": lambda value, other: other,
    "a sum in place of a mean": lambda value, other: 32 * value,
    "with a penalty": lambda value, other: value + 0.1,
    "far too small": lambda value, other: 1e-5 * value,
}


@pytest.mark.parametrize("labels", [LABELS, "all"], ids=["two", "one"])
@pytest.mark.parametrize("slip", OTHER_VALUES)
def test_a_value_of_another_function_is_named_and_moves_no_rate(labels, slip):
    """Nothing can be measured with it: the first rates stay, and `explain` says why."""
    right = _trained(hd.hidlr(loss_fn, labels))
    wrong = _trained(hd.hidlr(loss_fn, labels), value_of=OTHER_VALUES[slip])
    assert Slip.VALUE in _slips(wrong)
    assert "`value` is not the loss" in hd.explain(wrong)
    assert _slips(right) == Slip(0)
    assert "`value`" not in hd.explain(right)


def test_a_loss_without_a_forward_mode_still_has_its_value_compared():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def loss(params, batch):
        return jnp.mean(square(params["w"] - batch))

    tx = optax.chain(optax.sgd(1.0), hd.hiulr(loss))
    params = {"w": jnp.ones(3)}
    value, grad = jax.value_and_grad(loss)(params, 3.0)
    for factor in (1.0, 2.0):
        _, state = jax.jit(tx.update)(
            grad, tx.init(params), params, batch=3.0, value=factor * value, grad=grad
        )
        assert _slips(state) == (Slip.VALUE if factor == 2 else Slip(0))


@pytest.mark.xfail(strict=False, reason="a value of 1e-8 is compared to a part in 10,000")
def test_a_loss_that_is_all_rounding_is_no_mismatch():
    """The surrogate of a policy gradient: its terms cancel, its gradient does not."""

    def surrogate(params, batch):
        return jnp.mean(jnp.exp(batch @ params["w"]) * (batch[:, 0] - jnp.mean(batch[:, 0])))

    params = {"w": jnp.zeros(9)}
    batch = jax.random.normal(jax.random.key(0), (256, 9))
    tx = optax.chain(optax.sgd(1.0), hd.hiulr(surrogate))
    value, grad = jax.value_and_grad(surrogate)(params, batch)
    assert abs(float(value)) < 1e-7
    _, state = jax.jit(tx.update)(
        grad, tx.init(params), params, batch=batch, value=-value - 3e-8, grad=grad
    )
    assert _slips(state) == Slip(0)


# 3. A schedule in learning rates.


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(3e-4, 1000),
        optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000),
        lambda step: 1e-2,
    ],
    ids=["cosine", "warm-up", "plain"],
)
def test_a_schedule_in_learning_rates_is_warned_of(schedule):
    with pytest.warns(UserWarning, match="a factor of the rates, 1 at its peak") as caught:
        hd.hidlr(None, "all", schedule=schedule)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def _of_ones_own(step):
    raise RuntimeError("only inside of a training run")


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        optax.cosine_decay_schedule(1.0, 1000),
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 10_000, 100_000),
        optax.linear_schedule(1.0, 0.0, 3),
        optax.piecewise_constant_schedule(1.0, {10: 0.1}),
        lambda step: 1.0,
        lambda step: 0.3,
        lambda step: 0.0,
        lambda step: 1.0 - step / 100.0,
        lambda step: step / 100.0,
        _of_ones_own,
    ],
)
def test_a_schedule_that_is_a_factor_is_not_warned_of(schedule):
    hd.hidlr(None, "all", schedule=schedule)  # warnings are errors


@pytest.mark.parametrize("peak", [3.0, 1.5])
def test_a_schedule_that_exceeds_one_is_warned_of_and_named(peak):
    with pytest.warns(UserWarning, match=f"schedule reaches {peak:.3g}") as caught:
        rule = hd.hidlr(loss_fn, LABELS, schedule=lambda n: jnp.maximum(_falling(peak)(n), 0.0))
    assert len(caught) == 1
    assert f"The schedule has been at {peak:.3g}" in hd.explain(_trained(rule))


_COSINE = optax.cosine_decay_schedule(1.0, 1000)


@pytest.mark.parametrize(
    "base",
    [
        lambda: optax.adamw(_COSINE),
        lambda: optax.chain(optax.clip(1.0), optax.sgd(_COSINE)),
        lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=_COSINE),
    ],
    ids=["adamw", "inside of a chain", "inject_hyperparams"],
)
def test_a_schedule_of_the_optimizer_itself_is_named(base):
    with jax.numpy_dtype_promotion("standard"):
        with pytest.warns(UserWarning, match="a schedule of its own"):
            state = hd.hessian_informed(base(), loss_fn, LABELS).init(_params())
        assert "a schedule of its own" in hd.explain(state)
        chain = optax.chain(base(), hd.hidlr(loss_fn, LABELS))
        assert "a schedule of its own" in hd.explain(chain.init(_params()))


def test_an_optimizer_without_a_schedule_is_not_said_to_have_one():
    injected = optax.inject_hyperparams(optax.adamw)(learning_rate=1.0)
    for base in (optax.adamw(1.0), injected):
        with jax.numpy_dtype_promotion("standard"):
            state = hd.hessian_informed(base, loss_fn, LABELS).init(_params())
        assert "Nothing stands out." in hd.explain(state)


# 4. An update that is not jitted.


def _calls(tx, steps):
    """Un-jitted updates; the state after them."""
    params, batch = _params(), tuple(part[0] for part in _batches(1, 1))
    state = tx.init(params)
    value, grad = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    direction = jax.tree.map(jnp.negative, grad)
    for _ in range(steps):
        _, state = tx.update(direction, state, params, batch=batch, value=value, grad=grad)
    return state


@pytest.mark.parametrize("accumulated", [False, True])
def test_updates_outside_of_jit_are_warned_of_once(accumulated):
    tx = hd.hidlr(loss_fn, LABELS, init_learning_rate=1e-3, warmup=0)
    tx = hd.multi_steps(tx, 2) if accumulated else tx
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _calls(promoting("standard", tx), 5)
    assert [str(warning.message)[:45] for warning in caught] == [
        "hidlr: update is called outside of jax.jit, w"
    ]
    assert caught[0].filename.startswith(str(Path(__file__).parent))


def test_the_warning_names_the_line_of_the_user_through_a_chain():
    tx = optax.chain(optax.chain(hd.hidlr(loss_fn, LABELS, init_learning_rate=1e-3, warmup=0)))
    with jax.numpy_dtype_promotion("standard"), pytest.warns(UserWarning, match="jax.jit") as found:
        _calls(tx, 2)
    assert found[0].filename == __file__


def test_one_update_outside_of_jit_is_no_loop():
    _calls(hd.hidlr(loss_fn, LABELS), 1)  # warnings are errors


@pytest.mark.filterwarnings("ignore:hidlr. update is called outside")
def test_outside_of_jit_nothing_is_compiled_between_refreshes(caplog):
    tx = hd.hidlr(loss_fn, LABELS, init_learning_rate=1e-3, warmup=0)
    params, batch = _params(), tuple(part[0] for part in _batches(1, 1))
    value, grad = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    direction, state = jax.tree.map(jnp.negative, grad), tx.init(params)
    for step in range(6):
        if step == 2:  # one refresh, and one update whose single operations are compiled
            caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            _, state = tx.update(direction, state, params, batch=batch, value=value, grad=grad)
    assert "ompil" not in caplog.text
    assert int(hd.metrics(state)["refreshes"]) == 1


@pytest.mark.filterwarnings("ignore:hidlr. update is called outside")
def test_outside_of_jit_the_numbers_are_the_same():
    compiled, plain = (
        _trained(hd.hidlr(loss_fn, LABELS, warmup=3), steps=12, compiled=compiled)
        for compiled in (jax.jit, lambda step: step)
    )
    types = [
        [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
        for state in (compiled, plain)
    ]
    assert types[0] == types[1]
    np.testing.assert_allclose(_rates(plain), _rates(compiled), rtol=1e-3)


# 6. Frozen groups.


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_frozen_groups_have_no_slope_from_the_first_refresh_on(steps):
    parts = {"trained": _adamw(), "frozen": optax.set_to_zero()}
    base = optax.partition(parts, {"body": "frozen", "head": "trained"})
    found = hd.metrics(_trained(hd.hidlr(loss_fn, LABELS), base, steps=steps))
    assert int(found["kept/body"]) == Kept.NO_SLOPE
    assert int(found["kept/head"]) != Kept.NO_SLOPE


# 10. Ten lines for a person.


def test_explain_is_about_ten_lines_whatever_the_number_of_groups():
    params = {f"layer{n}": jnp.ones(2) for n in range(40)}

    def loss(params, batch):
        return sum(jnp.sum((batch * leaf) ** 2) for leaf in params.values())

    tx = hd.hidlr(loss, {name: name for name in params})
    grad = jax.grad(loss)(params, 1.0)
    direction = jax.tree.map(jnp.negative, grad)
    _, state = jax.jit(tx.update)(direction, tx.init(params), params, batch=1.0, grad=grad)
    lines = hd.explain((optax.EmptyState(), state)).splitlines()
    assert len(lines) <= 10
    assert "and 35 more" in lines
    assert lines[0] == "1 updates, 1 refreshes; the guard stepped in 0 times."
    assert lines[-1] == "Nothing stands out."


def test_explain_shows_the_message_of_each_status_and_what_the_guard_does():
    state = hd.hidlr(None, LABELS).init(_params())
    state = state._replace(
        count=jnp.int32(90), memory=state.memory._replace(guard=jnp.float32(0.25))
    )
    for status in Kept:
        kept = {"body": jnp.int32(status), "head": jnp.int32(Kept.UPDATED)}
        found = state.diagnostics._replace(refreshes=jnp.int32(9), cuts=jnp.int32(1), kept=kept)
        lines = hd.explain(state._replace(diagnostics=found)).splitlines()
        assert lines[2].startswith("body")
        assert lines[2].endswith(status.message)
        assert lines[3].endswith("ok")
        assert "stepped in once" in lines[0]
        assert any("0.25 of their rates" in line for line in lines)
        assert "Nothing stands out." not in lines


def test_explain_does_not_say_that_nothing_stands_out_after_numbers_that_are_not_finite():
    state = _trained(hd.hidlr(loss_fn, LABELS), value_of=lambda value, other: value * jnp.nan)
    assert "not finite" in hd.explain(state)
    assert "Nothing stands out" not in hd.explain(state)


def test_half_precision_is_named_where_it_may_be_and_the_eps_of_adam_where_it_is():
    """A loss that is all rounding may be one in bfloat16, or a run that has converged."""

    def said(status, params):
        state = hd.hidlr(None, LABELS).init(params)
        kept = {"body": jnp.int32(status), "head": jnp.int32(Kept.UPDATED)}
        return hd.explain(state._replace(diagnostics=state.diagnostics._replace(kept=kept)))

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), _params())
    for params in (_params(), half):
        text = said(Kept.UNRESOLVED, params)
        assert "Converged runs end so" in text
        assert "bfloat16" not in text
    assert "eps=1e-4" in said(Kept.NON_FINITE, half)
    assert "eps=1e-4" not in said(Kept.NON_FINITE, _params())
    assert "eps=1e-4" not in said(Kept.UPDATED, half)


@pytest.mark.parametrize("eps", [1e-8, 1e-4])
def test_float16_parameters_train_with_the_eps_that_is_named(eps):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), _params())
    with jax.numpy_dtype_promotion("standard"):
        tx = hd.hessian_informed(optax.adamw(1.0, eps=eps), None, LABELS)
        state = tx.init(params)

        def loss(params, batch):
            return loss_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), batch)

        step = jax.jit(lambda *now: hd.take_step(tx, loss, *now))
        for batch in zip(*_batches(1, 40), strict=True):
            params, state, last = step(params, state, batch)
    assert ("eps=1e-4" in hd.explain(state)) == (eps < 1e-5)
    assert bool(jnp.isfinite(last)) == (eps > 1e-5)


def test_explain_names_a_schedule_that_is_no_factor():
    peaks = {1e-3: True, 1.0: False}
    for peak, named in peaks.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rule = hd.hidlr(loss_fn, LABELS, schedule=lambda step, peak=peak: peak)
        text = hd.explain(_trained(rule, steps=120))
        assert ("no learning rate" in text) == named
        assert "at the last step" in text


def test_explain_does_not_take_the_end_of_a_schedule_for_a_low_one():
    state = _trained(hd.hidlr(loss_fn, LABELS, schedule=_falling(1.0)))
    assert "no learning rate" not in hd.explain(state)


def test_a_base_optimizer_with_a_rate_of_its_own_trains_alike():
    small = promoting("standard", optax.adamw(1e-4))
    plain, scaled = (
        _rates(_trained(hd.hidlr(loss_fn, LABELS), base)) for base in (_adamw(), small)
    )
    np.testing.assert_allclose(scaled, 1e4 * np.array(plain), rtol=0.1)


def test_explain_reads_the_state_of_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = promoting("standard", optax.chain(optax.adamw(1.0), hd.hiulr(None)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert "all" in hd.explain(optimizer.opt_state)


def test_explain_needs_a_state():
    with pytest.raises(ValueError, match="expected one HiDLRState"):
        hd.explain(optax.EmptyState())
