"""Estimators and solvers that are not ours: what is asked of them, and what they make of a run."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hidlr_optax as hd
from hidlr_optax.paper import Estimator, Measurement, Solver

_LABELS = {"x": "x", "y": "y"}


def _loss(params, batch):
    """Least squares: a quadratic in the parameters, so that differences of gradients are exact."""
    matrix, target = batch
    return jnp.mean((matrix @ jnp.concatenate([params["x"], params["y"]]) - target) ** 2)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The gradient of the whole loss at both ends of the step, multiplied out group by group."""

    couples = False

    def estimate(self, step_loss, rates, *, slope=None, **known):
        gradients = [jax.grad(step_loss.loss)(step_loss.end(at)) for at in (0 * rates, rates)]
        names = step_loss.groups.names
        start, end = (
            -jnp.stack([jnp.vdot(gradient[name], step_loss.direction[name]) for name in names])
            for gradient in gradients
        )
        slope = start if slope is None else slope
        return Measurement.exact(hd.Quadratic(slope, (start - end) / rates))


@dataclasses.dataclass(frozen=True)
class Halfway:
    """Half of the way from the present rate to the minimum of the group's parabola."""

    def solve(self, quadratic, rates, kept, least_curvature):
        convex = quadratic.curvature > least_curvature
        goal = quadratic.slope / jnp.where(convex, quadratic.curvature, 1)
        moves = (kept == hd.Kept.UPDATED) & convex & (goal > 0)
        kept = jnp.where(moves | (kept != hd.Kept.UPDATED), kept, hd.Kept.NOT_CONVEX)
        return jnp.where(moves, (rates + goal) / 2, rates), kept.astype(jnp.int32)


@functools.cache
def _data():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(48, 6)) * np.array([1, 1, 1, 4, 4, 4])
    target = matrix @ rng.normal(size=6) + 0.1 * rng.normal(size=48)
    return matrix.astype(np.float32), target.astype(np.float32)


def _trained(rule, steps=40):
    params = {name: jnp.zeros(3) for name in _LABELS}
    tx = optax.chain(optax.sgd(1.0), rule)

    @jax.jit
    def step(carry, n):
        params, state = carry
        batch = tuple(jax.lax.dynamic_slice_in_dim(part, 12 * (n % 3), 24) for part in _data())
        value, grad = jax.value_and_grad(_loss)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return (optax.apply_updates(params, updates), state), state[1].group_learning_rates

    (params, _), metrics = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return float(_loss(params, _data())), metrics


def test_the_protocols_take_our_parts_and_others():
    for estimator in (
        hd.paper.secant(),
        hd.paper.probes(),
        hd.paper.hessian(),
        Difference(),
    ):
        assert isinstance(estimator, Estimator)
    assert not isinstance(hd.paper.probes, Estimator)
    for solver in (hd.paper.coupled(), hd.paper.diagonal(), Halfway()):
        assert isinstance(solver, Solver)


def test_an_estimator_of_ones_own_trains_as_the_secant_does():
    runs = [
        _trained(hd.paper.one_step(_loss, _LABELS, update_interval=2, curvature=estimator))
        for estimator in (hd.paper.secant(), Difference())
    ]
    (loss, rates), (own_loss, own_rates) = runs
    assert loss < 0.1
    assert own_loss == pytest.approx(loss, rel=1e-2)
    for name in _LABELS:
        np.testing.assert_allclose(own_rates[name], rates[name], rtol=1e-2)
    apart = rates["x"] / rates["y"]
    assert apart[-1] > 1.5 * apart[0]  # they do move apart


def test_a_solver_of_ones_own_trains():
    rule = {"solver": Halfway(), "slope": "gradient", "ema_decay": 0.5}
    loss, rates = _trained(hd.paper.one_step(_loss, _LABELS, **rule))
    assert loss < 0.1
    assert rates["x"][-1] > 2 * rates["y"][-1]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"curvature": hd.paper.probes}, "without .*'couples'"),
        ({"curvature": Difference}, "a class, not a value"),
        ({"curvature": Halfway()}, "curvature must be .* without .*'estimate'"),
        ({"solver": Difference()}, "solver must be .* without .*'solve'"),
        ({"solver": Halfway}, "a class, not a value"),
    ],
)
def test_what_lacks_something_is_refused_at_the_door(part, message):
    with pytest.raises(ValueError, match=message):
        hd.paper.one_step(_loss, _LABELS, **part)


# Averages and the guard are not the solver's.


def _first_refresh(**rule):
    """The state after one refresh far from the minimum, whose rates the guard may cut."""
    params = {name: jnp.ones(3) for name in _LABELS}
    tx = hd.paper.one_step(
        _loss, _LABELS, slope="gradient", warmup=0, init_learning_rate=1.0, **rule
    )
    value, grad = jax.value_and_grad(_loss)(params, _data())
    direction = jax.tree.map(jnp.negative, grad)
    known = {"batch": _data(), "value": value, "grad": grad}
    _, state = tx.update(direction, tx.init(params), params, **known)
    return state


@pytest.mark.parametrize("solver", [hd.paper.coupled(), hd.paper.diagonal(), Halfway()], ids=repr)
def test_every_solver_can_be_guarded_or_not(solver):
    free = _first_refresh(solver=solver, max_rise=math.inf)
    guarded = _first_refresh(solver=solver, max_rise=0.2)
    assert (int(free.diagnostics.cuts), int(guarded.diagnostics.cuts)) == (0, 1)
    for name, rate in guarded.group_learning_rates.items():
        assert 0 < float(rate) < float(free.group_learning_rates[name])
    by_default = _first_refresh(solver=solver)
    assert int(by_default.diagnostics.cuts) == (not isinstance(solver, hd.paper.Diagonal))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_a_decay_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\)"):
        hd.paper.one_step(_loss, _LABELS, solver=hd.paper.coupled(), ema_decay=value)


# The algorithm of another paper.


@dataclasses.dataclass(frozen=True)
class FittingWell:
    """The paper's joint draws, of which a fit with R² ≤ 0.99 is thrown away."""

    couples = False

    def estimate(self, step_loss, rates, **known):
        draws = hd.paper.probes("gaussian", per_group=4, batch_size=1)
        measured = draws.estimate(step_loss, rates, **known)
        slope, curvature, _ = measured.quadratic
        fitted = measured.offsets**2 @ curvature / 2 - measured.offsets @ slope
        changes = measured.changes
        spread = jnp.sum((changes - changes.mean()) ** 2)
        fit = 1 - jnp.sum((fitted - changes) ** 2) / spread
        return measured._replace(resolved=jnp.full(len(rates), fit > 0.99))


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """η ← 0.9 η + 0.1 clip(b/a, η/10, 10 η), all of them or none."""

    def solve(self, quadratic, rates, kept, least_curvature):
        exact = hd.paper.diagonal(max_change=None)
        best, kept = exact.solve(quadratic, rates, kept, least_curvature)
        return rates + 0.1 * (jnp.clip(best, rates / 10, 10 * rates) - rates), kept


_GEN = {
    "curvature": FittingWell(),
    "slope": "probes",
    "solver": Smoothing(),
    "ema_decay": 0.0,
    "max_rise": math.inf,
    "warmup": 0,
}


def test_gen_in_open_parts_is_what_its_paper_says():
    rates = np.array([1e-2, 3e-3])
    params = {name: jnp.ones(3) for name in _LABELS}
    asked = dict(zip(_LABELS, map(float, rates), strict=True))
    tx = hd.paper.one_step(_loss, _LABELS, init_learning_rate=asked, update_interval=1, **_GEN)
    state, update, moved = tx.init(params), jax.jit(tx.update), []
    value, grad = jax.value_and_grad(_loss)(params, _data())
    direction = jax.tree.map(jnp.negative, grad)
    for n in range(12):
        key = jax.random.fold_in(jax.random.key(0), n)
        points = np.asarray(jax.random.normal(key, (8, 2)))
        ends = [
            {name: params[name] + x * direction[name] for name, x in zip("xy", row, strict=True)}
            for row in jnp.float32(points * rates)
        ]
        changes = np.array([float(_loss(end, _data()) - value) for end in ends])
        matrix = np.concatenate([-points, points**2 / 2], axis=1)
        solution = np.linalg.lstsq(matrix, changes, rcond=None)[0]
        rest = np.sum((matrix @ solution - changes) ** 2)
        good = 1 - rest / np.sum((changes - changes.mean()) ** 2) > 0.99
        good &= np.all(solution[2:] > 0)
        if good:
            best = np.clip(solution[:2] / solution[2:], 0.1, 10) * rates
            rates = 0.9 * rates + 0.1 * best
        known = {"batch": _data(), "value": value}
        _, state = update(direction, state, params, **known)
        np.testing.assert_allclose(list(state.group_learning_rates.values()), rates, rtol=1e-3)
        moved.append(bool(good))
    assert set(moved) == {True, False}, moved  # fits of both kinds


_ONES = jnp.ones(2)
_WRONG = {
    "must return a Measurement": 1.0,
    r"curvature of shape \(2,\) for 2 groups, got \(\)": hd.Quadratic(_ONES, jnp.ones(())),
    "`couples` is False": hd.Quadratic(_ONES, _ONES, jnp.zeros((2, 2))),
    r"coupling of shape \(2, 2\) for 2 groups, got None": hd.Quadratic(_ONES, _ONES),
}


@pytest.mark.parametrize(("message", "found"), _WRONG.items())
def test_measurements_of_another_shape_are_refused(message, found):
    class Wrong(Difference):
        couples = "coupling of shape" in message

        def estimate(self, step_loss, rates, **known):
            return Measurement.exact(found) if isinstance(found, hd.Quadratic) else found

    params = {name: jnp.zeros(3) for name in _LABELS}
    tx = hd.paper.one_step(_loss, _LABELS, curvature=Wrong(), slope=None)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, batch=_data())


def test_an_estimator_that_cannot_fit_slopes_says_so():
    class Needs(Difference):
        fits_slope = False

    with pytest.raises(ValueError, match="slope='probes' fits two unknowns"):
        hd.paper.one_step(_loss, _LABELS, curvature=Needs(), slope="probes")
