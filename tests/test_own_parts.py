"""Estimators and solvers that are not ours: what is asked of them, and what they make of a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_estimator
import pytest
from support import coupled_hidlr

import hidlr_optax as hd
from hidlr_optax.curvature import Estimator, Measurement
from hidlr_optax.solvers import Solver

_LABELS = {"x": "x", "y": "y"}


def _loss(params, batch):
    """Least squares: a quadratic in the parameters, so that differences of gradients are exact."""
    matrix, target = batch
    return jnp.mean((matrix @ jnp.concatenate([params["x"], params["y"]]) - target) ** 2)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The gradient of the whole loss at both ends of the step, multiplied out group by group."""

    couples = False
    separates = True

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

    averaging = 0.5
    max_rise = 0.2

    def solve(self, quadratic, rates, kept, floor):
        convex = quadratic.curvature > floor
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
        return (optax.apply_updates(params, updates), state), hd.metrics(state)

    (params, _), metrics = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return float(_loss(params, _data())), metrics


def test_the_protocols_take_our_parts_and_others():
    for estimator in (hd.secant(), hd.parabola(), hd.probes(), hd.hessian(), Difference()):
        assert isinstance(estimator, Estimator)
    assert not isinstance(hd.probes, Estimator)
    for solver in (hd.coupled(), hd.diagonal(), Halfway()):
        assert isinstance(solver, Solver)
    assert not isinstance(hd.hold(), Solver)  # a rule of its own


def test_an_estimator_of_ones_own_trains_as_the_secant_does():
    solver = hd.hold(split_interval=1)
    runs = [
        _trained(hd.hidlr(_loss, _LABELS, update_interval=2, solver=solver, curvature=estimator))
        for estimator in (hd.secant(), Difference())
    ]
    (loss, metrics), (own_loss, own_metrics) = runs
    assert loss < 0.1
    assert own_loss == pytest.approx(loss, rel=1e-2)
    for name in ("learning_rate/x", "learning_rate/y"):
        np.testing.assert_allclose(own_metrics[name], metrics[name], rtol=1e-2)
    apart = metrics["learning_rate/x"] / metrics["learning_rate/y"]
    assert apart[-1] > 1.5 * apart[0]  # the split is there to be compared


def test_a_solver_of_ones_own_trains():
    loss, metrics = _trained(coupled_hidlr(_loss, _LABELS, solver=Halfway(), slope="gradient"))
    assert loss < 0.1
    assert metrics["learning_rate/x"][-1] > 2 * metrics["learning_rate/y"][-1]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"curvature": hd.probes}, "without .*'couples', 'separates'"),
        ({"curvature": Difference}, "a class, not a value"),
        ({"curvature": Halfway()}, "curvature must be .* without .*'estimate'"),
        ({"solver": Difference()}, "solver must be .* without .*'solve', 'averaging', 'max_rise'"),
        ({"solver": Halfway}, "a class, not a value"),
    ],
)
def test_what_lacks_something_is_refused_at_the_door(part, message):
    with pytest.raises(ValueError, match=message):
        hd.hidlr(_loss, _LABELS, **part)


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
    tx = coupled_hidlr(_loss, _LABELS, curvature=Wrong(), slope=None)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, batch=_data())


def test_an_estimator_that_cannot_fit_slopes_says_so():
    class Needs(Difference):
        fits_slope = False

    with pytest.raises(ValueError, match="slope='probes' fits two unknowns"):
        hd.hidlr(_loss, _LABELS, curvature=Needs(), slope="probes")


def test_the_example_runs_and_is_short(capsys):
    with jax.numpy_dtype_promotion("standard"):
        assert own_estimator.main(steps=60) < 0.5
    assert "after 60 steps" in capsys.readouterr().out
