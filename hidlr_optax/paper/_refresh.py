"""One refresh: begin, measure, average, minimise, look where the coming step would lead."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._diagnostics import Kept
from hidlr_optax._groups import wide
from hidlr_optax._quadratic import Quadratic, influence_per_parameter
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.paper._fit import average
from hidlr_optax.paper._measurement import Estimator, Measurement, measure
from hidlr_optax.paper._solvers import Solver
from hidlr_optax.paper._state import Packed

Slope = Literal["lagged", "gradient", "probes"]

_START_PART = 1e-2  # of the loss: what the first step, by its slope alone, is to change it by
_START_RANGE = 10.0  # how far from there an initial rate that was asked for may lie


class Known(NamedTuple):
    """Everything that one call of `update` says about the loss.

    Attributes:
      coming: the loss along the coming step.
      previous: the direction of the last step; () where the state does not keep it.
      value: the loss at the parameters; None where it has to be evaluated.
      grad: its gradient, or None.
      batch: of the loss.
    """

    coming: StepLoss
    previous: Any
    value: jax.Array | None
    grad: Any
    batch: Any

    def slope(self, step_loss: StepLoss) -> jax.Array | None:
        """Slopes b at the parameters along a step, (K,); None without a gradient."""
        return None if self.grad is None else step_loss.slope(self.grad)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Moves the rates to the minimum of the quadratic, at every refresh.

    Attributes:
      solver: minimises the quadratic.
      estimator: measures it.
      slope: where b comes from, as in `one_step`.
      ema_decay: β, of the averages of slope and curvature.
      max_rise: the rise of the loss, as a part of it, that the guard lets pass; None: no guard.
      finds: whether the first refresh sets the rates to begin with.
    """

    solver: Solver
    estimator: Estimator
    slope: Slope | None
    ema_decay: Any
    max_rise: Any
    finds: Any

    @property
    def looks_back(self) -> bool:
        """Whether slope and curvature are those along the previous step."""
        return self.slope == "lagged"

    def refresh(self, state: Packed, known: Known) -> Packed:
        """The state after one refresh."""
        if known.value is None:
            known = known._replace(value=known.coming.start())
        rates = self._begun(state, known)
        measured = self._measure(state, known, rates)
        kept = measured.statuses()
        quadratic, measurements = self._average(state, measured, kept == Kept.UPDATED)
        found, kept = self.solver.solve(quadratic, rates, kept, measured.least_curvature)
        squares = known.coming.groups.squares(known.coming.direction)
        rates, was_cut = self._guard(known, found, squares)
        kept = jnp.where((squares == 0) & (kept != Kept.NON_FINITE), Kept.NO_SLOPE, kept)
        sizes = jnp.asarray(known.coming.groups.sizes, jnp.float32)
        state = _recorded(state, measured, quadratic, kept.astype(jnp.int32), sizes)
        cuts = state.diagnostics.cuts + was_cut.astype(jnp.int32)
        return state._replace(
            group_learning_rates=rates,
            measurements=measurements,
            coupling=quadratic.coupling,
            diagnostics=state.diagnostics._replace(cuts=cuts),
        )

    def _begun(self, state: Packed, known: Known) -> jax.Array:
        """The present rates; at the first refresh of a warm-up, those that it begins with."""
        rates, slope = state.group_learning_rates, known.slope(known.coming)
        if slope is None:
            return rates
        begins = (state.diagnostics.refreshes == 0) & self.finds
        return jnp.where(begins, first_rates(rates, known.value, slope), rates)

    def _measure(self, state: Packed, known: Known, rates: jax.Array) -> Measurement:
        """Slope and curvature, both at the start of the step that they are measured along."""
        step_loss, is_first = known.coming, state.count == 0
        if self.looks_back:  # the last step, and the coming one at the first update
            step_loss = step_loss.along(
                jax.tree.map(
                    lambda old, new: jnp.where(is_first, new, old.astype(new.dtype)),
                    known.previous,
                    step_loss.direction,
                )
            )
        measured = measure(
            self.estimator,
            step_loss,
            rates,
            slope=None if self.slope == "probes" else known.slope(step_loss),
            value=known.value,
            expected=Quadratic(state.diagnostics.slope, state.diagnostics.curvature),
            batch=known.batch,
            step=state.count,
        )
        if not self.looks_back:
            return measured
        applied = jnp.where(is_first, 0.0, state.applied)
        # From its end to its start, b + Aη. So the slope at the start belongs to a batch that the
        # direction has not seen, and where the measured slope at the end is zero, the minimum lies
        # at the rates applied, whatever the curvature.
        quadratic = measured.quadratic
        return measured._replace(quadratic=quadratic._replace(slope=quadratic.slope_at(-applied)))

    def _average(
        self, state: Packed, measured: Measurement, usable: jax.Array
    ) -> tuple[Quadratic, jax.Array]:
        """The averages with the usable groups of this refresh, and how many they hold: (K,)."""
        measurements = state.measurements + usable.astype(jnp.int32)

        def averaged(mean: jax.Array, new: jax.Array) -> jax.Array:
            use, counts = usable, measurements
            if new.ndim == 2:  # a pair of groups counts where both do
                use, counts = use[:, None] & use[None], jnp.minimum(counts[:, None], counts[None])
            return jnp.where(use, average(mean, new, self.ema_decay, counts), mean)

        means = Quadratic(state.diagnostics.slope, state.diagnostics.curvature, state.coupling)
        return jax.tree.map(averaged, means, measured.quadratic), measurements

    def _guard(
        self, known: Known, found: jax.Array, squares: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The rates found, such that the coming step does no harm; whether they were cut."""
        if self.max_rise is None or known.value is None:
            return found, jnp.zeros((), bool)
        after = known.coming(found)
        dtype = wide(after.dtype)
        change = (after.astype(dtype) - known.value.astype(dtype)).astype(jnp.float32)
        value, slope = known.value.astype(jnp.float32), known.slope(known.coming)
        factor = guard_factor(found, change, value, slope, self.max_rise)
        # A step that is not finite at any rate says nothing about the rates.
        factor = jnp.where(jnp.isfinite(value) & jnp.all(jnp.isfinite(squares)), factor, 1.0)
        return found * factor, factor < 1


def _recorded(
    state: Packed, measured: Measurement, quadratic: Quadratic, kept: jax.Array, sizes: jax.Array
) -> Packed:
    """The state with what was measured, its averages, and influence per parameter (PPI)."""
    before = state.diagnostics
    convex = (kept == Kept.UPDATED) & (quadratic.curvature > measured.least_curvature)
    ppi = influence_per_parameter(quadratic, sizes)
    has_influence = convex & jnp.isfinite(ppi)  # the square of a huge slope is not
    slope, curvature, _ = measured.quadratic
    is_resolved = jnp.isfinite(curvature) & (jnp.abs(curvature) > measured.least_curvature)
    after = before._replace(
        refreshes=optax.safe_increment(before.refreshes),
        measured=optax.safe_increment(before.measured),
        kept=kept,
        slope=quadratic.slope,
        curvature=quadratic.curvature,
        measured_slope=jnp.where(jnp.isfinite(slope), slope, 0),
        measured_curvature=jnp.where(is_resolved, curvature, 0),
        influence=jnp.where(has_influence, ppi, before.influence),
    )
    return state._replace(diagnostics=after)


def first_rates(rates: jax.Array, value: Any, slope: jax.Array) -> jax.Array:
    """The rates to begin with, (K,), whatever was asked for.

    At one rate for all, the first step changes the loss by Σ|b_k| η to first order. The rate at
    which that is a hundredth of the loss is small, but not lost in rounding: rates of zero become
    it, others are brought within a factor ten of it.
    """
    steep = jnp.sum(jnp.abs(slope)).astype(jnp.float32)
    found = _START_PART * jnp.abs(value).astype(jnp.float32) / steep
    usable = jnp.isfinite(found) & (found > 0)
    nearest = jnp.clip(rates, found / _START_RANGE, found * _START_RANGE)
    begun = jnp.where(usable, jnp.where(rates > 0, nearest, found), rates)
    return jnp.where(begun > 0, begun, 1e-3)


def guard_factor(
    rates: jax.Array, change: jax.Array, value: jax.Array, slope: jax.Array | None, limit: float
) -> jax.Array:
    """The factor of the guard on the rates, (): one, unless the step raises the loss too much.

    Then the minimum B/2C of the parabola −Bx + Cx² that has this slope, and at x = 1 this change,
    within [0.1, 0.5]. Along a step that ascends there is none: a half; where the loss is not finite
    any more, a tenth. `limit` is the rise, as a part of the loss, that is let pass.
    """
    descent = jnp.float32(0) if slope is None else slope.astype(jnp.float32) @ rates
    descent = jnp.where(jnp.isfinite(descent), descent, 0)  # as where it is not known
    curve = change + descent
    best = descent / (2 * jnp.where(curve > 0, curve, 1))
    best = jnp.where((descent > 0) & (curve > 0), jnp.clip(best, 0.1, 0.5), 0.5)
    best = jnp.where(change <= limit * jnp.abs(value), 1.0, best)
    return jnp.where(jnp.isfinite(change), best, 0.1)
