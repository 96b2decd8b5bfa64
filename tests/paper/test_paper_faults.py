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
from hypothesis import given, settings
from hypothesis import strategies as st

import hidlr_optax as hd
from hidlr_optax._diagnostics import Kept


def _estimators(kind):
    return {
        "axis": hd.paper.probes(),
        "gaussian": hd.paper.probes("gaussian", 4),
        "hessian": hd.paper.hessian(),
        "gauss_newton": hd.paper.gauss_newton(kind.model, kind.loss_of_outputs),
        "secant": hd.paper.secant(),
    }


_ESTIMATORS = tuple(_estimators(PLAIN))
_SOLVERS = {
    "coupled": {"solver": hd.paper.coupled(), "slope": "gradient", "warmup": WARMUP},
    "diagonal": {"solver": hd.paper.diagonal(), "slope": "lagged", "warmup": WARMUP},
    "paper": {
        "solver": hd.paper.diagonal(max_change=None),
        "slope": "probes",
        "ema_decay": 0.0,
        "warmup": 0,
        "init_learning_rate": 0.05,
    },
}
_PAIRS = [(estimator, solver) for estimator in _ESTIMATORS for solver in _SOLVERS]


@functools.cache
def _compiled(estimator, solver, kind="plain"):
    kept = PLAIN if kind == "plain" else KINDS[kind]
    keywords = {"update_interval": 1, "curvature": _estimators(kept)[estimator]} | _SOLVERS[solver]
    return run_of(hd.paper.one_step(kept.loss, kept.labels, **keywords), kept)


def _rates(states):
    return np.abs(np.stack(list(states.group_learning_rates.values())))  # the paper's may be < 0


def _assert_sane(states):
    """No number of the state is ever lost, and what says that it cannot be used moves no rate."""
    for path, leaf in jax.tree.leaves_with_path(states):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    rates, kept = _rates(states), statuses(states)
    assert (rates > 0).all()
    bad = (kept == Kept.NON_FINITE).any(axis=0)
    assert not (kept[:, bad] == Kept.UPDATED).any()
    begun = np.stack(list(states.measurements.values())).any(axis=0)[:-1]
    bad = bad[1:] & begun  # before that, they are those that were asked for, or the first found
    now, before = rates[:, 1:][:, bad], rates[:, :-1][:, bad]
    assert (now <= before).all()  # the guard alone may move them


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

# All pairs are compiled by hand; from day to day, every estimator and every solver.
_EVERY_DAY = {
    *(("axis", solver) for solver in _SOLVERS),
    ("hessian", "coupled"),
    ("gaussian", "paper"),
    ("secant", "diagonal"),
    ("gauss_newton", "coupled"),
}
_each_pair = pytest.mark.parametrize(
    ("estimator", "solver"),
    [pytest.param(*pair, marks=[] if pair in _EVERY_DAY else pytest.mark.slow) for pair in _PAIRS],
)


def _is_seen(name, estimator, solver):
    """Whether this pair looks at what is poisoned at all."""
    if name.startswith("gradient"):
        return solver != "paper"
    return name != "value" or estimator in ("axis", "gaussian")


def _assert_goes_on(states, losses):
    assert not (statuses(states)[:, -3:] == Kept.NON_FINITE).any()
    assert (_rates(states)[:, -1] != _rates(states)[:, _AT]).any()
    assert losses[-1] < 0.7 * losses[0]


@_each_pair
def test_what_is_not_finite_keeps_every_rate_and_is_recovered_from(estimator, solver):
    run = _compiled(estimator, solver)
    for name, poisoned in _POISONED.items():
        for poison in BAD:
            states, losses = run(faults_at((_AT, dict.fromkeys(poisoned, poison))))
            _assert_sane(states)
            _assert_goes_on(states, losses)
            noticed = (statuses(states)[:, _AT : _AT + 2] == Kept.NON_FINITE).any(axis=0)
            assert noticed.any() == _is_seen(name, estimator, solver), name
            kept, before = _rates(states)[:, _AT : _AT + 2], _rates(states)[:, _AT - 1 : _AT + 1]
            np.testing.assert_array_equal(kept[:, noticed], before[:, noticed])


@_each_pair
def test_probes_that_are_not_finite_raise_no_rate_and_are_recovered_from(estimator, solver):
    run = _compiled(estimator, solver)
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


@_each_pair
def test_where_nothing_can_be_learned_the_status_says_no_slope(estimator, solver):
    run = _compiled(estimator, solver)
    for name, (faults, groups) in _NOTHING.items():
        states, losses = run(faults_at((_AT, faults)))
        _assert_sane(states)
        _assert_goes_on(states, losses)
        for group in groups:
            assert Kept.NO_SLOPE in np.asarray(states.diagnostics.kept[group])[_AT : _AT + 2], name


@_each_pair
def test_huge_numbers_do_not_get_into_the_state(estimator, solver):
    run = _compiled(estimator, solver)
    for name in ("grad/body", "grad/scalar", "update/body", "update/scalar", "param/body"):
        _assert_sane(run(faults_at((_AT, {name: HUGE})))[0])
    _assert_sane(run(faults_at((_AT, {"value": HUGE})))[0])


_poisons = st.sampled_from([*BAD, 0.0, -1.0, 1e4, 1e-30])
# A gradient that is finite is believed, whatever it is.
_any_fault = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from(BAD) if name.startswith("grad") else _poisons
        for name in sorted(set(CLEAN) - {"side"})
    },
).filter(lambda faults: len(faults) <= 3)
_any_faults = st.lists(
    st.tuples(
        st.integers(0, STEPS - 4),
        st.builds(lambda fault, side: fault | {"side": side}, _any_fault, st.sampled_from([-1, 1])),
    ),
    max_size=4,
)


@_each_pair
@settings(max_examples=60, deadline=None)
@given(faults=_any_faults)
def test_no_row_of_faults_spoils_the_state(estimator, solver, faults):
    states, losses = _compiled(estimator, solver)(faults_at(*faults))
    _assert_sane(states)
    assert np.isfinite(losses).all()
    assert not (statuses(states)[:, -1] == Kept.NON_FINITE).any()


_EVERY_DAY_KINDS = {("secant", "diagonal"), ("axis", "coupled"), ("gaussian", "paper")}


def _marks(kind, pair):
    # Five hundred groups take minutes to compile.
    is_fast = pair in _EVERY_DAY_KINDS and kind != "five hundred groups"
    return [] if is_fast else pytest.mark.slow


@pytest.mark.parametrize(
    ("estimator", "solver", "kind"),
    [pytest.param(*pair, kind, marks=_marks(kind, pair)) for pair in _PAIRS for kind in KINDS],
)
def test_every_kind_of_parameters_and_loss_comes_through_faults(estimator, solver, kind):
    run = _compiled(estimator, solver, kind)
    start = run(faults_at())[1][0]
    for name, poisoned in _POISONED.items():
        for poison in (NAN, INF, HUGE):
            states, losses = run(faults_at((_AT, dict.fromkeys(poisoned, poison))))
            _assert_sane(states)
            assert losses[-1] < start or poison == HUGE, name
