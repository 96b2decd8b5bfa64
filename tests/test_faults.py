"""Faults in whatever `update` is given: rates stay, the reason can be read, and training goes on.

Faults are arrays in the batch, so that one compiled run serves them all.
"""

import functools

import jax
import numpy as np
import pytest
from faulty import (
    BAD,
    CLEAN,
    HUGE,
    INF,
    KINDS,
    NAN,
    PLAIN,
    STEPS,
    WARMUP,
    faults_at,
    run_of,
    statuses,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hidlr_optax as hd
from hidlr_optax import Kept


@functools.cache
def _compiled(kind="plain"):
    kept = PLAIN if kind == "plain" else KINDS[kind]
    return run_of(hd.hidlr(kept.loss, kept.labels, update_interval=1, warmup=WARMUP), kept)


def _rates(states):
    return np.stack(list(states.group_learning_rates.values()))


def _assert_sane(states):
    """No number of the state is ever lost, and what says that it cannot be used moves no rate."""
    for path, leaf in jax.tree.leaves_with_path(states):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    rates, kept = _rates(states), statuses(states)
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
    assert not (statuses(states)[:, -3:] == Kept.NON_FINITE).any()
    assert (_rates(states)[:, -1] != _rates(states)[:, _AT]).any()
    assert losses[-1] < 0.7 * losses[0]


def test_what_is_not_finite_keeps_every_rate_and_is_recovered_from():
    run = _compiled()
    for name, poisoned in _POISONED.items():
        for poison in BAD:
            states, losses = run(faults_at((_AT, dict.fromkeys(poisoned, poison))))
            _assert_sane(states)
            _assert_goes_on(states, losses)
            noticed = (statuses(states)[:, _AT : _AT + 2] == Kept.NON_FINITE).any(axis=0)
            assert noticed.any(), name
            kept, before = _rates(states)[:, _AT : _AT + 2], _rates(states)[:, _AT - 1 : _AT + 1]
            np.testing.assert_array_equal(kept[:, noticed], before[:, noticed])


def test_probes_that_are_not_finite_raise_no_rate_and_are_recovered_from():
    run = _compiled()
    for name, side in _WALLS.items():
        for poison in [*BAD, HUGE]:
            states, losses = run(faults_at((_AT, {"side": side, "fault": poison})))
            _assert_sane(states)
            _assert_goes_on(states, losses)
            if name == "all losses":
                assert (statuses(states)[:, _AT] == Kept.NON_FINITE).any()


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
        states, losses = run(faults_at((_AT, faults)))
        _assert_sane(states)
        _assert_goes_on(states, losses)
        for group in groups:
            assert Kept.NO_SLOPE in np.asarray(states.diagnostics.kept[group])[_AT : _AT + 2], name


def test_huge_numbers_do_not_get_into_the_state():
    run = _compiled()
    for name in ("grad/body", "grad/scalar", "update/body", "update/scalar", "param/body"):
        _assert_sane(run(faults_at((_AT, {name: HUGE})))[0])
    _assert_sane(run(faults_at((_AT, {"value": HUGE})))[0])


_poisons = st.sampled_from([*BAD, 0.0, -1.0, 1e4, 1e-30])
_any_fault = st.dictionaries(st.sampled_from(sorted(set(CLEAN) - {"side"})), _poisons, max_size=3)
_any_faults = st.lists(
    st.tuples(
        st.integers(0, STEPS - 4),
        st.builds(lambda fault, side: fault | {"side": side}, _any_fault, st.sampled_from([-1, 1])),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(faults=_any_faults)
@example(faults=[(0, {"grad/body": INF, "side": -1})])  # no step: the next look finds a first rate
@example(faults=[(1, {"update/body": NAN, "side": -1})])  # before anything was measured
def test_no_row_of_faults_spoils_the_state(faults):
    states, losses = _compiled()(faults_at(*faults))
    _assert_sane(states)
    assert np.isfinite(losses).all()
    assert not (statuses(states)[:, -1] == Kept.NON_FINITE).any()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if kind == "five hundred groups" else [])
        for kind in KINDS
    ],
)
def test_every_kind_of_parameters_and_loss_comes_through_faults(kind):
    run = _compiled(kind)
    start = run(faults_at())[1][0]
    for name, poisoned in _POISONED.items():
        for poison in (NAN, INF, HUGE):
            states, losses = run(faults_at((_AT, dict.fromkeys(poisoned, poison))))
            _assert_sane(states)
            assert losses[-1] < start or poison == HUGE, name
