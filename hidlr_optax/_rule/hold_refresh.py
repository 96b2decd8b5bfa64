"""One refresh of `hold`: measure along a step, average, move the rates, guard the coming step.

By default it looks back along the last step with the present batch, which that step has not seen:
one forward pass where it began; the loss and slope where it ended are known.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._groups import Groups, wide
from hidlr_optax._quadratic import Kept, Quadratic, influence_per_parameter
from hidlr_optax._rule.hold import (
    TRIES,
    Hold,
    Look,
    Progress,
    alarmed,
    averaged,
    begin,
    decay_of,
    first_rates,
    forget_losses,
    guard,
    joint,
    leaps,
    look,
    preconditioned,
    shortened,
    split,
    watch,
)
from hidlr_optax._rule.mismatches import refresh_if
from hidlr_optax._state import Clock, Packed, initial_rates
from hidlr_optax._step_loss import Evidence, SlopeSource, StepLoss
from hidlr_optax.curvature._measurement import RESOLUTION, Estimator, measure

_TINY = 1e-30


class Step(NamedTuple):
    """A step along which the loss is measured, between the present parameters and its other end.

    Attributes:
      loss: the loss along it.
      rates: η, (K,), schedule included.
      slope: b, (K,), at the present parameters.
      probe: () the loss at the other end.
      sign: −1 where the step ends at the present parameters, 1 where it begins there.
    """

    loss: StepLoss
    rates: jax.Array
    slope: jax.Array
    probe: jax.Array
    sign: int


class Measured(NamedTuple):
    """The parabola along a step, and the part that each group has in it.

    Attributes:
      slope: b, (K,), at the start of the step.
      curvature: (Aη)_k/η_k, (K,).
      same: −⟨∇L_k, u_k⟩ of the coming step on the batch that made it, (K,).
      look: the same of all groups together.
      resolved: () bool, whether the loss changed by more than its rounding and noise.
      is_split: () bool, whether the curvatures of the groups were measured one by one.
      rise: () by how much the step raises the loss.
    """

    slope: jax.Array
    curvature: jax.Array
    same: jax.Array
    look: Look
    resolved: jax.Array
    is_split: jax.Array
    rise: jax.Array


@dataclasses.dataclass(frozen=True)
class HoldRule:
    """Finds the peak of the rates in the first steps, then holds it.

    Attributes:
      solver: the goals, and how far the groups may move apart.
      estimator: measures the single groups.
      source: of the slopes.
      init_learning_rate: the proportions that were asked for.
    """

    solver: Hold
    estimator: Estimator
    source: SlopeSource
    init_learning_rate: Any

    couples = False

    @property
    def widen_after(self) -> float:
        """Intervals after which they may become longer."""
        return self.solver.widen_after

    def begin(self) -> Progress:
        """Averages of its own: none yet."""
        return begin()

    def update(self, state: Packed, evidence: Evidence, clock: Clock) -> tuple[Packed, jax.Array]:
        """The state after an update, and the factor of the schedule.

        Every loss that is given is watched. One that jumps, or a step far longer than usual, calls
        for a refresh at once, and for a look where that step leads.
        """
        if not self.source.uses_gradient:
            evidence = evidence._replace(grad=None)
        same = _narrow(evidence.slope())
        progress = forget_losses(state.progress, state.count == clock.warmup)
        progress = progress._replace(peak=jnp.maximum(progress.peak, jnp.abs(clock.factor)))
        state = waiting = state._replace(progress=progress)
        alarm = jnp.zeros((), bool)
        if same is not None:
            rates = state.group_learning_rates * jnp.abs(clock.factor)
            alarm |= leaps(progress, rates @ same, joint(rates))
        if evidence.value is not None:
            loss, trusted = evidence.value.astype(jnp.float32), state.value_mismatches == 0
            alarm |= alarmed(progress, loss) & trusted
            watched = watch(progress, loss)
            watched = jax.tree.map(partial(jnp.where, trusted), watched, progress)
            waiting = state._replace(progress=watched)
        alarm &= clock.allowed

        def refresh(state: Packed, evidence: Evidence) -> Packed:
            return self._refresh(state, evidence, clock, clock.finding | alarm)

        due = clock.due | alarm
        return refresh_if(due, refresh, state, waiting, evidence, clock), clock.factor

    def _refresh(
        self, state: Packed, evidence: Evidence, clock: Clock, looks_ahead: jax.Array
    ) -> Packed:
        """Watch, begin, measure, average, move, guard, split: the state after one refresh."""
        evidence = evidence.valued()
        progress = watch(state.progress, evidence.value.astype(jnp.float32))
        state, same = state._replace(progress=progress), _narrow(evidence.slope())
        rates = self._begun(state, evidence, clock, same)
        measured = self._measure(state, evidence, clock, rates, same)
        state, usable = _averaged(state, evidence, clock, measured)
        state, change = self._change(state, clock, measured, usable, rates)
        is_sound = _is_sound(evidence)
        wanted = rates * jnp.exp(change) * clock.factor
        part = _part(state, evidence, wanted, same, looks_ahead & is_sound)
        state, change = _guarded(state, evidence, measured, rates, change, part, is_sound)
        may_split = measured.is_split & ~clock.finding & is_sound & usable
        moved = self._split(evidence.coming.groups, rates * jnp.exp(change), measured, may_split)
        is_rate = jnp.isfinite(moved) & (moved > 0)
        return state._replace(
            refreshes=optax.safe_increment(state.refreshes),
            group_learning_rates=jnp.where(is_rate, moved, rates),
        )

    def _proportions(self, groups: Groups) -> jax.Array:
        """The proportions of the rates that were asked for: (K,)."""
        asked = 1e-3 if self.init_learning_rate is None else self.init_learning_rate
        return groups.pack(initial_rates(asked, groups.names))

    def _begun(
        self, state: Packed, evidence: Evidence, clock: Clock, same: jax.Array | None
    ) -> jax.Array:
        """The present rates; at the first refresh of a warm-up, those that it begins with."""
        rates = state.group_learning_rates
        if same is None:
            return rates
        products, begins = evidence.products, (state.progress.looks == 0) & clock.finding
        first = first_rates(
            rates,
            self._proportions(evidence.coming.groups),
            evidence.value.astype(jnp.float32),
            same,
            products.direction.astype(jnp.float32),
            jnp.sqrt(jnp.sum(products.params)).astype(jnp.float32),
        )
        return jnp.where(begins, first, rates)

    def _measure(
        self,
        state: Packed,
        evidence: Evidence,
        clock: Clock,
        rates: jax.Array,
        same: jax.Array | None,
    ) -> Measured:
        """The parabola along the last step where that is kept, else along the coming one."""
        if evidence.previous is not None and same is not None:
            step = _last_step(state, evidence)
        else:
            step = _coming_step(evidence, rates * clock.factor, same)
            same = step.slope
        looks_back = step.sign < 0
        won = step.sign * _fall(evidence.value, step.probe)
        descent = step.rates @ step.slope
        curvature = 2 * step.sign * (descent - won)
        each, is_split = self._divide(state, evidence, step, curvature)
        unit = joint(jnp.abs(step.rates))
        # Of the last step, the slope is known at its end, and wanted at its start.
        whole = Look(
            rate=unit,
            slope=descent + curvature if looks_back else descent,
            curvature=curvature,
            same=unit * (rates @ same) / joint(rates),
        )
        rounding = RESOLUTION * float(jnp.finfo(step.probe.dtype).eps)
        noise = jnp.maximum(rounding, state.loss_noise)
        largest = jnp.maximum(jnp.abs(descent), jnp.abs(won))
        return Measured(
            slope=step.slope + each * step.rates if looks_back else step.slope,
            curvature=each,
            same=same,
            look=whole,
            resolved=largest > noise * jnp.abs(evidence.value).astype(jnp.float32),
            is_split=is_split & jnp.isfinite(step.probe),
            rise=-won,
        )

    def _divide(
        self, state: Packed, evidence: Evidence, step: Step, curvature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(Aη)_k/η_k of every group, and whether they were measured one by one.

        Every few refreshes the estimator does that. At the others, the curvature along the joint
        step is divided as it was before; as the slopes are, if it never was.
        """
        rates = step.rates
        before = jnp.maximum(state.curvature, 0) * rates**2
        shares = jnp.where(jnp.sum(before) > 0, before, jnp.abs(step.slope * rates))
        shares /= jnp.maximum(jnp.sum(shares), _TINY)
        divided = shares * curvature / _nonzero(rates) ** 2
        if len(rates) == 1 or self.solver.max_split == 1 or not self.estimator.separates:
            return divided, jnp.zeros((), bool)

        def measured() -> jax.Array:
            found = measure(
                self.estimator,
                step.loss,
                step.sign * rates,
                value=evidence.value,
                slope=None if evidence.grad is None else step.slope,
                expected=Quadratic(state.slope, state.curvature),
                batch=evidence.batch,
                step=state.count,
            )
            rows = found.quadratic.slope - found.quadratic.slope_at(rates)
            return jnp.where(found.resolved, rows / _nonzero(rates), 0).astype(jnp.float32)

        due = (state.refreshes % self.solver.split_interval == 0) & jnp.all(rates != 0)
        return jax.lax.cond(due, measured, lambda: divided), due

    def _change(
        self,
        state: Packed,
        clock: Clock,
        measured: Measured,
        usable: jax.Array,
        rates: jax.Array,
    ) -> tuple[Packed, jax.Array]:
        """The logarithm of what the rates are multiplied by towards the goal, before the guard."""
        seen = measured.look
        # From the step that was looked at to one with the present rates.
        unit = joint(rates) * jnp.abs(clock.factor)
        scaled = seen._replace(rate=unit, curvature=seen.curvature * (unit / seen.rate) ** 2)
        change, progress = self.solver.change(state.progress, scaled, clock.factor, clock.finding)
        ascends = progress.relative.same_slope <= 0
        change = jnp.where(usable & ~ascends & jnp.isfinite(change), change, 0.0)
        return state._replace(progress=progress), change

    def _split(
        self, groups: Groups, rates: jax.Array, measured: Measured, may_split: jax.Array
    ) -> jax.Array:
        """The rates with the groups a little further apart, where that may be: (K,)."""
        usable = jnp.isfinite(measured.curvature) & jnp.isfinite(measured.same)
        apart = split(
            rates,
            measured.same,
            measured.curvature,
            usable,
            self._proportions(groups),
            self.solver.max_split,
        )
        return jnp.where(may_split, apart, rates)


def _last_step(state: Packed, evidence: Evidence) -> Step:
    """The step that has led to the present parameters, on a batch that it has not seen."""
    last = evidence.last()
    rates = state.group_learning_rates * state.schedule_factor
    return Step(last, rates, _narrow(evidence.last_slope()), last(-rates), -1)


def _coming_step(evidence: Evidence, rates: jax.Array, slope: jax.Array | None) -> Step:
    """The step that is about to be taken."""
    coming = evidence.coming
    probe = coming(rates)
    if slope is None:
        # The odd part of the loss is all that can be told of slopes, so groups share it.
        odd = _fall(coming(-rates), probe) / 2
        slope = jnp.full(len(rates), odd / _nonzero(jnp.sum(rates)))
    return Step(coming, rates, slope, probe, 1)


def _averaged(
    state: Packed, evidence: Evidence, clock: Clock, measured: Measured
) -> tuple[Packed, jax.Array]:
    """The averages with what was measured, jointly and by group; whether it could be used: ()."""
    seen = measured.look
    loss = evidence.value.astype(jnp.float32)
    new = look(state.progress, seen, _preconditioned(evidence), clock.finding, loss)
    known = _finite((seen, new.absolute, new.relative, new.preconditioned))
    usable = known & measured.resolved & (seen.rate > 0)
    progress = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, state.progress)
    slope, curvature = measured.slope, measured.curvature
    counts = usable & jnp.isfinite(slope) & jnp.isfinite(curvature) & (slope != 0)
    count, decay = state.measurements.astype(jnp.float32), decay_of(clock.finding)

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(counts, averaged(old, new, count, decay), old)

    quadratic = Quadratic(mean(state.slope, slope), mean(state.curvature, curvature))
    sizes = jnp.asarray(evidence.coming.groups.sizes, jnp.float32)
    ppi = influence_per_parameter(quadratic, sizes)
    has_influence = counts & (quadratic.curvature > 0) & jnp.isfinite(ppi)
    state = state._replace(
        progress=progress,
        slope=quadratic.slope,
        curvature=quadratic.curvature,
        influence=jnp.where(has_influence, ppi, state.influence),
        measured_slope=jnp.where(counts, slope, 0),
        measured_curvature=jnp.where(counts, curvature, 0),
        measurements=state.measurements + counts.astype(jnp.int32),
    )
    return state._replace(kept=_statuses(state, evidence, measured)), usable


def _statuses(state: Packed, evidence: Evidence, measured: Measured) -> jax.Array:
    """(K,) int32 of `Kept`: the reasons why the refresh leaves rates as they were."""
    finite = _finite(measured.look) & jnp.isfinite(evidence.value)
    joint_status = jnp.where(state.progress.relative.same_slope <= 0, Kept.ASCENDS, Kept.UPDATED)
    joint_status = jnp.where(measured.resolved, joint_status, Kept.UNRESOLVED)
    statuses = jnp.where(measured.slope == 0, Kept.NO_SLOPE, joint_status)
    statuses = jnp.where(finite, statuses, Kept.NON_FINITE)
    if evidence.previous is not None and evidence.grad is not None:
        # The first update has no step to look back at, and that is no reason to worry anyone.
        statuses = jnp.where((state.count == 0) & finite, Kept.UPDATED, statuses)
    return statuses.astype(jnp.int32)


def _preconditioned(evidence: Evidence) -> jax.Array:
    """Distance of the coming direction from a running sum of gradients; 0 without a gradient."""
    if evidence.grad is None:
        return jnp.zeros((), jnp.float32)
    whole = evidence.products.whole()
    names = "direction", "previous", "gradient", "ahead", "down", "across"
    return preconditioned(**{name: getattr(whole, name) for name in names})


def _part(
    state: Packed,
    evidence: Evidence,
    rates: jax.Array,
    same: jax.Array | None,
    looks_ahead: jax.Array,
) -> jax.Array:
    """The part to take of the coming step with these rates, by the loss where it leads: ().

    A step that had to be shortened is looked at again, since one parabola says little of a loss
    that rises steeply. One where nothing calls for the look.
    """
    value = evidence.value
    descent = jnp.float32(0) if same is None else rates @ same

    def shorter(tried: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        part, _, tries = tried
        rise = -_fall(value, evidence.coming(part * rates))
        less = shortened(state.progress, rise, part * descent, value.astype(jnp.float32))
        return part * less, less < 1, tries + 1

    start = jnp.float32(1), looks_ahead, jnp.int32(0)
    return jax.lax.while_loop(lambda tried: tried[1] & (tried[2] < TRIES), shorter, start)[0]


def _guarded(
    state: Packed,
    evidence: Evidence,
    measured: Measured,
    rates: jax.Array,
    change: jax.Array,
    part: jax.Array,
    is_sound: jax.Array,
) -> tuple[Packed, jax.Array]:
    """The change that the guard lets pass: within the part that may be taken, below the ceiling."""
    loss = evidence.value.astype(jnp.float32)
    verdict = guard(state.progress, measured.rise, part, loss, joint(rates))
    highest = jnp.log(verdict.progress.ceiling / joint(rates))
    change = jnp.where(is_sound, jnp.minimum(change + verdict.cut, highest), 0.0)
    cuts = state.cuts + (is_sound & (verdict.cut < 0)).astype(jnp.int32)
    return state._replace(progress=verdict.progress, cuts=cuts), change


def _is_sound(evidence: Evidence) -> jax.Array:
    """Whether the loss at the parameters and the coming direction are finite."""
    return jnp.isfinite(evidence.value) & jnp.isfinite(evidence.products.whole().direction)


def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _narrow(slope: jax.Array | None) -> Any:
    """Slopes, (K,), in float32; None where there are none."""
    return None if slope is None else slope.astype(jnp.float32)


def _fall(value: jax.Array, probe: jax.Array) -> jax.Array:
    """The one loss minus the other, subtracted in float32 or wider: () float32."""
    dtype = wide(probe.dtype)
    return (value.astype(dtype) - probe.astype(dtype)).astype(jnp.float32)


def _nonzero(value: jax.Array) -> jax.Array:
    return jnp.where(value == 0, 1, value)
