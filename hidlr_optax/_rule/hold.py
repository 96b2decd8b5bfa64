"""Peak and hold: find the rates in the first steps, then hold them. The order of one update.

Look back along the last step, move the proportions, move the joint rate, guard the coming step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._branch import where_due
from hidlr_optax._diagnostics import Diagnostics, Kept
from hidlr_optax._rule import guard, rate, record, shape
from hidlr_optax._rule.measure import TINY, Call, Look, Products, look

MOST = 2.0  # the logarithm by which one look moves a proportion at most


class Memory(NamedTuple):
    """What the rule remembers between updates: () float32 each, but for `by_group`.

    Attributes:
      looks: resolved ones.
      guard: the factor of the guard.
      peak: the largest factor of the schedule so far.
      loss: the running loss.
      spread: how far losses lie from it on average.
      promised: what steps promise to win by their slope, on average.
      position: ⟨w, u⟩ at the last refresh.
      mean: averages over looks.
      by_group: the same of each group, (K,).
    """

    looks: Any
    guard: Any
    peak: Any
    loss: Any
    spread: Any
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
    by_group = shape.Groupwise.of(
        *(jnp.zeros(groups, jnp.float32) for _ in shape.Groupwise._fields)
    )
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
    # Only a look at the very next update can tell how far the parameters have moved.
    waiting = state._replace(memory=state.memory._replace(position=jnp.zeros((), jnp.float32)))
    if clock.due is None:
        state = waiting
    else:

        def refreshed() -> tuple[State, jax.Array]:
            return refresh(state, call, slope, clock, asked, jumped)

        due = (clock.due | _is_awaited(state, clock) | jumped) & clock.allowed
        state, harmed = where_due(due, refreshed, (waiting, harmed))
    return _guarded(state, call, slope, clock, harmed), harmed


def _is_awaited(state: State, clock: Clock) -> jax.Array:
    """Whether a look is wanted before it is due: to find the rates, or since the last was missed.

    A rate that has not come near its goal in twice the warm-up is looked for at due updates alone.
    """
    missed = jnp.all(state.diagnostics.kept != Kept.UPDATED)
    finds = (state.memory.looks < clock.warmup) & (
        clock.count.astype(jnp.float32) <= 2 * clock.warmup
    )
    return jnp.where(missed, clock.retry, finds)


def _watched(state: State, call: Call, clock: Clock) -> tuple[State, jax.Array]:
    """The state with the running loss, where the loss is known; and whether that has jumped."""
    peak = jnp.maximum(state.memory.peak, jnp.abs(clock.factor))
    memory = state.memory._replace(peak=peak)
    if call.value is None:
        return state._replace(memory=memory), jnp.zeros((), bool)
    value, is_first = call.value.astype(jnp.float32), clock.count == 0
    jumped = guard.jumped(value, memory.loss, memory.spread) & ~is_first
    weight = rate.newest(clock.count, rate.HOLD)
    loss = rate.average(memory.loss, value, weight)
    away = jnp.where(is_first, 0, jnp.abs(value - memory.loss))
    watched = memory._replace(loss=loss, spread=rate.average(memory.spread, away, weight))
    return state._replace(memory=_where(jnp.isfinite(value), watched, memory)), jumped


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
    promised = rate.average(memory.promised, won, rate.newest(clock.count, rate.HOLD))
    memory = memory._replace(
        guard=guard.recovered(memory.guard, harmed & (memory.looks >= clock.warmup)),
        promised=jnp.where(jnp.isfinite(won), promised, memory.promised),
    )
    return state._replace(applied=jnp.where(harmed, 0, part * rates), memory=memory)


class Now(NamedTuple):
    """What a refresh knows of its place in the run.

    Attributes:
      is_first: whether it is at the first update.
      finding: whether the rates are still to be found.
      begins: whether no look has measured anything yet.
      held: looks since the rates were found.
      weight: of this look in averages.
      size: the loss by which changes are judged.
      level: the joint rate of a step at the schedule's peak.
      apart: whether this look is at the groups apart.
      log_shape: the logarithms of the proportions, (K,).
      log_joint: that of the joint rate.
      slope: S, (K,).
      asked: the logarithms of the proportions that were asked for, (K,).
      factor: of the schedule.
    """

    is_first: jax.Array
    finding: jax.Array
    begins: jax.Array
    held: jax.Array
    weight: jax.Array
    size: jax.Array
    level: jax.Array
    apart: jax.Array
    log_shape: jax.Array
    log_joint: jax.Array
    slope: jax.Array
    asked: jax.Array
    factor: jax.Array

    @staticmethod
    def of(
        state: State,
        call: Call,
        slope: jax.Array,
        clock: Clock,
        asked: jax.Array,
        jumped: jax.Array,
    ) -> "Now":
        """The place of this call."""
        memory, factor = state.memory, jnp.abs(clock.factor)
        finding, held = memory.looks < clock.warmup, jnp.maximum(memory.looks - clock.warmup, 0)
        log_rates = jnp.log(jnp.maximum(state.rates, TINY))
        log_joint, is_first = jnp.mean(log_rates), clock.count == 0
        log_shape = jnp.where(jnp.all(state.rates > 0), log_rates - log_joint, asked)
        relative = factor / jnp.where(memory.peak > 0, memory.peak, 1)
        return Now(
            is_first=is_first,
            finding=finding,
            begins=finding & (memory.looks == 0),
            held=held,
            weight=rate.newest(memory.looks, jnp.where(finding, rate.FIND, rate.HOLD)),
            size=_size(memory, call),
            level=jnp.exp(log_joint) * memory.guard * relative,
            # Every second look, once the rates are found.
            apart=jnp.bool_(len(slope) > 1) & (held % 2 == 1) & ~jumped,
            log_shape=jnp.where(is_first & finding, _by_slope(slope), log_shape)
            if len(slope) > 1
            else jnp.zeros_like(slope),
            log_joint=log_joint,
            slope=slope,
            asked=asked,
            factor=factor,
        )


def refresh(
    state: State, call: Call, slope: jax.Array, clock: Clock, asked: jax.Array, jumped: jax.Array
) -> tuple[State, jax.Array]:
    """The state with the rates moved, and whether the last step did harm."""
    is_unwatched, call = call.value is None, call.valued()
    if is_unwatched:
        state, _ = _watched(state, call, clock)
    now, memory = Now.of(state, call, slope, clock, asked, jumped), state.memory
    products = call.products()
    signs = jnp.where(now.apart, _signs(len(slope), now.held), 1.0) if len(slope) > 1 else 1.0
    begun = jnp.exp(now.log_shape + _first(call, products, now, jnp.zeros_like(slope)))
    rates = jnp.where(now.is_first, begun, signs * state.applied)
    seen = look(call, products, rates, now.is_first)
    resolved = seen.is_resolved(call.value, now.level) & ~record.distrusts(state.diagnostics)
    finite = seen.is_finite & jnp.isfinite(call.value)
    finite &= jnp.all(jnp.isfinite(slope) & jnp.isfinite(products.uu))
    resolved &= finite
    along = resolved & ~now.apart & ~now.is_first
    mean = _of_kind(memory, products, now)
    by_group, moved, effect = _moved(memory, seen, call.value, mean, now, resolved)
    mean, change, met = _changed(memory, seen, mean, by_group, effect, now)
    harmed = along & guard.harms(seen.won, now.size)
    change = jnp.where(along, change, 0) + jnp.where(harmed & now.finding, jnp.log(rate.FALL), 0)
    log_joint = jnp.where(now.begins, _first(call, products, now, moved), now.log_joint)
    found = jnp.exp(now.log_shape + moved + log_joint + change)
    sound = jnp.all(jnp.isfinite(found) & (found > 0)) & jnp.isfinite(call.value)
    sound &= now.is_first | finite
    position = jnp.sum(products.wu)
    # A rate that is far from its goal is not found, however many looks there were.
    counts = resolved & ~now.is_first & (met | (memory.looks != clock.warmup - 1))
    memory = memory._replace(
        looks=memory.looks + counts.astype(jnp.float32),
        mean=_where(along, mean, memory.mean.scaled(*effect)),
        by_group=_where(resolved, by_group, memory.by_group),
        position=jnp.where(jnp.isfinite(position), position, 0),
    )
    diagnostics = record.recorded(
        state.diagnostics,
        call,
        products,
        seen,
        resolved,
        finite,
        is_along=~now.apart & ~now.is_first,
        alone=now.apart | ((len(slope) == 1) & ~now.is_first),
        harmed=harmed,
        follows=record.follows(call, products, state.applied, state.memory.position),
    )
    rates = jnp.where(sound, found, state.rates)
    return state._replace(rates=rates, memory=memory, diagnostics=diagnostics), harmed


def _first(call: Call, products: Products, now: Now, moved: jax.Array) -> jax.Array:
    """The logarithm of the joint rate to begin with, in the proportions that were found."""
    return rate.first(call.value.astype(jnp.float32), now.slope, now.log_shape + moved, products)


def _of_kind(memory: Memory, products: Products, now: Now) -> rate.Averages:
    """The averages with what kind of direction this is."""
    kinds = zip(memory.mean[2:], rate.kind(products), strict=True)
    averaged = [rate.average(old, new, now.weight) for old, new in kinds]
    return rate.Averages(*memory.mean[:2], *averaged)


def _moved(
    memory: Memory, seen: Look, value: jax.Array, mean: rate.Averages, now: Now, resolved: jax.Array
) -> tuple[shape.Groupwise, jax.Array, tuple[Any, Any]]:
    """The averages of the groups, the logarithms of what moves their proportions, its effect."""
    by_group = shape.include(memory.by_group, seen, now.slope, memory.looks)
    if len(now.slope) == 1:
        return by_group, jnp.zeros_like(now.slope), (1.0, 1.0)
    # Later, those of sums of gradients would feed on themselves: a long step has a long slope.
    weight = jnp.where(now.finding, 1.0, mean.normalised / (1 + now.held / rate.PATIENCE))
    most = jnp.where(now.is_first, jnp.finfo(jnp.float32).max, MOST)
    is_seen = seen.shows(value, now.begins)
    moved = shape.change(by_group, now.log_shape, now.asked, mean.normalised, is_seen, weight, most)
    stays = jnp.where(now.is_first & now.finding, now.asked - now.log_shape, 0)
    moved = jnp.where(resolved & jnp.all(jnp.isfinite(moved)), moved, stays)
    slope, curve = shape.effect(by_group, now.log_shape, moved)
    return by_group, moved, (jnp.where(resolved, slope, 1), jnp.where(resolved, curve, 1))


def _changed(
    memory: Memory,
    seen: Look,
    mean: rate.Averages,
    by_group: shape.Groupwise,
    effect: tuple[Any, Any],
    now: Now,
) -> tuple[rate.Averages, jax.Array, jax.Array]:
    """The averages, the logarithm of what the joint rate is multiplied by, and whether q is near.

    Looks count as they are while the rates are found, and relative to the loss of their time later.
    One odd batch bounds nothing: the first three looks bound each other.
    """
    unit = jnp.where(now.finding, 1.0, jnp.maximum(now.size, TINY))
    turns = (now.held == 0) & ~now.finding
    mean = mean.scaled(*[jnp.where(turns, 1 / unit, 1.0)] * 2)
    proportions = jnp.exp(now.log_shape)
    usual = proportions @ memory.by_group.gain / unit
    present = jnp.abs(proportions @ now.slope) / unit
    bound = jnp.where(memory.looks < 3, jnp.maximum(usual, present), usual)
    mean = rate.include(mean, seen, unit, bound, now.weight).scaled(*effect)
    newest = effect[1] * seen.curvature / jnp.maximum(seen.unit, TINY) ** 2 / unit
    same = effect[0] * (proportions @ by_group.gain) / unit
    change, met = rate.change(mean, newest, same, now.level, now.factor, now.finding, now.held)
    return mean, jnp.where((same > 0) & jnp.isfinite(change), change, 0), met


def _by_slope(slope: jax.Array) -> jax.Array:
    """The logarithms of the proportions in which all groups promise the same, (K,).

    For the first look alone, which has to see each of them, whatever its units are.
    """
    logarithms = -jnp.log(jnp.where(slope > 0, slope, 1))
    known = (slope > 0) & jnp.isfinite(slope)
    mean = jnp.sum(jnp.where(known, logarithms, 0)) / jnp.maximum(
        jnp.sum(known, dtype=jnp.float32), 1
    )
    return jnp.where(known, logarithms - mean, 0)


def _where(use: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(use, new, old), new, old)


def _signs(groups: int, held: jax.Array) -> jax.Array:
    """Walsh functions, (K,): over 2ⁿ ≥ K looks, products of two groups' signs add up to zero.

    So rows (As)_k of steps with these signs s have s_k (As)_k = A_kk in the mean.
    """
    shared = jnp.arange(groups, dtype=jnp.int32) & (held.astype(jnp.int32) // 2)
    return 1.0 - 2.0 * (jax.lax.population_count(shared) % 2).astype(jnp.float32)
