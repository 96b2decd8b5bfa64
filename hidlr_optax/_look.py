"""One update of `hold`: look along a step, move the rates, look where the coming step leads.

By default it looks back along the last step with the present batch, which that step has not seen:
one forward pass where it began; the loss and slope where it ended are known.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._checks import refresh_if
from hidlr_optax._groups import Groups, wide
from hidlr_optax._hold import (
    TRIES,
    Hold,
    Look,
    alarmed,
    averaged,
    decay_of,
    first_rates,
    guard,
    joint,
    leaps,
    look,
    preconditioned,
    shortened,
    split,
    watch,
)
from hidlr_optax._measurement import RESOLUTION
from hidlr_optax._quadratic import Kept, Quadratic, influence
from hidlr_optax._state import HiDLRState
from hidlr_optax._step_loss import StepLoss

_TINY = 1e-30


class Call(NamedTuple):
    """What one call of `update` brings.

    Attributes:
      coming: the loss along the coming step.
      previous: u of the last update, or None where it is not kept.
      batch: of the loss.
      value: the loss before that step, or None.
      grad: its gradient, or None.
    """

    coming: StepLoss
    previous: Any
    batch: Any
    value: jax.Array | None
    grad: Any

    @property
    def updates(self) -> Any:
        return self.coming.direction

    @property
    def groups(self) -> Groups:
        return self.coming.groups

    def slope(self, step_loss: StepLoss) -> jax.Array:
        """b_k = −⟨∇L_k, u_k⟩ along a step: (K,) float32."""
        return step_loss.slope(self.grad).astype(jnp.float32)

    def inner(self, left: Any, right: Any) -> jax.Array:
        """⟨left, right⟩ over all groups: () float32."""
        return jnp.sum(self.groups.inner(left, right)).astype(jnp.float32)


class Rule(NamedTuple):
    """The parts that an update is made of, and how far the run has come.

    Attributes:
      solver: the controller.
      estimator: what measures the single groups.
      finding: () bool, whether the rates are still to be found.
      due: () bool, whether there is a refresh.
      allowed: () bool, whether there may be one.
      watching: () bool, whether to look where the coming step leads before it is taken.
      factor: () of the schedule.
      initial: (K,), the rates that were asked for.
    """

    solver: Hold
    estimator: Any
    finding: jax.Array
    due: jax.Array
    allowed: jax.Array
    watching: jax.Array
    factor: jax.Array
    initial: jax.Array


class Step(NamedTuple):
    """A step along which the loss is measured.

    Attributes:
      along: the loss along it.
      taken: η, (K,), its rates, schedule included.
      slope: b, (K,), at the present parameters.
      sign: −1 where it ends at them, 1 where it begins.
    """

    along: StepLoss
    taken: jax.Array
    slope: jax.Array
    sign: int


class Measured(NamedTuple):
    """What was measured along a step.

    Attributes:
      step: which one.
      slope: b, (K,), at its start.
      curvature: (Aη)_k/η_k, (K,).
      same: −⟨∇L_k, u_k⟩ of the coming step on the batch that made it, (K,).
      look: the same of all groups together.
      resolved: () bool, whether the loss changed by more than its rounding.
      is_split: () bool, whether the curvatures of the groups were measured one by one.
      rise: () by how much the step raises the loss.
    """

    step: Step
    slope: jax.Array
    curvature: jax.Array
    same: jax.Array
    look: Look
    resolved: jax.Array
    is_split: jax.Array
    rise: jax.Array


def held(state: HiDLRState, call: Call, rule: Rule) -> HiDLRState:
    """The state after an update; `direction` is left to the caller."""
    progress = state.progress
    progress = progress._replace(peak=jnp.maximum(progress.peak, jnp.abs(rule.factor)))
    same = None if call.grad is None else call.slope(call.coming)
    alarm = jnp.zeros((), bool)
    if same is not None:
        coming = call.groups.pack(state.group_learning_rates) * jnp.abs(rule.factor)
        alarm |= leaps(progress, coming @ same, joint(coming))
    if call.value is not None:
        loss = call.value.astype(jnp.float32)
        alarm |= alarmed(progress, loss)
        progress = watch(progress, loss)
    alarm &= rule.allowed
    rule = rule._replace(due=rule.due | alarm, watching=rule.finding | alarm)
    state = state._replace(progress=progress)
    return refresh_if(rule.due, lambda: _refreshed(state, call, rule, same), state)


def _refreshed(state: HiDLRState, call: Call, rule: Rule, same: jax.Array | None) -> HiDLRState:
    """One refresh."""
    groups = call.groups
    value = call.value
    if value is None:
        value = call.coming.start()
        state = state._replace(progress=watch(state.progress, value.astype(jnp.float32)))
    rates = groups.pack(state.group_learning_rates)
    begins = (state.progress.looks == 0) & rule.finding
    if same is not None:
        found = first_rates(rates, rule.initial, value.astype(jnp.float32), same)
        rates = jnp.where(begins, found, rates)
    measured = _measure(state, call, rule, rates, value, same)
    state, change = _moved(state, call, rule, measured, rates, value)
    finite = jnp.isfinite(value) & jnp.isfinite(call.inner(call.updates, call.updates))
    watched = rule._replace(watching=rule.watching & finite)
    part = _part(state, call, watched, rates * jnp.exp(change), value, same)
    loss = value.astype(jnp.float32)
    verdict = guard(state.progress, measured.rise, part, loss, joint(rates))
    highest = jnp.log(verdict.progress.ceiling / joint(rates))
    change = jnp.where(finite, jnp.minimum(change + verdict.cut, highest), 0.0)
    moved = rates * jnp.exp(change)
    apart = split(
        moved,
        measured.same,
        measured.curvature,
        jnp.isfinite(measured.curvature) & jnp.isfinite(measured.same),
        rule.initial,
        rule.solver.max_split,
    )
    moved = jnp.where(measured.is_split & ~rule.finding & finite, apart, moved)
    good = jnp.isfinite(moved) & (moved > 0)
    return state._replace(
        refreshes=optax.safe_increment(state.refreshes),
        cuts=state.cuts + (finite & (verdict.cut < 0)).astype(jnp.int32),
        progress=verdict.progress,
        group_learning_rates=groups.unpack(jnp.where(good, moved, rates)),
    )


def _part(
    state: HiDLRState,
    call: Call,
    rule: Rule,
    rates: jax.Array,
    value: jax.Array,
    same: jax.Array | None,
) -> jax.Array:
    """The part of the coming step with these rates to take, by looking where it leads: ().

    Looked at again when it had to be shortened: one parabola says little of a loss that rises
    steeply. All of it where nothing calls for the look.
    """
    taken = rates * rule.factor
    descent = jnp.float32(0) if same is None else taken @ same

    def shorter(tried: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        part, _, tries = tried
        ahead = -_fall(value, call.coming(part * taken))
        less = shortened(state.progress, ahead, part * descent, value.astype(jnp.float32))
        return part * less, less < 1, tries + 1

    start = jnp.float32(1), rule.watching, jnp.int32(0)
    return jax.lax.while_loop(lambda tried: tried[1] & (tried[2] < TRIES), shorter, start)[0]


def _moved(
    state: HiDLRState,
    call: Call,
    rule: Rule,
    measured: Measured,
    rates: jax.Array,
    value: jax.Array,
) -> tuple[HiDLRState, jax.Array]:
    """Averages in what was measured; with the logarithm of what the rates are multiplied by."""
    seen = measured.look
    finite = jnp.isfinite(seen.slope) & jnp.isfinite(seen.curvature) & jnp.isfinite(seen.same)
    new = look(state.progress, seen, _preconditioned(call, measured), rule.finding)
    bounded = jnp.isfinite(new.slope) & jnp.isfinite(new.curvature) & jnp.isfinite(new.same)
    usable = finite & bounded & measured.resolved & (seen.taken > 0)
    progress = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, state.progress)
    # From the step that was looked at to one with the present rates.
    unit = joint(rates) * jnp.abs(rule.factor)
    scaled = seen._replace(taken=unit, curvature=seen.curvature * (unit / seen.taken) ** 2)
    change, progress = rule.solver.change(progress, scaled, rule.factor, rule.finding)
    ascends = progress.same <= 0
    change = jnp.where(usable & ~ascends & jnp.isfinite(change), change, 0.0)
    state = _averaged(state._replace(progress=progress), measured, usable, call, rule)
    finite &= jnp.isfinite(value)
    statuses = _statuses(measured.slope, finite, measured.resolved, ascends)
    # The first update has no step to look back at, and that is no reason to worry anyone.
    first = (state.count == 0) & (measured.step.sign < 0) & finite
    statuses = jnp.where(first, Kept.NO, statuses).astype(jnp.int32)
    return state._replace(kept=call.groups.unpack(statuses)), change


def _preconditioned(call: Call, measured: Measured) -> jax.Array:
    """How far the coming direction is from a running sum of gradients; 0 where none is known."""
    if call.grad is None:
        return jnp.zeros((), jnp.float32)
    updates, grad = call.updates, call.grad
    unknown = call.previous is None
    before = optax.tree.zeros_like(updates) if unknown else measured.step.along.direction
    return preconditioned(
        direction=call.inner(updates, updates),
        previous=call.inner(before, before),
        gradient=call.inner(grad, grad),
        ahead=call.inner(updates, before),
        down=call.inner(updates, grad),
        across=call.inner(before, grad),
    )


def _averaged(
    state: HiDLRState, measured: Measured, usable: jax.Array, call: Call, rule: Rule
) -> HiDLRState:
    """Averages in slope and curvature of every group."""
    groups = call.groups
    slope, curvature = measured.slope, measured.curvature
    usable = usable & jnp.isfinite(slope) & jnp.isfinite(curvature) & (slope != 0)
    count, decay = groups.pack(state.measurements), decay_of(rule.finding)

    def mean(field: dict[str, jax.Array], new: jax.Array) -> jax.Array:
        old = groups.pack(field)
        return jnp.where(usable, averaged(old, new, count.astype(jnp.float32), decay), old)

    quadratic = Quadratic(mean(state.slope, slope), mean(state.curvature, curvature))
    sizes = jnp.asarray(groups.sizes, jnp.float32)
    ppi = influence(quadratic, sizes)
    known = usable & (quadratic.curvature > 0) & jnp.isfinite(ppi)
    ppi = jnp.where(known, ppi, groups.pack(state.influence))
    return state._replace(
        slope=groups.unpack(quadratic.slope),
        curvature=groups.unpack(quadratic.curvature),
        influence=groups.unpack(ppi),
        measured_slope=groups.unpack(jnp.where(usable, slope, 0)),
        measured_curvature=groups.unpack(jnp.where(usable, curvature, 0)),
        measurements=groups.unpack(count + usable.astype(jnp.int32)),
    )


def _measure(
    state: HiDLRState,
    call: Call,
    rule: Rule,
    rates: jax.Array,
    value: jax.Array,
    same: jax.Array | None,
) -> Measured:
    """Along the last step where it is kept, on a batch that it has not seen; or the coming one."""
    groups = call.groups
    if call.previous is not None and same is not None:
        direction = jax.tree.map(
            lambda old, new: old.astype(new.dtype), call.previous, call.updates
        )
        taken = groups.pack(state.group_learning_rates) * state.schedule_factor
        last = call.coming.along(direction)
        step = Step(last, taken, call.slope(last), -1)
        probe = last(-taken)
    else:
        taken = rates * rule.factor
        probe = call.coming(taken)
        if same is None:
            # The odd part of the loss is all that can be told of slopes, so groups share it.
            odd = _fall(call.coming(-taken), probe) / 2
            same = jnp.full(len(rates), odd / _nonzero(jnp.sum(taken)))
        step = Step(call.coming, taken, same, 1)
    won = step.sign * _fall(value, probe)
    descent = step.taken @ step.slope
    curvature = 2 * step.sign * (descent - won)
    each, is_split = _divided(state, call, rule, step, curvature)
    unit = joint(jnp.abs(step.taken))
    ends = step.sign < 0  # the slope is known at the end of the step, and wanted at its start
    look_ = Look(
        taken=unit,
        slope=descent + curvature if ends else descent,
        curvature=curvature,
        same=unit * (rates @ same) / joint(rates),
    )
    eps = RESOLUTION * float(jnp.finfo(probe.dtype).eps)
    largest = jnp.maximum(jnp.abs(descent), jnp.abs(won))
    return Measured(
        step=step,
        slope=step.slope + each * step.taken if ends else step.slope,
        curvature=each,
        same=same,
        look=look_,
        resolved=largest > eps * jnp.abs(value).astype(jnp.float32),
        is_split=is_split & jnp.isfinite(probe),
        rise=-won,
    )


def _divided(
    state: HiDLRState, call: Call, rule: Rule, step: Step, curvature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(Aη)_k/η_k of every group, and whether they were measured one by one.

    Every few refreshes the estimator does that. At the others, the curvature along the joint step
    is divided as it was before; as the slopes are, if it never was.
    """
    groups, taken = call.groups, step.taken
    known = jnp.maximum(groups.pack(state.curvature), 0) * taken**2
    shares = jnp.where(jnp.sum(known) > 0, known, jnp.abs(step.slope * taken))
    shares /= jnp.maximum(jnp.sum(shares), _TINY)
    divided = shares * curvature / _nonzero(taken) ** 2
    if len(groups) == 1 or rule.solver.max_split == 1 or not rule.estimator.separates:
        return divided, jnp.zeros((), bool)

    def measured() -> jax.Array:
        found = rule.estimator.estimate(
            step.along,
            step.sign * taken,
            value=call.value,
            slope=None if call.grad is None else step.slope,
            expected=Quadratic(groups.pack(state.slope), groups.pack(state.curvature)),
            batch=call.batch,
            step=state.count,
        )
        rows = found.quadratic.slope - found.quadratic.slope_at(taken)
        return jnp.where(found.resolved, rows / _nonzero(taken), 0).astype(jnp.float32)

    due = (state.refreshes % rule.solver.split_interval == 0) & jnp.all(taken != 0)
    return jax.lax.cond(due, measured, lambda: divided), due


def _fall(value: jax.Array, probe: jax.Array) -> jax.Array:
    """The one loss minus the other, subtracted in float32 or wider: () float32."""
    dtype = wide(probe.dtype)
    return (value.astype(dtype) - probe.astype(dtype)).astype(jnp.float32)


def _nonzero(value: jax.Array) -> jax.Array:
    return jnp.where(value == 0, 1, value)


def _statuses(
    slope: jax.Array, finite: jax.Array, resolved: jax.Array, ascends: jax.Array
) -> jax.Array:
    """(K,) of `Kept`: why the refresh left the rates as they were."""
    whole = jnp.where(ascends, Kept.ASCENDS, Kept.NO)
    whole = jnp.where(resolved, whole, Kept.UNRESOLVED)
    each = jnp.where(slope == 0, Kept.NO_SLOPE, whole)
    return jnp.where(finite, each, Kept.NON_FINITE).astype(jnp.int32)
