"""The proportions of the groups: how far each may go compared with the others.

Along a step, group k has the cost c_k = η_k (Aη)_k and the gain s_k = η_k S_k. The proportions move
until all groups have the same

    cost c_k           for normalised directions (Adam, Lion), which do not shrink
    ratio c_k / s_k    for sums of gradients (SGD, momentum)

and between for what lies between. Both follow the units. Measure the parameters of a group in a
thousandth, and its rate becomes a thousand times larger for Adam, a million times for SGD. A group
that is not coupled has c = η²a, so its rate is in proportion to 1/√a or to S/a after one look.
Coupled groups get there in a few, as in Ruiz scaling ("A scaling algorithm to equilibrate both rows
and columns norms in matrices", 2001).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._rule.measure import TINY, Look
from hidlr_optax._rule.rate import FIND, average, newest

COUPLED = 4 / 3  # power of the costs: between that of groups alone, 1, and of coupled ones, 2
DOUBT = 1000.0  # times the prior, of a group that is not confirmed
PRIOR = 1.1  # logarithm of a unit that is half believed: smaller ones are noise


class Groupwise(NamedTuple):
    """Averages over looks, (K,) each. One group alone has no proportions, and the gain alone.

    Attributes:
      gain: size of S_k, loss per unit learning rate. Its sign changes where momentum swings
        through a minimum.
      fresh_slope: F_k, the slope on the next batch.
      cost: size of (Aη)_k per unit of the joint rate.
      row: the same with its sign.
    """

    gain: Any
    fresh_slope: Any
    cost: Any
    row: Any

    @staticmethod
    def of(*fields: jax.Array) -> "Groupwise":
        """The fields that are needed."""
        return Groupwise(fields[0], None, None, None) if len(fields[0]) == 1 else Groupwise(*fields)

    def is_steady(self) -> jax.Array:
        """Whether looks agree on a half of the slope or of the row, (K,) bool."""
        return (2 * self.fresh_slope > self.gain) | (2 * jnp.abs(self.row) > self.cost)


def include(mean: Groupwise, seen: Look, slope: jax.Array, count: jax.Array) -> Groupwise:
    """The averages with one look; after the first three, one of ten times the average at most."""
    row = seen.rows / jnp.maximum(seen.unit, TINY)
    weight = newest(count, FIND)
    new = Groupwise.of(jnp.abs(slope), seen.slope + seen.rows, jnp.abs(row), row)

    def joined(old: jax.Array, x: jax.Array) -> jax.Array:
        most = jnp.where((count < 3) | (old == 0), jnp.inf, 10 * jnp.abs(old))
        return average(old, jnp.clip(x, -most, most), weight)

    return jax.tree.map(joined, mean, new)


def believed(proportion: jax.Array, prior: Any) -> jax.Array:
    """Large differences as they are, small ones hardly: T⁵ / (T⁴ + p⁴), p the `prior`."""
    fourth = proportion**4
    return proportion * fourth / (fourth + prior**4)


def target(
    mean: Groupwise,
    log_shape: jax.Array,
    asked: jax.Array,
    normalised: jax.Array,
    is_seen: jax.Array,
) -> jax.Array:
    """The logarithms of the proportions to move to, (K,): those asked for where none are known.

    Differences are those from the median group, since most groups share one rate.

    Args:
      mean: of the groups.
      log_shape: the logarithms of the present proportions, (K,).
      asked: those that small differences fall back to, (K,).
      normalised: of the direction, from 0 to 1.
      is_seen: whether the loss shows what each group has done, (K,).
    """
    gain, cost = mean.gain, mean.cost
    known = (gain > 0) & (cost > 0) & jnp.isfinite(gain) & jnp.isfinite(cost)
    gain, cost = (log_shape + jnp.log(jnp.where(known, x, 1)) for x in (gain, cost))
    sums = 1 - normalised
    apart = log_shape + sums * gain - COUPLED * (1 + sums) / 2 * cost - asked
    confirmed = known & is_seen & mean.is_steady()
    middle = jnp.nan_to_num(jnp.nanmedian(jnp.where(confirmed, apart, jnp.nan)))
    prior = PRIOR * (1 + sums) * jnp.where(confirmed, 1, DOUBT)
    return asked + believed(jnp.where(known, apart - middle, 0), prior)


def change(
    mean: Groupwise,
    log_shape: jax.Array,
    asked: jax.Array,
    normalised: jax.Array,
    is_seen: jax.Array,
    weight: jax.Array,
    most: jax.Array,
) -> jax.Array:
    """The logarithms of what the proportions are multiplied by, (K,); their mean is zero.

    Args:
      mean: of the groups, as the next four as in `target`.
      log_shape: likewise.
      asked: likewise.
      normalised: likewise.
      is_seen: likewise.
      weight: the part of the way to go.
      most: the logarithm by which one look moves a proportion at most.
    """
    away = target(mean, log_shape, asked, normalised, is_seen) - log_shape
    moved = weight * jnp.clip(away - jnp.mean(away), -most, most)
    return moved - jnp.mean(moved)


def effect(mean: Groupwise, log_shape: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By what this move of the proportions multiplies S and C of the joint step: () each."""

    def quotient(part: jax.Array, power: int) -> jax.Array:
        before, after = jnp.sum(part), part @ jnp.exp(power * moved)
        usable = (before > 0) & (after > 0)
        return jnp.where(usable, after / jnp.where(usable, before, 1), 1.0)

    shape = jnp.exp(log_shape)
    return quotient(shape * mean.gain, 1), quotient(shape * mean.cost, 2)
