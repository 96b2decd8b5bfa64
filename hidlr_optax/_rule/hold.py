"""Peak and hold: find the rates in the first steps, then hold them. The order of one update.

Look back along the last step, move the proportions, move the joint rate, guard the coming step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._diagnostics import Diagnostics, Kept
from hidlr_optax._rule import guard, rate, record, shape
from hidlr_optax._rule.measure import TINY, Call, Look, joint, look


class Memory(NamedTuple):
    """What the rule remembers between updates: () float32 each, but for `by_group`.

    Attributes:
      looks: resolved ones.
      guard: the factor of the guard.
      peak: the largest factor of the schedule so far.
      loss: the running loss.
      promised: what steps promise to win by their slope, on average.
      position: ⟨w, u⟩ at the last refresh.
      mean: averages over looks.
      by_group: the same of each group, (K,).
    """

    looks: Any
    guard: Any
    peak: Any
    loss: Any
    promised: Any
    position: Any
    mean: rate.Averages
    by_group: shape.Groupwise


class State(NamedTuple):
    """What an update reads and writes.

    Attributes:
      rates: η, (K,), without schedule and guard.
      applied: the rates of the last step, (K,), with both; 0 where it took a step back.
      memory: of the rule.
      diagnostics: for a person.
    """

    rates: jax.Array
    applied: jax.Array
    memory: Memory
    diagnostics: Diagnostics[jax.Array]


class Clock(NamedTuple):
    """Where in a run an update stands.

    Attributes:
      count: updates before it.
      warmup: resolved looks in which the rates are found.
      due: whether a refresh is due by the number of the update; None where there is none at all.
      retry: whether there is one if the last measured nothing.
      factor: f, of the schedule.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    warmup: jax.Array
    due: jax.Array | None
    retry: jax.Array
    allowed: jax.Array
    factor: jax.Array


def begin(groups: int) -> Memory:
    """Before the first update."""
    fields: Any = {name: jnp.zeros((), jnp.float32) for name in Memory._fields}
    mean = rate.Averages(*(jnp.zeros((), jnp.float32) for _ in rate.Averages._fields))
    by_group = shape.Groupwise(*(jnp.zeros(groups, jnp.float32) for _ in shape.Groupwise._fields))
    fields |= {"guard": jnp.ones((), jnp.float32), "mean": mean, "by_group": by_group}
    return Memory(**fields)


def update(state: State, call: Call, clock: Clock, asked: jax.Array) -> tuple[State, jax.Array]:
    """The state after an update, and whether the last step is to be taken back: () bool.

    Args:
      state: before it.
      call: what `update` was told.
      clock: of this update.
      asked: the logarithms of the proportions that were asked for, (K,), their mean zero.
    """
    slope, harmed = call.slope(), jnp.zeros((), bool)
    state, jumped = _watched(state, call, clock)
    if clock.due is not None:
        missed = jnp.all(state.diagnostics.kept == Kept.UNRESOLVED)
        finding = state.memory.looks < clock.warmup
        due = clock.due | jumped | jnp.where(missed, clock.retry, finding)

        def refreshed() -> tuple[State, jax.Array]:
            return refresh(state, call.valued(), slope, clock, asked, jumped)

        # Only a look at the very next update can tell how far the parameters have moved.
        waiting = state._replace(memory=state.memory._replace(position=jnp.zeros((), jnp.float32)))
        state, harmed = record.where_due(due & clock.allowed, refreshed, (waiting, harmed))
    return _guarded(state, call, slope, clock, harmed), harmed


def _watched(state: State, call: Call, clock: Clock) -> tuple[State, jax.Array]:
    """The state with the running loss, where the loss is known; and whether it has jumped."""
    peak = jnp.maximum(state.memory.peak, jnp.abs(clock.factor))
    memory = state.memory._replace(peak=peak)
    if call.value is None:
        return state._replace(memory=memory), jnp.zeros((), bool)
    value = call.value.astype(jnp.float32)
    jumped = guard.jumped(value, memory.loss) & (clock.count > 0)
    loss = rate.average(memory.loss, value, clock.count, rate.HOLD)
    loss = jnp.where(jnp.isfinite(value), loss, memory.loss)
    return state._replace(memory=memory._replace(loss=loss)), jumped


def _size(memory: Memory, call: Call) -> jax.Array:
    """The loss by which changes are judged: that of this batch or the running one, the larger."""
    usual = jnp.abs(memory.loss)
    if call.value is None:
        return usual
    value = jnp.abs(call.value.astype(jnp.float32))
    return jnp.where(jnp.isfinite(value), jnp.maximum(value, usual), usual)


def _guarded(state: State, call: Call, slope: jax.Array, clock: Clock, harmed: jax.Array) -> State:
    """The state with the rates of the coming step."""
    memory = state.memory
    rates = state.rates * memory.guard * clock.factor
    promise = jnp.abs(rates) @ slope
    part = guard.cap(promise, memory.promised, _size(memory, call))
    won = jnp.maximum(part * promise, 0)
    promised = rate.average(memory.promised, won, clock.count, rate.HOLD)
    memory = memory._replace(
        guard=guard.recovered(memory.guard, harmed & (memory.looks >= clock.warmup)),
        promised=jnp.where(jnp.isfinite(won), promised, memory.promised),
    )
    return state._replace(applied=jnp.where(harmed, 0, part * rates), memory=memory)


class Now(NamedTuple):
    """What a refresh knows of its place in the run.

    Attributes:
      finding: whether the rates are still to be found.
      begins: whether no look has been resolved yet.
      held: looks since the rates were found.
      size: the loss by which changes are judged.
      apart: whether this look is at the groups apart.
      log_shape: the logarithms of the proportions, (K,).
      slope: S, (K,).
    """

    is_first: jax.Array
    finding: jax.Array
    begins: jax.Array
    held: jax.Array
    size: jax.Array
    apart: jax.Array
    log_shape: jax.Array
    slope: jax.Array


def _now(
    state: State, call: Call, slope: jax.Array, clock: Clock, asked: jax.Array, jumped: jax.Array
) -> Now:
    looks, is_first = state.memory.looks, clock.count == 0
    finding, held = looks < clock.warmup, jnp.maximum(looks - clock.warmup, 0)
    log_rates = jnp.log(jnp.maximum(state.rates, TINY))
    return Now(
        is_first=is_first,
        finding=finding,
        begins=finding & (looks == 0),
        held=held,
        size=_size(state.memory, call),
        # Every second look, once the rates are found.
        apart=jnp.bool_(len(slope) > 1) & (held % 2 == 1) & ~jumped,
        log_shape=jnp.where(jnp.all(state.rates > 0), log_rates - jnp.mean(log_rates), asked),
        slope=slope,
    )


def refresh(
    state: State, call: Call, slope: jax.Array, clock: Clock, asked: jax.Array, jumped: jax.Array
) -> tuple[State, jax.Array]:
    """The state with the rates moved, and whether the last step did harm."""
    now, memory, products = (
        _now(state, call, slope, clock, asked, jumped),
        state.memory,
        call.products(),
    )
    value = call.value.astype(jnp.float32)
    begun = now.log_shape + rate.first(value, slope, now.log_shape, products)
    signs = jnp.where(now.apart, _signs(len(slope), now.held), 1.0)
    rates = jnp.where(now.is_first, jnp.exp(begun), signs * state.applied)
    seen = look(call, products, rates, now.is_first, record.distrusts(state.diagnostics))
    peak = jnp.where(memory.peak > 0, memory.peak, 1)
    level = joint(state.rates) * memory.guard * jnp.abs(clock.factor) / peak
    resolved = seen.is_resolved(call.value, level)
    along = resolved & ~now.is_first & ~now.apart
    log_memory = jnp.where(now.finding, rate.FIND, rate.HOLD)
    kinds = [
        rate.average(old, new, memory.looks, log_memory)
        for old, new in zip(memory.mean[2:], rate.kind(products), strict=True)
    ]

    by_group = shape.include(memory.by_group, slope, seen.rows, seen.unit, memory.looks)
    moved = _moved(by_group, now, asked, kinds[0], resolved)
    mean, change = _changed(memory, seen, by_group, moved, now, kinds, level, clock, along)
    follows = record.follows(call, products, state.applied, memory.position)
    position = jnp.sum(products.wu)
    harmed = along & guard.harms(seen.won, now.size)
    change += jnp.where(harmed & now.finding, jnp.log(rate.FALL), 0)
    log_joint = jnp.mean(jnp.log(jnp.maximum(state.rates, TINY)))
    started = rate.first(value, slope, now.log_shape + moved, products)
    log_joint = jnp.where(now.begins, started, log_joint)
    found = jnp.exp(now.log_shape + moved + log_joint + change)
    sound = jnp.all(jnp.isfinite(found) & (found > 0)) & jnp.isfinite(value)
    memory = memory._replace(
        looks=memory.looks + (resolved & ~now.is_first),
        mean=mean,
        by_group=_where(resolved, by_group, memory.by_group),
        position=jnp.where(jnp.isfinite(position), position, 0),
    )
    state = state._replace(rates=jnp.where(sound, found, state.rates), memory=memory)
    diagnostics = record.recorded(
        state.diagnostics,
        call,
        products,
        seen,
        resolved,
        is_along=~now.apart,
        alone=now.apart | (len(slope) == 1),
        harmed=harmed,
        follows=follows,
    )
    return state._replace(diagnostics=diagnostics), harmed


def _moved(
    mean: shape.Groupwise, now: Now, asked: jax.Array, normalised: jax.Array, resolved: jax.Array
) -> jax.Array:
    """The logarithms of what the proportions are multiplied by, (K,)."""
    if len(asked) == 1:
        return jnp.zeros_like(asked)
    weight = jnp.where(now.finding, 1.0, 1 / (1 + now.held / rate.PATIENCE))
    most = jnp.where(now.is_first, jnp.finfo(jnp.float32).max, 1.0)
    moved = shape.change(mean, now.log_shape, asked, normalised, weight, most)
    return jnp.where(resolved & jnp.all(jnp.isfinite(moved)), moved, 0)


def _changed(
    memory: Memory,
    seen: Look,
    by_group: shape.Groupwise,
    moved: jax.Array,
    now: Now,
    kinds: Any,
    level: jax.Array,
    clock: Clock,
    along: jax.Array,
) -> tuple[rate.Averages, jax.Array]:
    """The averages with this look, and the logarithm of what the joint rate is multiplied by."""
    proportions = jnp.exp(now.log_shape)
    # Looks count as they are while the rates are found, relative to the loss of their time later.
    unit, turns = jnp.where(now.finding, 1.0, now.size), memory.looks == clock.warmup
    scale = jnp.where(turns, 1 / jnp.where(now.size > 0, now.size, 1), 1.0)
    old = memory.mean.scaled(scale, scale)
    usual, present = (jnp.abs(proportions @ s) / unit for s in (memory.by_group.slope, now.slope))
    # One odd batch bounds nothing: the first three looks bound each other.
    bound = jnp.where(memory.looks < 3, jnp.maximum(usual, present), usual)
    memory_of = jnp.where(now.finding, rate.FIND, rate.HOLD)
    mean = rate.include(old, seen, unit, bound, memory.looks, memory_of)
    mean = _where(along, mean._replace(normalised=kinds[0], carried=kinds[1]), old)
    more_slope, more_curve = shape.effect(by_group, now.log_shape, moved)
    mean = mean.scaled(more_slope, more_curve)
    newest = more_curve * seen.curvature / jnp.maximum(seen.unit, TINY) ** 2 / unit
    same = more_slope * (proportions @ by_group.slope) / unit
    change = rate.change(mean, newest, same, level, jnp.abs(clock.factor), now.finding, now.held)
    return mean, jnp.where(along & (same > 0) & jnp.isfinite(change), change, 0)


def _where(use: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(use, new, old), new, old)


def _signs(groups: int, held: jax.Array) -> jax.Array:
    """Walsh functions, (K,): over 2ⁿ ≥ K looks, products of two groups' signs add up to zero.

    So rows (As)_k of steps with these signs s have s_k (As)_k = A_kk in the mean.
    """
    shared = jnp.arange(groups) & (held.astype(jnp.int32) // 2)
    return 1.0 - 2.0 * (jax.lax.population_count(shared) % 2).astype(jnp.float32)
