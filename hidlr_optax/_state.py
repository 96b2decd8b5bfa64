"""The state of `hidlr`, and when a refresh is due."""

from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._checks.rates import check_names, initial_rates
from hidlr_optax._diagnostics import Diagnostics, PerGroup
from hidlr_optax._groups import Groups, is_placeholder
from hidlr_optax._rule import hold

WIDEN_AFTER = 25  # intervals; after twice as many, they become longer


class HiDLRState(NamedTuple, Generic[PerGroup]):
    """State of `hidlr`: O(K) scalars, and one direction.

    Attributes:
      count: () int32, updates so far.
      group_learning_rates: η, () float32 each, by label; without schedule and guard.
      applied: (K,) float32, the rates of the last step in the order of the sorted labels, with
        both; 0 where that step took the one before it back.
      memory: a `Memory`, what the rule remembers.
      direction: u of the last update, like params.
      diagnostics: a `Diagnostics`, for a person to read.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    group_learning_rates: PerGroup
    applied: jax.Array
    memory: Any
    direction: Any
    diagnostics: Diagnostics[PerGroup]


Stored = HiDLRState[dict[str, jax.Array]]


def initial_state(params: Any, param_labels: Any, init_learning_rate: Any) -> Stored:
    """The state before the first update."""
    if is_placeholder(params):
        # Which fields are like params: a prefix of the state says it.
        leaf: Any = jnp.zeros(())
        return HiDLRState(leaf, leaf, leaf, leaf, params, leaf)
    names = Groups.of(param_labels, params).names
    return HiDLRState(
        count=jnp.zeros((), jnp.int32),
        group_learning_rates=initial_rates(init_learning_rate, names),
        applied=jnp.zeros(len(names), jnp.float32),
        memory=hold.begin(len(names)),
        direction=optax.tree.zeros_like(params),
        diagnostics=Diagnostics.begin(names),
    )


def pack(state: Stored, groups: Groups) -> hold.State:
    """What the rule reads and writes, (K,) arrays for the dicts keyed by label."""
    check_names(state.group_learning_rates, groups)
    return hold.State(
        rates=groups.pack(state.group_learning_rates),
        applied=state.applied,
        memory=state.memory,
        diagnostics=state.diagnostics.pack(groups),
    )


def unpack(state: hold.State, count: jax.Array, direction: Any, groups: Groups) -> Stored:
    """The state after an update, dicts keyed by label for the (K,) arrays."""
    return HiDLRState(
        count=count,
        group_learning_rates=groups.unpack(state.rates),
        applied=state.applied,
        memory=state.memory,
        direction=direction,
        diagnostics=state.diagnostics.unpack(groups),
    )


def clock(
    count: jax.Array, interval: Any, warmup: Any, schedule: optax.Schedule | None, refresh: Any
) -> hold.Clock:
    """Reads the clock at the update after `count` others.

    Intervals of more than one become longer: from twice `WIDEN_AFTER` on, twice as long whenever
    the run has become twice as long. Each due update of a wider interval is one of the narrower.
    """
    interval = jnp.asarray(interval).astype(jnp.int32)
    passed = count // interval // WIDEN_AFTER
    doublings = 31 - jax.lax.clz(jnp.maximum(passed, 1))
    since = count % jnp.where(interval > 1, interval << doublings, interval)
    return hold.Clock(
        count=count,
        warmup=jnp.asarray(warmup).astype(jnp.float32),  # compared with looks, a float
        due=None if refresh is False else since == 0,
        retry=since < 3,
        allowed=jnp.asarray(refresh),
        factor=jnp.asarray(1.0 if schedule is None else schedule(count), jnp.float32),
    )


def is_due(step: int, update_interval: int = 10, warmup: int = 20) -> bool:
    """Whether `hidlr` with these arguments may have a refresh at a step, for the loop around it.

    For `refresh=is_due(step)` as a static argument of the jitted step, which makes two programs of
    it, one without a branch. A loss that jumps calls for no look where this is False. The arguments
    are those of `hidlr`, with their defaults.

    Args:
      step: updates before this one, a Python number: 0 at the first.
      update_interval: Φ.
      warmup: looks in which the rates are found.

    Returns:
      A Python bool.

    Example:
      >>> import hidlr_optax as hd
      >>> [step for step in range(60) if hd.is_due(step, warmup=3)]
      [0, 1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50]
      >>> sum(map(hd.is_due, range(100_000)))
      276
    """
    doublings = 0
    if update_interval > 1:
        doublings = max(step // update_interval // WIDEN_AFTER, 1).bit_length() - 1
    return step <= 2 * warmup or step % (update_interval << doublings) == 0
