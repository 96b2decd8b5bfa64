"""One refresh of the solvers that seek the minimum of the next loss: `coupled` and `diagonal`.

An estimator measures slope and curvature, they are averaged, the solver minimises the quadratic,
and the guard looks where the coming step would lead. Everything is measured against the loss
itself, so no scale has to be known.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._groups import wide
from hidlr_optax._quadratic import Kept, Quadratic, average, influence_per_parameter
from hidlr_optax._rule.mismatches import refresh_if
from hidlr_optax._state import Clock, Packed
from hidlr_optax._step_loss import Evidence, SlopeSource, StepLoss
from hidlr_optax.curvature._measurement import Estimator, Measurement, measure
from hidlr_optax.solvers import Diagonal, Solver

_EMA_DECAY = 0.9  # of the averages of slope and curvature, by the refresh
_MAX_RISE = 0.2  # of the loss, that the guard lets pass
_START_PART = 1e-2  # of the loss: what the first step, by its slope alone, is to change it by
_START_RANGE = 10.0  # how far from there an initial rate that was asked for may lie
_LEAST_PART = 1e-6  # of the loss: a step that changes it by less is lost in float32


@dataclasses.dataclass(frozen=True)
class OneStepRule:
    """Moves the rates to the minimum of the quadratic, at every refresh.

    Attributes:
      solver: minimises the quadratic.
      estimator: measures it.
      source: of the slopes.
      ema_decay: β, of the averages of slope and curvature.
      max_rise: the rise of the loss, as a part of it, that the guard lets pass; None: no guard.
    """

    solver: Solver
    estimator: Estimator
    source: SlopeSource
    ema_decay: float
    max_rise: float | None

    @staticmethod
    def of(
        solver: Solver,
        estimator: Estimator,
        source: SlopeSource,
        ema_decay: float | None,
        max_rise: float | None,
    ) -> "OneStepRule":
        """The rule with the defaults for averages and guard where they are None."""
        if ema_decay is None:
            ema_decay = getattr(solver, "averaging", None)  # its short form
        if ema_decay is None:
            ema_decay = _EMA_DECAY
        if max_rise is None:
            # Of the paper's closed form, nothing is corrected unless it is asked for.
            max_rise = math.inf if isinstance(solver, Diagonal) else _MAX_RISE
        is_off = not isinstance(max_rise, jax.Array) and math.isinf(max_rise)
        return OneStepRule(solver, estimator, source, ema_decay, None if is_off else max_rise)

    widen_after = math.inf  # a rule that forgets needs every refresh

    @property
    def couples(self) -> bool:
        """Whether the state keeps the curvature between groups."""
        return self.estimator.couples

    def begin(self) -> tuple[()]:
        """Averages of its own: none."""
        return ()

    def update(self, state: Packed, evidence: Evidence, clock: Clock) -> tuple[Packed, jax.Array]:
        """The state after an update, and the factor of schedule and warm-up."""

        def refresh(state: Packed, evidence: Evidence) -> Packed:
            return self._refresh(state, evidence, clock)

        new = refresh_if(clock.due, refresh, state, state, evidence, clock)
        ramp = (new.count + 1) / jnp.maximum(clock.warmup, 1)
        return new, clock.factor * jnp.minimum(ramp, 1.0).astype(jnp.float32)

    def _refresh(self, state: Packed, evidence: Evidence, clock: Clock) -> Packed:
        """Begin, measure, average, minimise, guard: the state after one refresh."""
        evidence = evidence.valued()
        value = evidence.value
        slope = evidence.slope()
        rates = _begun(state, clock, value, slope)
        measured = self._measure(state, evidence, rates)
        kept = measured.statuses()
        quadratic, measurements = self._average(state, measured, kept == Kept.UPDATED)
        found, kept = self.solver.solve(quadratic, rates, kept, measured.least_curvature)
        guarded, was_cut = self._guard(evidence, quadratic, rates, found, slope)
        return _recorded(state, evidence.coming, measured, quadratic, kept)._replace(
            group_learning_rates=guarded,
            measurements=measurements,
            cuts=state.cuts + was_cut.astype(jnp.int32),
        )

    def _measure(self, state: Packed, evidence: Evidence, rates: jax.Array) -> Measurement:
        """Slope and curvature, both at the start of the step that they are measured along."""
        step_loss, slope = evidence.coming, evidence.slope()
        if self.source.looks_back:
            # The last step, and the coming one at the first update.
            direction = jax.tree.map(
                lambda old, new: jnp.where(state.count == 0, new, old),
                evidence.last().direction,
                step_loss.direction,
            )
            step_loss = step_loss.along(direction)
            slope = jax.tree.map(partial(jnp.where, state.count == 0), slope, evidence.last_slope())
        measured = measure(
            self.estimator,
            step_loss,
            rates,
            slope=slope if self.source.uses_gradient else None,
            value=evidence.value,
            expected=Quadratic(state.slope, state.curvature),
            batch=evidence.batch,
            step=state.count,
        )
        if not self.source.looks_back:
            return measured
        applied = state.group_learning_rates * state.schedule_factor
        applied = jnp.where(state.count == 0, 0.0, applied)
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
                use, counts = use[:, None] & use, jnp.minimum(counts[:, None], counts)
            return jnp.where(use, average(mean, new, self.ema_decay, counts), mean)

        means = Quadratic(state.slope, state.curvature, state.coupling)
        return jax.tree.map(averaged, means, measured.quadratic), measurements

    def _guard(
        self,
        evidence: Evidence,
        quadratic: Quadratic,
        rates: jax.Array,
        found: jax.Array,
        slope: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """The rates found, neither lost nor such that the coming step does harm; whether cut.

        The step is judged at full rates, as it will be after warm-up.
        """
        if self.max_rise is None:
            return found, jnp.zeros((), bool)
        value = evidence.value
        found = keep_resolvable(found, rates, quadratic, value)
        after = evidence.coming(found)
        dtype = wide(after.dtype)
        change = (after.astype(dtype) - value.astype(dtype)).astype(jnp.float32)
        factor = guard_factor(found, change, value.astype(jnp.float32), slope, self.max_rise)
        # A step that is not finite at any rate says nothing about the rates.
        squares = evidence.products.direction
        factor = jnp.where(jnp.isfinite(value) & jnp.all(jnp.isfinite(squares)), factor, 1.0)
        return found * factor, factor < 1


def _begun(state: Packed, clock: Clock, value: jax.Array, slope: jax.Array | None) -> jax.Array:
    """The present rates; at the first refresh of a warm-up, those that it begins with."""
    rates = state.group_learning_rates
    if slope is None:
        return rates
    begins = (state.refreshes == 0) & (clock.warmup > 0)
    return jnp.where(begins, first_rates(rates, value, slope), rates)


def _recorded(
    state: Packed, coming: StepLoss, measured: Measurement, quadratic: Quadratic, kept: jax.Array
) -> Packed:
    """The state with what was measured, its averages, and influence per parameter (PPI)."""
    sizes = jnp.asarray(coming.groups.sizes, jnp.float32)
    convex = (kept == Kept.UPDATED) & (quadratic.curvature > measured.least_curvature)
    ppi = influence_per_parameter(quadratic, sizes)
    has_influence = convex & jnp.isfinite(ppi)  # the square of a huge slope is not
    slope, curvature, _ = measured.quadratic
    is_resolved = jnp.isfinite(curvature) & (jnp.abs(curvature) > measured.least_curvature)
    return state._replace(
        refreshes=optax.safe_increment(state.refreshes),
        slope=quadratic.slope,
        curvature=quadratic.curvature,
        coupling=quadratic.coupling,
        influence=jnp.where(has_influence, ppi, state.influence),
        measured_slope=jnp.where(jnp.isfinite(slope), slope, 0),
        measured_curvature=jnp.where(is_resolved, curvature, 0),
        kept=kept,
    )


def first_rates(rates: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """The rates to begin with, (K,), whatever was asked for.

    At one rate for all, the first step changes the loss by Σ|b_k| η to first order. The rate at
    which that is a hundredth of the loss is small, but not lost in rounding: rates of zero become
    it, others are brought within a factor ten of it.

    Args:
      rates: (K,), as asked for; zero where nothing was.
      value: the loss.
      slope: b, (K,).
    """
    steep = jnp.sum(jnp.abs(slope)).astype(jnp.float32)
    found = _START_PART * jnp.abs(value).astype(jnp.float32) / steep
    usable = jnp.isfinite(found) & (found > 0)
    nearest = jnp.clip(rates, found / _START_RANGE, found * _START_RANGE)
    begun = jnp.where(usable, jnp.where(rates > 0, nearest, found), rates)
    return jnp.where(begun > 0, begun, 1e-3)


def keep_resolvable(
    found: jax.Array, rates: jax.Array, quadratic: Quadratic, value: jax.Array
) -> jax.Array:
    """The rates found, (K,), but never less than those before where these are lost in rounding.

    A step that is to change the loss by less than a millionth of it, Σ |b_k| η_k + ½ |a_k| η_k², is
    lost in float32. Smaller ones would teach nothing, and all rates together could sink for good.

    Args:
      found: (K,), by the solver.
      rates: η, (K,), before.
      quadratic: in learning rates of one.
      value: (), the loss.
    """
    slope, curvature, _ = quadratic
    effect = jnp.sum(jnp.abs(slope) * rates + jnp.abs(curvature) * rates**2 / 2)
    sunk = effect < _LEAST_PART * jnp.abs(value).astype(jnp.float32)
    return jnp.where(sunk, jnp.maximum(found, rates), found)


def guard_factor(
    rates: jax.Array, change: jax.Array, value: jax.Array, slope: jax.Array | None, limit: float
) -> jax.Array:
    """The factor of the guard on the rates, (): one, unless the step raises the loss too much.

    Then the minimum B/2C of the parabola −Bx + Cx² that has this slope, and at x = 1 this change,
    within [0.1, 0.5]. Along a step that ascends there is none: a half; where the loss is not finite
    any more, a tenth.

    Args:
      rates: η, (K,).
      change: (), the loss after the step minus the loss.
      value: (), the loss.
      slope: b, (K,), along the step; None where it is not known.
      limit: the rise, as a part of the loss, that is let pass.
    """
    descent = jnp.float32(0) if slope is None else slope.astype(jnp.float32) @ rates
    descent = jnp.where(jnp.isfinite(descent), descent, 0)  # as where it is not known
    curve = change + descent
    best = descent / (2 * jnp.where(curve > 0, curve, 1))
    best = jnp.where((descent > 0) & (curve > 0), jnp.clip(best, 0.1, 0.5), 0.5)
    best = jnp.where(change <= limit * jnp.abs(value), 1.0, best)
    return jnp.where(jnp.isfinite(change), best, 0.1)
