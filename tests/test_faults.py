"""Faults in whatever `update` is given: rates stay, the reason can be read, and training goes on.

Faults are arrays in the batch, so that one compiled run serves them all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hidlr_optax as hd
from hidlr_optax import Kept

NAN, INF = math.nan, math.inf
_f32 = jnp.float32
_STEPS = 14
_WARMUP = 4
_BAD = [NAN, INF, -INF]
_HUGE = 1e30
_LABELS = {"w": "body", "empty": "body", "s": "scalar"}


def _start():
    return {"w": jnp.linspace(-1.0, 1.0, 4), "empty": jnp.zeros((0, 2)), "s": _f32(0.5)}


def _outputs(params, batch):
    out = batch["x"] @ params["w"] + jnp.sum(params["empty"])
    return out + batch["uses_scalar"] * params["s"]


def _loss_of_outputs(outputs, batch):
    error = jnp.mean((outputs - batch["y"]) ** 2)
    return batch["factor"] * error + batch["constant"]


def _wall(params, batch):
    """The fault where the parameters have left the place at which the step was begun."""
    ahead = batch["side"] * (params["w"][0] - batch["place"]) > 0
    return jnp.where(ahead | (batch["side"] == 0), batch["fault"], 1.0)


def _model(params, batch):
    return _outputs(params, batch) * _wall(params, batch)


class _Kind(NamedTuple):
    """A way to keep the parameters of the same model.

    Attributes:
      start: flat, name -> leaf.
      labels: name -> label.
      poisoned: name -> the faults that reach the leaf, "body" or "scalar".
      plain: to the parameters of `_outputs`.
      dtype: of the loss.
    """

    start: dict[str, Any]
    labels: Any
    poisoned: dict[str, str]
    plain: Callable[[Any], Any] = lambda params: params
    dtype: Any = jnp.float32

    def model(self, params, batch):
        return _model(self.plain(params), batch)

    def loss_of_outputs(self, outputs, batch):
        return _loss_of_outputs(outputs, batch).astype(self.dtype)

    def loss(self, params, batch):
        return self.loss_of_outputs(self.model(params, batch), batch)

    def place(self, params):
        """What tells on which side of a wall the parameters are."""
        return self.plain(params)["w"][0]


_PLAIN = _Kind(_start(), _LABELS, _LABELS)


def _many_as_one(params):
    """Scalars: the first is that of the model, all others add up to its weights."""
    leaves = [params[name] for name in sorted(params)]
    padded = jnp.stack([*leaves[1:], leaves[0] * 0]).reshape(4, -1)
    w = padded.sum(1) / math.sqrt(padded.shape[1])  # so that a step in all of them is one in w
    return {"w": w, "empty": jnp.zeros((0, 2)), "s": leaves[0]}


def _many(count):
    """A group for each of so many scalars, a multiple of four."""
    start = {f"{n:03d}": _f32(0.01 * (n % 7 - 3)) for n in range(count)}
    poisoned = dict.fromkeys(start, "body") | {"000": "scalar"}
    return _Kind(start, {name: name for name in start}, poisoned, _many_as_one)


def _complex_as_real(params):
    w = jnp.concatenate([params["z"].real, params["z"].imag])
    return params | {"w": w}


_KINDS = {
    "one group": _PLAIN._replace(labels="all"),
    "a loss in float16": _PLAIN._replace(dtype=jnp.float16),
    "an integer leaf": _PLAIN._replace(
        start=_start() | {"n": jnp.int32(3)},
        labels=_LABELS | {"n": "body"},
        poisoned=_LABELS | {"n": "body"},
    ),
    "complex parameters": _Kind(
        {"z": jnp.array([-1 - 0.5j, 0.5 + 1j], jnp.complex64), "empty": jnp.zeros((0, 2))}
        | {"s": _f32(0.5)},
        {"z": "body", "empty": "body", "s": "scalar"},
        {"z": "body", "empty": "body", "s": "scalar"},
        _complex_as_real,
    ),
    "forty groups": _many(40),
    "five hundred groups": _many(500),
}


_CLEAN = {
    "value": 1.0,
    "grad/body": 1.0,
    "grad/scalar": 1.0,
    "update/body": 1.0,
    "update/scalar": 1.0,
    "param/body": 1.0,
    "param/scalar": 1.0,
    "side": 1.0,
    "fault": 1.0,  # beyond the wall: everywhere if `side` is zero
    "factor": 1.0,
    "constant": 0.0,
    "uses_scalar": 1.0,
}


def _times(tree, faults, name, poisoned):
    """Every leaf but whole numbers times its fault."""

    def times(leaf, key):
        if leaf.dtype == jnp.int32:
            return leaf
        return leaf * faults[f"{name}/{poisoned[key]}"].astype(leaf.dtype)

    return {key: times(leaf, key) for key, leaf in tree.items()}


def _run(tx, kind):
    """(faults by step) -> what was found at each step, of a loop that drops mad steps."""
    times = functools.partial(_times, poisoned=kind.poisoned)

    def gradients(params, batch):
        value, grad = jax.value_and_grad(kind.loss, allow_int=True)(params, batch)
        none = functools.partial(jnp.zeros_like, dtype=jnp.int32)
        whole = {key: none(params[key]) for key in params if params[key].dtype == jnp.int32}
        return value, grad | whole

    def step(carry, now):
        params, state = carry
        n, faults = now
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), n), (16, 4))
        y = x @ jnp.arange(4.0) + 0.1 * x[:, 0] ** 2
        given = times(params, faults, "param")
        batch = faults | {"x": x, "y": y, "place": kind.place(given)}
        value, grad = gradients(given, batch)
        direction = times(jax.tree.map(lambda g: -jnp.conj(g), grad), faults, "update")
        updates, state = tx.update(
            direction,
            state,
            given,
            batch=batch,
            value=value * faults["value"].astype(value.dtype),
            grad=times(grad, faults, "grad"),
        )

        def applied(param, update):
            mad = ~(jnp.abs(update) < 100)  # or NaN
            return param + jnp.where(mad, jnp.zeros_like(update), update)

        params = jax.tree.map(applied, params, updates)
        clean = kind.loss(params, _CLEAN | {"x": x, "y": y, "place": 0.0})
        return (params, state), (state._replace(direction=()), clean)

    @jax.jit
    def run(faults):
        steps = jnp.arange(_STEPS)
        return jax.lax.scan(step, (kind.start, tx.init(kind.start)), (steps, faults))[1]

    return run


@functools.cache
def _compiled(kind="plain"):
    kept = _PLAIN if kind == "plain" else _KINDS[kind]
    return _run(hd.hidlr(kept.loss, kept.labels, update_interval=1, warmup=_WARMUP), kept)


def _faults(*at):
    """Faults by step, given by (step, names and values)."""
    faults = {name: np.full(_STEPS, value, np.float32) for name, value in _CLEAN.items()}
    for step, changed in at:
        for name, value in changed.items():
            faults[name][step] = value
    return faults


def _rates(states):
    return np.stack(list(states.group_learning_rates.values()))


def _kept(states):
    return np.stack(list(states.diagnostics.kept.values()))


def _assert_sane(states):
    """No number of the state is ever lost, and what says that it cannot be used moves no rate."""
    for path, leaf in jax.tree.leaves_with_path(states):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    rates, kept = _rates(states), _kept(states)
    assert (rates >= 0).all()  # 0: nothing has been measured yet
    bad = (kept == Kept.NON_FINITE).any(axis=0)[1:] & (rates > 0).all(axis=0)[:-1]
    np.testing.assert_array_equal(rates[:, 1:][:, bad], rates[:, :-1][:, bad])


_BOTH = ("body", "scalar")
_POISONED = {
    "value": ("value",),
    "gradient of a group": ("grad/body",),
    "gradient of a scalar": ("grad/scalar",),
    "update of a group": ("update/body",),
    "update of a scalar": ("update/scalar",),
    "parameters": ("param/body",),
    "a parameter": ("param/scalar",),
}
_WALLS = {"probes ahead": 1.0, "probes behind": -1.0, "all losses": 0.0}
_AT = 8


def _assert_goes_on(states, losses):
    assert not (_kept(states)[:, -3:] == Kept.NON_FINITE).any()
    assert (_rates(states)[:, -1] != _rates(states)[:, _AT]).any()
    assert losses[-1] < 0.7 * losses[0]


def test_what_is_not_finite_keeps_every_rate_and_is_recovered_from():
    run = _compiled()
    for name, poisoned in _POISONED.items():
        for poison in _BAD:
            states, losses = run(_faults((_AT, dict.fromkeys(poisoned, poison))))
            _assert_sane(states)
            _assert_goes_on(states, losses)
            noticed = (_kept(states)[:, _AT : _AT + 2] == Kept.NON_FINITE).any(axis=0)
            assert noticed.any(), name
            kept, before = _rates(states)[:, _AT : _AT + 2], _rates(states)[:, _AT - 1 : _AT + 1]
            np.testing.assert_array_equal(kept[:, noticed], before[:, noticed])


def test_probes_that_are_not_finite_raise_no_rate_and_are_recovered_from():
    run = _compiled()
    for name, side in _WALLS.items():
        for poison in [*_BAD, _HUGE]:
            states, losses = run(_faults((_AT, {"side": side, "fault": poison})))
            _assert_sane(states)
            _assert_goes_on(states, losses)
            if name == "all losses":
                assert (_kept(states)[:, _AT] == Kept.NON_FINITE).any()


_NOTHING = {
    "a loss of zero": ({"factor": 0.0}, _BOTH),
    "a constant loss": ({"factor": 0.0, "constant": 3.0}, _BOTH),
    "a loss that ignores a group": ({"uses_scalar": 0.0}, ("scalar",)),
    "no update": ({"update/body": 0.0, "update/scalar": 0.0}, _BOTH),
    "no update of a group": ({"update/body": 0.0}, ("body",)),
}


def test_where_nothing_can_be_learned_the_status_says_no_slope():
    run = _compiled()
    for name, (faults, groups) in _NOTHING.items():
        states, losses = run(_faults((_AT, faults)))
        _assert_sane(states)
        _assert_goes_on(states, losses)
        for group in groups:
            assert Kept.NO_SLOPE in np.asarray(states.diagnostics.kept[group])[_AT : _AT + 2], name


def test_huge_numbers_do_not_get_into_the_state():
    run = _compiled()
    for name in ("grad/body", "grad/scalar", "update/body", "update/scalar", "param/body"):
        _assert_sane(run(_faults((_AT, {name: _HUGE})))[0])
    _assert_sane(run(_faults((_AT, {"value": _HUGE})))[0])


_poisons = st.sampled_from([*_BAD, 0.0, -1.0, 1e4, 1e-30])
_any_fault = st.dictionaries(st.sampled_from(sorted(set(_CLEAN) - {"side"})), _poisons, max_size=3)
_any_faults = st.lists(
    st.tuples(
        st.integers(0, _STEPS - 4),
        st.builds(lambda fault, side: fault | {"side": side}, _any_fault, st.sampled_from([-1, 1])),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(faults=_any_faults)
def test_no_row_of_faults_spoils_the_state(faults):
    states, losses = _compiled()(_faults(*faults))
    _assert_sane(states)
    assert np.isfinite(losses).all()
    assert not (_kept(states)[:, -1] == Kept.NON_FINITE).any()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if kind == "five hundred groups" else [])
        for kind in _KINDS
    ],
)
def test_every_kind_of_parameters_and_loss_comes_through_faults(kind):
    run = _compiled(kind)
    start = run(_faults())[1][0]
    for name, poisoned in _POISONED.items():
        for poison in (NAN, INF, _HUGE):
            states, losses = run(_faults((_AT, dict.fromkeys(poisoned, poison))))
            _assert_sane(states)
            assert losses[-1] < start or poison == _HUGE, name
