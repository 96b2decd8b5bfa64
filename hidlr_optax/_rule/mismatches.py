"""The branch of a refresh, and whether what `update` is told fits together.

Four slips raise no error by themselves and let all rates sink: `value` or `grad` of another
function than the one that is probed, a direction that goes uphill, and steps that are changed after
`hidlr` has returned them. They are measured at refreshes, inside of the one branch that a step has,
and counted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._groups import wide
from hidlr_optax._quadratic import Kept
from hidlr_optax._state import Clock, Packed, where_due
from hidlr_optax._step_loss import Evidence, StepLoss

_CHECKS = 3  # refreshes at which value and gradient are compared; at one, some agree by chance
_VALUE_PART = 1e-4  # of the loss: a difference that is no rounding
_VALUE_NOISE = 4.0  # times the noise of the loss: likewise
_VALUE_FIRST = 3e-3  # of the loss: likewise, while the noise is not known
_VALUE_FLOOR = 1e-7  # of one: a loss whose terms cancel is all rounding
_SLOPE_RATIO = 2.0  # between the slope that is given and the one that is measured
_SLOPE_PART = 1e-3  # of ‖g‖‖u‖: slopes below it are rounding
_NEAR = 1 / 64  # of the coming step: as far as the loss is followed to tell its noise
_STEP_RATIO = 2.0  # between the step that was returned and the one that was taken
_STEP_PART = 1e-5  # of ‖w‖‖u‖: a difference of ⟨w, u⟩ below it is rounding


Refresh = Callable[[Packed, Evidence], Packed]


def refresh_if(
    due: jax.Array,
    refresh: Refresh,
    state: Packed,
    waiting: Packed,
    evidence: Evidence,
    clock: Clock,
) -> Packed:
    """The refreshed state where one is due, by evidence that has been checked.

    A step that never refreshes has no branch. On a GPU the host waits for what a branch depends on,
    and begins to launch what follows only then.

    Args:
      due: () bool.
      refresh: (state, evidence) -> the refreshed state.
      state: what a refresh begins with.
      waiting: what the state is without one.
      evidence: as it was given.
      clock: of this update.
    """
    if clock.never:
        return waiting

    def refreshed() -> Packed:
        known = evidence.with_products()
        before, known = _checked(_followed(state, known), known)
        return _counted(refresh(before, known), known)

    return where_due(due, refreshed, waiting)


def _followed(state: Packed, evidence: Evidence) -> Packed:
    """Compares how far the parameters moved along the last direction with the step returned.

    From one refresh to the next, where they follow each other, as they do while rates are found. Of
    parameters or directions narrower than float32, rounding takes a part of each step: they say
    nothing.
    """
    leaves = jax.tree.leaves((evidence.coming.params, evidence.previous))
    is_wide = all(wide(leaf.dtype) == leaf.dtype for leaf in map(jnp.asarray, leaves))
    if evidence.previous is None or not is_wide:
        return state
    products, whole = evidence.products, evidence.products.whole()
    rates = state.group_learning_rates * state.schedule_factor
    returned = jnp.sum(rates * products.previous.astype(rates.dtype))
    taken = whole.moved_to - state.position
    rounding = _STEP_PART * jnp.sqrt(whole.params) * jnp.sqrt(whole.previous)
    known = (state.position_count == state.count) & (jnp.abs(returned) > rounding)
    known &= jnp.isfinite(taken) & jnp.isfinite(returned)
    ratio = taken / jnp.where(returned == 0, 1, returned)
    has_position = jnp.isfinite(whole.position)
    follows = (ratio > 1 / _STEP_RATIO) & (ratio < _STEP_RATIO)
    return state._replace(
        step_mismatches=state.step_mismatches + (known & ~follows).astype(jnp.int32),
        position=jnp.where(has_position, whole.position, 0),
        position_count=jnp.where(has_position, optax.safe_increment(state.count), 0),
    )


def _checked(state: Packed, evidence: Evidence) -> tuple[Packed, Evidence]:
    """Compares value and gradient with the loss at the parameters, at the first refreshes.

    Where the value differs, that refresh and all later ones evaluate the loss in its place. A
    gradient that is off by a factor (of a scaled loss, of a sum in place of a mean) has its slopes
    multiplied by it from then on. The noise of the loss is measured at the second and the third,
    since the rates of the first are only given.

    Returns:
      The state with what was found counted, and the evidence that may be used.
    """
    value, with_slope = evidence.value, evidence.compares_slope and evidence.grad is not None
    if value is None and not with_slope:
        return state, evidence
    wrong_before = state.value_mismatches > 0
    looks = (state.refreshes < _CHECKS) | wrong_before
    rates = state.group_learning_rates
    rates = jnp.where(jnp.all(rates > 0), rates, jnp.ones_like(rates))
    first = state.refreshes == 0

    def look() -> tuple[Any, ...]:
        near = jnp.where(first, 0, jnp.float32(_NEAR))
        loss, slope, noise = _at_start(evidence.coming, rates, near, with_slope)
        counts = jnp.isfinite(noise) & (state.refreshes < _CHECKS)
        noise = jnp.where(counts, noise, 0)
        noise = jnp.maximum(noise, state.loss_noise)
        used, wrong_value = value, jnp.zeros((), bool)
        if value is not None:
            loss = loss.astype(value.dtype)
            rounding = jnp.where(first, _VALUE_FIRST, _VALUE_NOISE * noise)
            wrong_value = _differ(value, loss, jnp.maximum(_VALUE_PART, rounding))
            differs = _differ(value, loss, jnp.float32(_VALUE_PART))
            used = jnp.where(differs | wrong_before, loss, value)
        factor, wrong_slope = state.gradient_factor, jnp.zeros((), bool)
        if slope is not None:
            factor, wrong_slope = _factor(evidence, rates, slope, factor)
        wrong = wrong_value.astype(jnp.int32), wrong_slope.astype(jnp.int32)
        return used, *wrong, factor, noise

    nothing = jnp.zeros((), jnp.int32)
    kept = value, nothing, nothing, state.gradient_factor, state.loss_noise
    used, wrong_value, wrong_slope, factor, noise = where_due(looks, look, kept)
    state = state._replace(
        value_mismatches=state.value_mismatches + wrong_value,
        gradient_mismatches=state.gradient_mismatches + wrong_slope,
        gradient_factor=factor,
        loss_noise=noise,
    )
    return state, evidence._replace(value=used, factor=factor)


def _at_start(
    coming: StepLoss, rates: jax.Array, near: jax.Array, with_slope: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The loss at the parameters, its slope along the step of these rates, and its noise.

    The slope in forward mode, which `pmap` does not turn into that of one device alone. A loss may
    lack it (callbacks, some kernels); then it is None, and no noise is known.

    The noise is what a small part of the step, `near`, changes the loss by beyond its slopes at
    both ends (a trapezoid, exact to the third order): of float32, rounding; of arithmetic in
    bfloat16, thousands of times that, though the loss may be a float32. Relative to the loss, or to
    what the step is to win if that is more.
    """
    if not with_slope:
        return coming.start(), None, jnp.zeros((), jnp.float32)

    def at(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, tangent = jax.jvp(coming, (part * rates,), (rates,))
        return loss.astype(wide(loss.dtype)), -tangent.astype(jnp.float32)

    try:
        losses, slopes = jax.lax.map(at, jnp.stack([jnp.zeros_like(near), near]))
    except Exception:  # whatever the loss raises where it has no forward mode
        return coming.start(), None, jnp.zeros((), jnp.float32)
    fall = (losses[0] - losses[1]).astype(jnp.float32)
    size = jnp.maximum(jnp.abs(losses[0]).astype(jnp.float32), jnp.abs(slopes[0]))
    noise = jnp.abs(fall - near * jnp.mean(slopes)) / jnp.where(size > 0, size, 1)
    return losses[0], slopes[0], noise


def _differ(value: jax.Array, loss: jax.Array, part: jax.Array) -> jax.Array:
    """Whether two losses differ by more than this part; no verdict where one is not finite."""
    size = jnp.maximum(jnp.abs(value), jnp.abs(loss))
    apart = jnp.abs(value - loss) > part.astype(size.dtype) * size + _VALUE_FLOOR
    return apart & jnp.isfinite(value) & jnp.isfinite(loss)


def _factor(
    evidence: Evidence, rates: jax.Array, measured: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factor for slopes by the gradient along the step of these rates; whether it is not one."""
    products = evidence.products
    given = -rates @ products.down.astype(jnp.float32)
    length = jnp.sqrt(rates**2 @ products.direction.astype(jnp.float32))
    rounding = _SLOPE_PART * jnp.sqrt(products.whole().gradient) * length
    # Of the larger one: a gradient that is far too small has small norms, too.
    known = jnp.maximum(jnp.abs(given), jnp.abs(measured)) > rounding
    known &= jnp.isfinite(given) & jnp.isfinite(measured)
    ratio = measured / jnp.where(given == 0, 1, given)
    fits = (given != 0) & (ratio > 1 / _SLOPE_RATIO) & (ratio < _SLOPE_RATIO)
    wanted = jnp.where(fits | (ratio <= 0) | (given == 0), 1.0, ratio)
    return jnp.where(known, wanted, before), known & ~fits


def _counted(new: Packed, evidence: Evidence) -> Packed:
    """The refreshed state with what a person wants to know of the refresh.

    Groups whose update is zero have no slope, whatever else was measured. `ascents` counts
    refreshes at which no group goes downhill, `highest_learning_rates` is what the rates once were.
    """
    still = evidence.products.direction == 0
    slope = evidence.slope()
    slope = new.measured_slope if slope is None else slope
    ascends = jnp.all(slope <= 0) & jnp.any(slope < 0)
    no_slope = still & (new.kept != Kept.NON_FINITE)
    rates = new.group_learning_rates
    return new._replace(
        kept=jnp.where(no_slope, jnp.int32(Kept.NO_SLOPE), new.kept),
        ascents=new.ascents + ascends.astype(jnp.int32),
        highest_learning_rates=jnp.maximum(new.highest_learning_rates, rates),
    )
