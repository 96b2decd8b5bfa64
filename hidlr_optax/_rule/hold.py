"""Peak and hold: find the scale of the rates in the first steps, then hold it. Arrays only.

The rule looks back once a refresh: it evaluates the loss where the last step began, on the batch
that came after it and so has not made it. With the loss where the step led, and the slope E there
by the gradient that is known anyway, that is a parabola along the step: its curvature is
C = 2(G − E), G the loss won, and the slope at its start F = E + C. The ratio q = C/F says how far
the step went: 1 to the minimum of the loss, 2 to where nothing is won.

Runs with tuned rates peak between, so the rule moves the rates until q meets a goal there: fast in
the first steps, then ever less, as a stochastic approximation does, and with Adam or Lion only
down. A schedule makes q smaller, and is not followed: it weighs in with the fourth power of its
factor.

All averages are kept per unit of the joint rate x, the geometric mean of the K rates, so that they
need no rescaling when x moves. While the rates are found, they are of looks as they are: the
curvature of a first, steep fall is not that of the run, and early looks outweigh it. After that,
looks are relative to the loss at their time: where a loss has fallen by a factor, so have its
slopes, and those of its beginning would outweigh all that comes later.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_TINY = 1e-30
_FIND_DECAY, _HOLD_DECAY = 0.7, 0.95  # of the averages, by the refresh
_SLOPE_DECAY = 0.9  # of the slopes while the rates are found: they are noisier than curvatures
_LOSS_DECAY = 0.95  # of the running loss
_GROWTH = 1.2  # the most by which a refresh raises the rates while it finds them
_RISE = 1.3  # and later
_HEED = 1.5  # times the goal: as much as one look alone may say while the rates are found
_FALL = 0.5  # the most by which it lowers them
_PATIENCE = 4.0  # refreshes after which the hold listens half as much
_TOO_LOW = 0.7  # log of goal over ratio beyond which the rates rise at once
_LEAST_SHARE = 0.1  # of S, that F is taken for at least
_TURN = 10.0  # a cosine with the gradient of 1 − 1/10 or less is preconditioned altogether
_NOISE = 0.8  # how much of the goal a slope that is all noise takes away
_SPLIT_STEP = 0.15  # part of the way to equal ratios that a split moves the groups
_START = 3e-2  # of the loss: what the first step, by its slope alone, is to change it by
_SHORTEST_START, _LONGEST_START = 1e-3, 1.0  # of the length of the parameters: that of this step
_LEAST_SIZE = 1e-3  # of the running loss and the slope, that looks are relative to at least
_STRAY = 2.5  # standard errors of the running loss above its least, from where it strays
_STRAY_PATIENCE = 60.0  # refreshes after which that grows
_LEVEL_DECAY = 0.99  # of the slow running loss
_TRIAL = 70.0  # losses after which a cut is judged
_SAME_LEVEL = 2.0  # standard errors between slow running losses that are taken for level
_ALARM = 4.0  # standard deviations of the loss above the running one that call for a look
_SHORTEST = 0.1  # of a step that is looked at before it is taken, at once
TRIES = 5  # how often such a step is shortened
_LEAP = 10.0  # times the usual decrease by the slope, of a step that may leave a plateau too fast
_JUMP = 0.3  # of the loss: a rise by more than this, where the coming step leads, halves the rates


class Averages(NamedTuple):
    """Of looks over refreshes, per unit of the joint rate: () float32 each.

    No name is one of the state's own, which `optax.tree.get` finds by their names.

    Attributes:
      same_slope: S = −⟨∇L, u⟩ on the batch that made u.
      start_slope: F.
      curve: C.
    """

    same_slope: jax.Array
    start_slope: jax.Array
    curve: jax.Array


class Progress(NamedTuple):
    """State of `hold` between updates: () float32 each.

    Attributes:
      absolute: of looks as they are, which count while the rates are found.
      relative: of looks relative to the loss at their time, which count later.
      size: what the last of these were divided by: the loss, without its sign.
      looks: how many refreshes the averages hold.
      preconditioned: whether the direction is more than a running sum of gradients, averaged; 0
        with SGD and momentum, 1 with Adam and Lion.
      ratio: q at the last refresh.
      goal: what q is moved to.
      loss: the running loss.
      level: a slower one.
      before: that before the cuts of the guard that are on trial; infinite where there are none.
      on_trial: how many they are.
      last: the last loss.
      spread: the running variance of the loss from batch to batch: half the mean square of the
        difference of two that follow each other, which hardly grows where the loss falls.
      least: the least running loss so far, since the guard last stepped in.
      least_spread: the running variance at that time.
      losses: how many losses the running loss holds.
      ceiling: the joint rate that the guard allows.
      peak: the largest factor of the schedule so far.
      held: refreshes since the rates were found.
    """

    absolute: Averages
    relative: Averages
    size: jax.Array
    looks: jax.Array
    preconditioned: jax.Array
    ratio: jax.Array
    goal: jax.Array
    loss: jax.Array
    level: jax.Array
    before: jax.Array
    on_trial: jax.Array
    last: jax.Array
    spread: jax.Array
    least: jax.Array
    least_spread: jax.Array
    losses: jax.Array
    ceiling: jax.Array
    peak: jax.Array
    held: jax.Array


def begin() -> Progress:
    """The averages before the first update."""
    none, infinite = (lambda: jnp.zeros((), jnp.float32)), jnp.array(jnp.inf, jnp.float32)
    fields: Any = {name: none() for name in Progress._fields}
    fields |= {name: Averages(none(), none(), none()) for name in ("absolute", "relative")}
    return Progress(**fields)._replace(
        **{name: jnp.copy(infinite) for name in ("before", "least", "ceiling")}
    )


class Look(NamedTuple):
    """Slope and curvature along one step, all groups together: () float32 each.

    Attributes:
      rate: the joint rate of the step, schedule included.
      slope: F, the decrease of the loss over the step by the slope at its start.
      curvature: C.
      same: S, the decrease over the coming step by its slope on the batch that made it.
    """

    rate: jax.Array
    slope: jax.Array
    curvature: jax.Array
    same: jax.Array


def joint(rates: jax.Array) -> jax.Array:
    """x, the geometric mean of (K,) rates."""
    return jnp.exp(jnp.mean(jnp.log(jnp.maximum(rates, _TINY))))


def first_rates(
    rates: jax.Array,
    shape: jax.Array,
    value: jax.Array,
    slope: jax.Array,
    squares: jax.Array,
    length: jax.Array,
) -> jax.Array:
    """(K,) rates in these proportions whose first step changes the loss by three hundredths.

    By its slopes alone: Σ η_k |b_k| = 0.03 |L|. A loss may be zero whatever its slopes are, or
    carry a constant, so the step is also a thousandth of the length of all parameters at least, and
    that length at most. Where neither says anything, `rates` stay; the shape takes their place
    where they are zero.

    Args:
      rates: at the beginning, (K,).
      shape: their proportions, (K,).
      value: L, ().
      slope: b, (K,).
      squares: ‖u_k‖², (K,).
      length: ‖w‖, ().
    """
    parts = shape / jnp.max(shape)  # the same to the last bit, whatever the scale of the shape
    steep = jnp.sum(parts * jnp.abs(slope))
    scale = _START * jnp.abs(value) / steep
    longest = length / jnp.sqrt(jnp.sum(parts**2 * squares))
    bounded = jnp.clip(scale, _SHORTEST_START * longest, _LONGEST_START * longest)
    has_bounds = jnp.isfinite(scale) & jnp.isfinite(longest) & (longest > 0)
    scale = jnp.where(has_bounds, bounded, scale)
    known = jnp.isfinite(steep) & jnp.isfinite(scale) & (scale > 0)
    return jnp.where(known, scale * parts, jnp.where(rates > 0, rates, shape))


def averaged(mean: jax.Array, new: jax.Array, count: jax.Array, decay: jax.Array) -> jax.Array:
    """The mean of the first few, then a moving average; `count` values are in `mean`."""
    return mean + jnp.maximum(1 / (count + 1), 1 - decay) * (new - mean)


def decay_of(finding: jax.Array) -> jax.Array:
    return jnp.where(finding, _FIND_DECAY, _HOLD_DECAY)


def preconditioned(
    direction: jax.Array,
    previous: jax.Array,
    gradient: jax.Array,
    ahead: jax.Array,
    down: jax.Array,
    across: jax.Array,
) -> jax.Array:
    """Distance of a direction u from a running sum of gradients: 0 for SGD and momentum, up to 1.

    What u does not carry on from the direction u′ before it (the residual of a least-squares fit of
    u/‖u‖ by u′/‖u′‖ beside g/‖g‖) is −g for SGD with or without momentum. Adam and Lion turn it
    away, since they weigh coordinates. 1 where the cosine is 9/10 or less.

    Args:
      direction: ‖u‖².
      previous: ‖u′‖², or 0 where that is not known.
      gradient: ‖g‖².
      ahead: ⟨u, u′⟩.
      down: ⟨u, g⟩.
      across: ⟨u′, g⟩.
    """

    def cosine(inner: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        norm = jnp.sqrt(first) * jnp.sqrt(second)
        return jnp.where(norm > 0, inner / jnp.where(norm > 0, norm, 1), 0)

    ahead, down = cosine(ahead, direction, previous), cosine(down, direction, gradient)
    across = cosine(across, previous, gradient)
    carried = jnp.clip((ahead - down * across) / (1 - across**2 + 1e-4), 0, 1)
    left = jnp.maximum(1 - 2 * carried * ahead + carried**2, 0)  # squared norm of the residual
    straight = (carried * across - down) / jnp.sqrt(left + 1e-6)
    return jnp.clip(_TURN * (1 - straight), 0, 1)


def forget_losses(progress: Progress, now: jax.Array) -> Progress:
    """The running loss begins anew, where `now`: it lags behind one that has fallen fast.

    A guard that compares a loss with one of long before sees no harm.
    """
    return progress._replace(
        losses=jnp.where(now, 0.0, progress.losses), least=jnp.where(now, jnp.inf, progress.least)
    )


def watch(progress: Progress, loss: jax.Array) -> Progress:
    """The running loss of batches that no step has seen, its variance, and its least."""
    count, decay = progress.losses, jnp.float32(_LOSS_DECAY)
    mean = averaged(progress.loss, loss, count, decay)
    difference = jnp.where(count > 0, loss - progress.last, 0)
    spread = averaged(progress.spread, difference**2 / 2, jnp.maximum(count - 1, 0), decay)
    lower = (count >= 1 / (1 - _LOSS_DECAY)) & (mean < progress.least)
    watched = progress._replace(
        loss=mean,
        level=averaged(progress.level, loss, count, jnp.float32(_LEVEL_DECAY)),
        last=loss,
        spread=spread,
        least=jnp.where(lower, mean, progress.least),
        least_spread=jnp.where(lower, spread, progress.least_spread),
        losses=count + 1,
    )
    usable = jnp.isfinite(loss) & jnp.isfinite(mean) & jnp.isfinite(spread)
    return jax.tree.map(lambda new, old: jnp.where(usable, new, old), watched, progress)


def look(
    progress: Progress,
    seen: Look,
    preconditioned: jax.Array,
    finding: jax.Array,
    loss: jax.Array,
) -> Progress:
    """Averages in one look, each part bounded by a few times the average so far.

    Args:
      progress: the averages.
      seen: the look.
      preconditioned: as the function of that name gives it.
      finding: whether the rates are still to be found.
      loss: of the look.
    """
    count, decay = progress.looks, decay_of(finding)
    unit = jnp.maximum(seen.rate, _TINY)

    def joined(before: Averages, by: jax.Array) -> Averages:
        same, slope = seen.same / unit / by, seen.slope / unit / by
        curvature = seen.curvature / unit**2 / by
        size = jnp.maximum(jnp.where(count < 1, same, before.same_slope), _TINY)
        slow = jnp.maximum(decay, _SLOPE_DECAY)
        curvature = jnp.clip(curvature, -2 * size / unit, 4 * size / unit)
        return Averages(
            same_slope=averaged(before.same_slope, jnp.clip(same, -size, 3 * size), count, slow),
            start_slope=averaged(
                before.start_slope, jnp.clip(slope, -3 * size, 3 * size), count, slow
            ),
            curve=averaged(before.curve, curvature, count, decay),
        )

    least = _LEAST_SIZE * jnp.maximum(jnp.abs(progress.loss), jnp.abs(seen.same))
    size = jnp.maximum(jnp.maximum(jnp.abs(loss), least), _TINY)
    return progress._replace(
        absolute=joined(progress.absolute, jnp.float32(1)),
        relative=joined(progress.relative, size),
        size=size,
        looks=count + 1,
        preconditioned=averaged(
            progress.preconditioned, preconditioned, count, jnp.float32(_SLOPE_DECAY)
        ),
    )


class Ratios(NamedTuple):
    """q by the averages, and by the last look alone."""

    average: jax.Array
    present: jax.Array


def ratios(averages: Averages, seen: Look, size: jax.Array, peak: jax.Array) -> Ratios:
    """The ratio q = C/F: the length of a step, in steps to the minimum of its parabola.

    F is averaged in both, since one slope is noise, and counts as a tenth of S at least. While a
    schedule warms up, the step is that at the schedule's peak.

    Args:
      averages: of looks.
      seen: the last of them.
      size: what it was divided by in these averages.
      peak: the largest factor of the schedule so far.
    """
    share = jnp.maximum(
        averages.start_slope, _LEAST_SHARE * jnp.maximum(averages.same_slope, _TINY)
    )
    present = seen.curvature / jnp.maximum(seen.rate * size, _TINY) / share
    average = averages.curve * seen.rate / share
    peak = jnp.where(peak > 0, peak, 1)  # a schedule may begin at zero
    most = 1e6  # slopes that cancel leave a share of nothing
    return Ratios(jnp.clip(average / peak, -most, most), jnp.clip(present / peak, -most, most))


def goal_for(
    goal: float, preconditioned_goal: float, averages: Averages, preconditioned: jax.Array
) -> jax.Array:
    """The goal of q: less for preconditioned directions, and far less where they hold noise.

    A running sum of gradients shrinks as they do, and bears rates up to break-even. A direction
    that weighs coordinates by the size of their gradients stays as long as it was, more and more of
    it noise. The share of noise in the slope is ν = 1 − F/S: S is the slope on the batch that made
    the step, F that on the next batch.
    """
    noise = jnp.clip(1 - averages.start_slope / jnp.maximum(averages.same_slope, _TINY), 0, 1)
    lower = preconditioned_goal * (1 - _NOISE * noise)
    return goal + (lower - goal) * preconditioned


def _heeded(ratio: Ratios, most: jax.Array) -> jax.Array:
    """The averaged ratio, or that of the last look where it is larger, up to `most`.

    On a plateau averages lag behind the curvature at its end. After a death the loss is flat, and
    a low average alone must not raise the rates.
    """
    return jnp.maximum(ratio.average, jnp.minimum(ratio.present, most))


def _wanted(ratio: jax.Array, goal: jax.Array) -> jax.Array:
    return jnp.where(ratio > 0, jnp.log(goal / jnp.maximum(ratio, 1e-6)), 2.0)


def find(ratio: Ratios, goal: jax.Array) -> jax.Array:
    """The logarithm of what the rates are multiplied by while they are found."""
    wanted = _wanted(_heeded(ratio, _HEED * goal), goal)
    return jnp.clip(wanted, math.log(_FALL), math.log(_GROWTH))


def keep(
    ratio: Ratios,
    goal: jax.Array,
    factor: jax.Array,
    refreshes: jax.Array,
    preconditioned: jax.Array,
) -> jax.Array:
    """The logarithm of what the rates are multiplied by once they are found.

    Steps of Adam and Lion do not shrink with the gradient. Where the loss flattens, their ratio
    falls, and a larger rate would meet its goal for a while; in a transformer it ruins the weights
    for the rest of the run, and no loss of the time says so. Their rates do not rise any more.

    Args:
      ratio: q.
      goal: of q.
      factor: of the schedule.
      refreshes: since the rates were found.
      preconditioned: from 0, SGD and momentum, to 1, Adam and Lion.
    """
    wanted, weight = _wanted(_heeded(ratio, goal), goal), factor**4
    slow = jnp.clip(wanted, math.log(_FALL), math.log(_RISE)) / (1 + refreshes / _PATIENCE)
    fast = jnp.clip(wanted - _TOO_LOW, 0, math.log(_RISE))
    change = weight * jnp.maximum(slow, fast)
    return jnp.where(change > 0, (1 - preconditioned) * change, change)


class Verdict(NamedTuple):
    """The guard's cut and its memory: () each.

    Attributes:
      cut: the logarithm of what the rates are multiplied by, 0 unless it steps in; above 0 where
        it takes a cut back.
      progress: the averages with the ceiling and the least loss that it leaves.
    """

    cut: jax.Array
    progress: Progress


def alarmed(progress: Progress, loss: jax.Array) -> jax.Array:
    """Whether a loss lies so far above the running one that the rates have to be looked at now."""
    error = _ALARM * jnp.sqrt(progress.spread)
    above = loss - progress.loss > jnp.maximum(_JUMP * jnp.abs(progress.loss), error)
    return above & (progress.losses >= _ALARM)


def leaps(progress: Progress, descent: jax.Array, rate: jax.Array) -> jax.Array:
    """Whether the coming step is so much longer than those before that it has to be looked at now.

    By its slope it would win many times what steps win on average, and more than the whole loss.
    Where a plateau ends, gradients grow from step to step, and one step of a rate that has grown on
    the plateau can end a run.

    Args:
      progress: the averages.
      descent: by how much the step lowers the loss by its slope.
      rate: the joint rate of the step, schedule included.
    """
    most = jnp.maximum(_LEAP * _usual(progress, rate), jnp.abs(progress.loss))
    return (descent > most) & (progress.looks > 0)


def _usual(progress: Progress, rate: jax.Array) -> jax.Array:
    """By how much a step at this joint rate lowers the loss by its slope, on average."""
    return jnp.maximum(progress.relative.same_slope, 0) * progress.size * rate


def shortened(
    progress: Progress, ahead: jax.Array, descent: jax.Array, loss: jax.Array
) -> jax.Array:
    """The part of the coming step to take: all of it, unless it raises the loss by more than 30 %.

    Or raises it at all, where by its slope it should have won the whole loss: the loss of a model
    that guesses may lie less than 30 % above. Then the part that leads to the minimum of the
    parabola through its slope and the loss at its end, within a tenth and a half; a tenth if that
    loss is not finite.

    Args:
      progress: the averages.
      ahead: by how much the step raises the loss.
      descent: by how much it lowers the loss by its slope.
      loss: where it begins.
    """
    curve = 2 * (ahead + descent)
    best = jnp.clip(descent / jnp.where(curve > 0, curve, 1), _SHORTEST, _FALL)
    size = _size(progress, loss)
    harms = (ahead > _JUMP * size) | ((ahead > 0) & (descent > size))
    part = jnp.where(harms, best, 1.0)
    return jnp.where(jnp.isfinite(ahead), part, _SHORTEST)


def _size(progress: Progress, loss: jax.Array) -> jax.Array:
    """The loss by which a rise is judged: that of this batch or the running one, the larger."""
    return jnp.maximum(jnp.abs(loss), jnp.abs(progress.loss))


def guard(
    progress: Progress, behind: jax.Array, part: jax.Array, loss: jax.Array, rate: jax.Array
) -> Verdict:
    """Keeps a run from its death, by its steps and by its running loss.

    The rates are cut to the part of the coming step that may be taken; by half at least, where the
    last step has raised the loss by more than 30 % on a batch that it has not seen, or where the
    running loss of such batches strays above its least. Then the rates never rise above that again,
    and the running loss begins anew: while it still catches up with a loss that has risen, it would
    call for one cut after the other.

    It strays by 2.5 standard errors and, after n refreshes, by ln(1 + (n/60)²) more: the longer a
    run, the further the least lies below the mean by chance alone, and a loss that has come to rest
    would halve the rates every hundred steps.

    Cuts after which a slower running loss is level with that before them, seventy losses later and
    within two standard errors, were made by chance, and are taken back. A run that dies ends
    higher.

    Args:
      progress: the averages.
      behind: by how much the last step has raised the loss.
      part: of the coming step, that may be taken.
      loss: between them.
      rate: the joint rate, without the schedule.
    """
    strays = _strays(progress)
    # A loss may be zero whatever the step does to it: then by what the step should have won.
    size = jnp.maximum(_size(progress, loss), _usual(progress, rate))
    harmed = (behind > _JUMP * size) | strays
    kept = jnp.where(harmed, jnp.minimum(part, _FALL), part)
    progress, raised = _judged(progress, ~harmed & (part >= 1))
    cut = _on_trial(progress, rate * _FALL)
    progress = jax.tree.map(partial(jnp.where, strays), cut, progress)
    return Verdict(jnp.log(kept) + raised, forget_losses(progress, strays))


def _strays(progress: Progress) -> jax.Array:
    """Whether the running loss lies too far above its least."""
    error = jnp.sqrt(progress.least_spread * (1 - _LOSS_DECAY) / (1 + _LOSS_DECAY))
    limit = _STRAY + jnp.log1p((progress.held / _STRAY_PATIENCE) ** 2)
    return progress.loss - progress.least > limit * error


def _on_trial(progress: Progress, rate: jax.Array) -> Progress:
    """After a cut to this joint rate: its ceiling, and one cut more on trial.

    Without a trial yet, the loss now is what it will be judged by, if that is known well enough.
    """
    begins = jnp.isinf(progress.before) & (progress.losses >= _TRIAL)
    before = jnp.where(begins, progress.level, progress.before)
    return progress._replace(
        ceiling=jnp.minimum(rate, progress.ceiling),
        before=before,
        on_trial=progress.on_trial + jnp.isfinite(before).astype(jnp.float32),
    )


def _judged(progress: Progress, is_calm: jax.Array) -> tuple[Progress, jax.Array]:
    """Ends a trial that has lasted; and the logarithm by which the rates rise again, 0 or more."""
    due = jnp.isfinite(progress.before) & (progress.losses >= _TRIAL)
    error = jnp.sqrt(2 * progress.spread / _TRIAL)
    is_level = jnp.abs(progress.level - progress.before) < _SAME_LEVEL * error
    raised = jnp.where(due & is_level & is_calm, -math.log(_FALL) * progress.on_trial, 0.0)
    return progress._replace(
        ceiling=progress.ceiling * jnp.exp(raised),
        before=jnp.where(due, jnp.inf, progress.before),
        on_trial=jnp.where(due, 0.0, progress.on_trial),
    ), raised


def split(
    rates: jax.Array,
    slope: jax.Array,
    curvature: jax.Array,
    usable: jax.Array,
    initial: jax.Array,
    max_split: float,
) -> jax.Array:
    """Moves the groups a little towards equal ratios q_k, their joint rate unchanged: (K,) rates.

    log η_k += 0.15 log(q/q_k), less its mean, and within a factor `max_split` of the proportions
    that the rates began with. Here q_k = C_k/S_k, by slopes on the batch that made the direction:
    of plain SGD that is η_k times the curvature along the gradient, what the group can bear. By
    slopes of another batch, a group that has come far gets ever smaller rates, and stays behind
    when the others have come as far.

    Args:
      rates: η, (K,).
      slope: S_k, (K,), loss per unit of the group's rate, on the batch that made the direction.
      curvature: (Aη)_k/η_k, (K,).
      usable: (K,) bool, the groups whose numbers can be trusted.
      initial: (K,), in proportion to the rates at the beginning.
      max_split: the largest factor.
    """
    gain, cost = rates * slope, rates**2 * curvature
    usable &= (gain > 0) & (cost > 0)
    gain, cost = jnp.where(usable, gain, 0), jnp.where(usable, cost, 0)
    whole = jnp.sum(cost) / jnp.maximum(jnp.sum(gain), _TINY)
    each = cost / jnp.where(usable, gain, 1)
    wanted = jnp.where(usable, jnp.log(whole / jnp.where(usable, each, 1)), 0)
    moved = jnp.log(rates / initial) + _SPLIT_STEP * jnp.clip(wanted, -1, 1)
    moved -= jnp.mean(moved)
    widest = jnp.max(jnp.abs(moved))
    limit = math.log(max_split)
    moved *= jnp.where(widest > limit, limit / jnp.where(widest > 0, widest, 1), 1.0)
    shape = initial * jnp.exp(moved)
    return jnp.where(jnp.sum(usable) > 1, shape * joint(rates) / joint(shape), rates)


@dataclasses.dataclass(frozen=True)
class Hold:
    """The solver made by `hold`.

    Attributes:
      goal: of the ratio, for running sums of gradients.
      preconditioned_goal: of the ratio, for all other directions.
      split_interval: refreshes from one measurement of the single groups to the next.
      max_split: how far a group's rate may move away from the joint one.
      widen_after: half the intervals after which they become longer.
    """

    goal: float
    preconditioned_goal: float
    split_interval: int
    max_split: float
    widen_after: float

    def change(
        self,
        progress: Progress,
        seen: Look,
        factor: jax.Array,
        finding: jax.Array,
    ) -> tuple[jax.Array, Progress]:
        """The logarithm of what the rates are multiplied by, before the guard.

        Args:
          progress: with this look in it.
          seen: the look.
          factor: of the schedule.
          finding: whether the rates are still to be found.
        """
        pick = partial(jnp.where, finding)
        used = jax.tree.map(pick, progress.absolute, progress.relative)
        ratio = ratios(used, seen, pick(1.0, progress.size), progress.peak)
        goal = goal_for(self.goal, self.preconditioned_goal, used, progress.preconditioned)
        kept = keep(ratio, goal, factor, progress.held, progress.preconditioned)
        change = jnp.where(finding, find(ratio, goal), kept)
        return change, progress._replace(
            ratio=ratio.average,
            goal=goal,
            held=progress.held + (~finding).astype(jnp.float32),
        )


def hold(
    goal: float = 2.0,
    preconditioned_goal: float = 1.3,
    split_interval: int = 4,
    max_split: float = 3.0,
    widen_after: float = 50,
) -> Hold:
    """Find the peak of the rates in the first steps, then hold it: the default.

    The rates move until the ratio q = C/F of the last step meets its goal: C the curvature along
    it, F the slope at its start, both by one forward pass on a batch that the step has not seen. q
    is 1 where the step leads to the minimum of the loss, 2 where it wins nothing. Tuned runs peak
    between. Directions that do not shrink with the gradient (Adam, Lion) have a lower goal than
    those that do (SGD, momentum), and once they are found their rates only fall. The groups share
    one joint rate, and move away from it slowly, until their steps go equally far for their
    curvatures.

    Args:
      goal: of q where the direction is a running sum of gradients (SGD, momentum), > 0.
      preconditioned_goal: of q for all others, > 0; lowered further by noise.
      split_interval: refreshes from one measurement of the single groups to the next, ≥ 1.
      max_split: the largest factor between a group's rate and the joint one, ≥ 1. 1: one rate.
      widen_after: a whole number N ≥ 1. After 2N intervals of `update_interval` > 1 the next N are
        twice as long, after 4N four times, and so on, since the rates move ever less: a refresh of
        every ten steps costs a run of 100,000 a twentieth of what it does at first. `math.inf`:
        never.

    Returns:
      A solver, for `hidlr(..., solver=...)`.

    Raises:
      ValueError: an argument lies outside its range.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.hold(max_split=1.0)
      Hold(goal=2.0, preconditioned_goal=1.3, split_interval=4, max_split=1.0, widen_after=50)
    """
    for name, value in (("goal", goal), ("preconditioned_goal", preconditioned_goal)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    if split_interval < 1 or split_interval != int(split_interval):
        raise ValueError(f"split_interval must be a whole number >= 1, got {split_interval}")
    if not 1 <= max_split < math.inf:
        raise ValueError(f"max_split must be finite and >= 1, got {max_split}")
    if widen_after != math.inf and not (widen_after >= 1 and widen_after == int(widen_after)):
        raise ValueError(f"widen_after must be a whole number >= 1 or inf, got {widen_after}")
    return Hold(goal, preconditioned_goal, split_interval, max_split, widen_after)
