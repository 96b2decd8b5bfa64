"""The joint rate: the ratio of the last step, its goal, and the one line that moves the rate.

The ratio q = C/F says how far a step went along its parabola: 1 to the minimum of the loss, 2 to
where nothing is won. Runs with tuned rates peak between, so the joint rate x moves until q meets
its goal:

    log x ← log x + weight · clip(log(goal / q), log ½, log 1.2)

The weight is 1 while the rate is found. At the n-th refresh after that it is f⁴ / (1 + n/4), f the
factor of the schedule: ever less, as in a stochastic approximation. The rate of a direction that
does not shrink with the gradient (Adam and Lion with momentum) only falls then.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._rule.measure import TINY, Look, Products

FIND, HOLD = 0.8, 0.95  # memory of the averages while the rate is found, and later
GROW, FALL = 1.2, 0.5  # the most by which one look moves the rate
PATIENCE = 4.0  # refreshes after which a look moves it half as much
GOAL, MOMENTUM_GOAL = 2.0, 1.3  # of q: without momentum, and with it
NOISE = 0.8  # the part of the latter that a slope that is all noise takes away
HEED = 1.5  # times the goal: as much as one look alone may say while the rate is found
TENTH = 0.1  # the least part of S that F is taken for; 1 − cosine of a normalised direction
START = 0.03  # of the loss: what the first step wins by its slope


class Averages(NamedTuple):
    """Over looks: () float32 each.

    Attributes:
      fresh: F per unit of the joint rate; relative to the loss once the rates are found.
      curve: C per unit of it squared, likewise.
      normalised: from 0, where the direction is a sum of gradients, to 1, where it weighs them.
      carried: the part of a direction that the next one carries on, 0 without momentum.
    """

    fresh: Any
    curve: Any
    normalised: Any
    carried: Any

    def scaled(self, fresh: jax.Array, curve: jax.Array) -> "Averages":
        """The same with slope and curvature multiplied."""
        return self._replace(fresh=self.fresh * fresh, curve=self.curve * curve)


def newest(count: jax.Array, memory: Any) -> jax.Array:
    """Weight of the next value in an average: of the plain mean at first, then a moving one, ()."""
    return jnp.maximum(1 / (count.astype(jnp.float32) + 1), 1 - memory)


def average(mean: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """The average with a new value, whose weight is that of `newest`."""
    return mean + weight * (new - mean)


def kind(products: Products) -> tuple[jax.Array, jax.Array]:
    """Whether the direction is normalised, and the part of the last one carried on: () each.

    The least-squares fit of u/‖u‖ by v/‖v‖, beside g/‖g‖, carries κ of v on. The rest is −g for
    SGD, with momentum or without. Adam and Lion weigh coordinates, which turns the rest away.
    """
    p = products.whole()

    def cosine(inner: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        norm = jnp.sqrt(a) * jnp.sqrt(b)
        return inner / jnp.where(norm > 0, norm, 1)

    ahead = cosine(p.uv, p.uu, p.vv)
    down, across = cosine(p.ug, p.uu, p.gg), cosine(p.vg, p.vv, p.gg)
    carried = (ahead - down * across) / (1 - across**2 + 1e-5)
    rest = jnp.sqrt(jnp.maximum(1 - 2 * carried * ahead + carried**2, 0) + 1e-7)
    straight = (carried * across - down) / rest
    # Half of the last direction is momentum in full.
    return jnp.clip((1 - straight) / TENTH, 0, 1), jnp.clip(2 * carried, 0, 1)


def first(
    value: jax.Array, slope: jax.Array, log_shape: jax.Array, products: Products
) -> jax.Array:
    """Logarithm of the joint rate to begin with, (): the step wins 0.03 of the loss by its slope.

    But it is no longer than the parameters, where these are not zero: a plateau has no slope. A
    loss of zero has nothing to win, and the step is 0.03 of the length of the parameters.

    Args:
      value: the loss.
      slope: S, (K,).
      log_shape: the proportions, (K,).
      products: of this call.
    """
    shape = jnp.exp(log_shape)
    moves = (products.uu > 0) & (products.ww > 0)
    lengths = jnp.sqrt(products.ww / jnp.where(moves, products.uu, 1)) / shape
    longest = jnp.max(jnp.where(moves, lengths, 0))
    rate = START * jnp.abs(value) / jnp.abs(shape @ slope)
    rate = jnp.where(longest > 0, jnp.minimum(rate, longest), rate)
    known = jnp.isfinite(rate) & (rate > 0)
    fallback = jnp.where(longest > 0, START * longest, START)
    return jnp.log(jnp.where(known, rate, fallback))


def include(
    mean: Averages, seen: Look, size: jax.Array, bound: jax.Array, weight: jax.Array
) -> Averages:
    """The averages with one look, whose numbers are bounded by what slopes have been.

    Args:
      mean: the averages; of their last two, those with this look.
      seen: the look.
      size: the loss that it is relative to.
      bound: a slope that is usual, relative to that, per unit of the joint rate.
      weight: of the look in the averages.
    """
    unit = jnp.maximum(seen.unit, TINY)
    fresh = jnp.clip(seen.start_slope / unit / size, -3 * bound, 3 * bound)
    curve = seen.curvature / unit**2 / size
    curve = jnp.clip(curve, -2 * bound / unit, 4 * bound / unit)
    return mean._replace(
        fresh=average(mean.fresh, fresh, weight),
        curve=average(mean.curve, curve, weight),
    )


def goal(mean: Averages, same: jax.Array, finding: jax.Array) -> jax.Array:
    """The goal of q: 2, and with momentum 1.3 or less.

    A step with momentum is followed by more along it. Noise lowers its goal while the rate is
    found: the part 1 − F/S of the slope S on the batch that made the direction, which the next
    batch does not confirm.
    """
    noise = jnp.where(finding, jnp.clip(1 - mean.fresh / jnp.maximum(same, TINY), 0, 1), 0)
    lower = MOMENTUM_GOAL * (1 - NOISE * noise * mean.carried)
    return GOAL + (lower - GOAL) * mean.carried


def change(
    mean: Averages,
    newest: jax.Array,
    same: jax.Array,
    rate: jax.Array,
    factor: jax.Array,
    finding: jax.Array,
    held: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The logarithm of what the joint rate is multiplied by, and whether q is near its goal: ().

    Args:
      mean: with the newest look in it.
      newest: C of this look, in the unit of `mean.curve`.
      same: S, in the unit of `mean.fresh`.
      rate: the joint rate for which q is wanted.
      factor: of the schedule.
      finding: whether the rate is still to be found.
      held: refreshes since it was found.
    """
    share = jnp.maximum(mean.fresh, TENTH * jnp.maximum(same, TINY))
    wanted = goal(mean, same, finding)
    heeded = jnp.minimum(newest * rate / share, jnp.where(finding, HEED, 1.0) * wanted)
    ratio = jnp.maximum(mean.curve * rate / share, heeded)
    weight = jnp.where(finding, 1.0, factor**4 / (1 + held / PATIENCE))
    towards = jnp.log(wanted / jnp.maximum(ratio, TINY))
    rises = ~finding & (towards > 0)
    weight *= jnp.where(rises, 1 - mean.normalised * mean.carried, 1.0)
    return weight * jnp.clip(towards, math.log(FALL), math.log(GROW)), towards < -math.log(FALL)
