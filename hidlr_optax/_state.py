"""The state of `hidlr`, and where in a run it stands."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from hidlr_optax._groups import Groups

PerGroup = TypeVar("PerGroup")


class HiDLRState(NamedTuple, Generic[PerGroup]):
    """State of `hidlr`: O(K) scalars, per-group ones in dicts keyed by label.

    Inside a refresh, they are (K,) arrays in the order of the sorted labels.

    Attributes:
      count: () int32, updates so far.
      refreshes: () int32, refreshes so far, those that kept the rates included.
      cuts: () int32, how often the guard has cut the rates that a refresh had found.
      ascents: () int32, refreshes at which no group's step went downhill on the batch that made it.
      value_mismatches: () int32, refreshes at which `value` was not the loss at the parameters; the
        first three compare them. Once it is not zero, the loss is evaluated at every refresh.
      gradient_mismatches: () int32, likewise for `grad` and the slope of the loss along the step.
      gradient_factor: () float32, what slopes by `grad` are multiplied by, so that they are those
        of the loss: 1 unless the first refreshes found another.
      loss_noise: () float32, by how much the loss jumps along a step whatever its slope, as a part
        of itself: rounding, measured at the second and third refresh. Where a step changes the loss
        by less, the rates stay (`Kept.UNRESOLVED`).
      step_mismatches: () int32, refreshes before which the parameters had not moved as they were
        told: by less than half of the step that `hidlr` had returned, or more than twice of it.
        With `slope="lagged"`, where one refresh follows another.
      position: () float32, ⟨w, u⟩ at the last refresh, and
      position_count: () int32, `count` after it: what the next one compares with.
      schedule_factor: () float32, the factor of warm-up and schedule at the last update.
      group_learning_rates: η, () float32 each, without the schedule's factor.
      slope: b, () float32 each, loss per unit learning rate, averaged over refreshes.
      curvature: a, () float32 each, loss per unit learning rate squared, averaged.
      influence: the influence per parameter (PPI), b²/(a d), () float32 each, loss per parameter,
        of the last refresh whose curvature was positive; zero before.
      measured_slope: b of the last refresh alone, () float32 each, not averaged; zero where it was
        not finite.
      measured_curvature: a of the last refresh alone, () float32 each, not averaged; zero where it
        was not finite, or too small to be told from none.
      coupling: the curvature between groups, (K, K) float32 in the order of the sorted labels, zero
        on its diagonal, averaged; None where the estimator does not measure it.
      measurements: () int32 each, how many refreshes the averages hold.
      highest_learning_rates: () float32 each, the highest that η has been after a refresh.
      kept: () int32 each, a `Kept`: why the last refresh kept the group's rate, 0 if it did not.
      progress: the averages of the default solver, `hold`; () for other solvers.
      direction: u of the last update, like params, for `slope="lagged"`; () for other slopes.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshes: jax.Array
    cuts: jax.Array
    ascents: jax.Array
    value_mismatches: jax.Array
    gradient_mismatches: jax.Array
    gradient_factor: jax.Array
    loss_noise: jax.Array
    step_mismatches: jax.Array
    position: jax.Array
    position_count: jax.Array
    schedule_factor: jax.Array
    group_learning_rates: PerGroup
    slope: PerGroup
    curvature: PerGroup
    influence: PerGroup
    measured_slope: PerGroup
    measured_curvature: PerGroup
    coupling: Any
    measurements: PerGroup
    highest_learning_rates: PerGroup
    kept: PerGroup
    progress: Any
    direction: Any


Stored = HiDLRState[dict[str, jax.Array]]
Packed = HiDLRState[jax.Array]

_COUNTS = ("measurements", "kept")
_PER_GROUP = (
    "group_learning_rates",
    "slope",
    "curvature",
    "influence",
    "measured_slope",
    "measured_curvature",
    "highest_learning_rates",
    *_COUNTS,
)


def _check_names(state: Stored, groups: Groups) -> None:
    """Raises a ValueError where the state was made, or restored, with other labels."""
    found = sorted(state.group_learning_rates)
    missing = [name for name in groups.names if name not in found]
    unknown = [name for name in found if name not in groups.names]
    if missing or unknown:
        raise ValueError(
            f"the state has the rates of other groups, {found}; the groups of the labels are "
            f"{list(groups.names)}, missing are {missing}, not among them are {unknown}. Restore a "
            "checkpoint with the labels that it was made with, or begin with tx.init(params)"
        )


def pack(state: Stored, groups: Groups) -> Packed:
    """The state with (K,) arrays for the dicts keyed by label."""
    _check_names(state, groups)
    fields: dict[str, Any] = {name: groups.pack(getattr(state, name)) for name in _PER_GROUP}
    return HiDLRState(**state._asdict() | fields)


def unpack(state: Packed, groups: Groups) -> Stored:
    """The state with dicts keyed by label for the (K,) arrays."""
    fields: dict[str, Any] = {name: groups.unpack(getattr(state, name)) for name in _PER_GROUP}
    return HiDLRState(**state._asdict() | fields)


def initial_rates(initial: Any, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """One rate for each name; zero, to be found at the first update, where `initial` is None."""
    if initial is None:
        initial = 0.0
    if not isinstance(initial, Mapping):
        initial = dict.fromkeys(names, initial)
    missing = [name for name in names if name not in initial]
    unknown = [name for name in initial if name not in names]
    if missing or unknown:
        raise ValueError(
            f"init_learning_rate must name every group and no other; the groups are {list(names)}, "
            f"missing are {missing}, not among them are {unknown}"
        )
    # `array`, not `asarray`: a buffer of its own for each leaf, so that the state can be donated.
    return {name: jnp.array(initial[name], jnp.float32) for name in names}


def initial_state(
    names: tuple[str, ...], init_learning_rate: Any, couples: bool, progress: Any, direction: Any
) -> Stored:
    """The state before the first update."""
    per_group = {
        field: {name: jnp.zeros((), kind) for name in names}
        for field in _PER_GROUP
        for kind in [jnp.int32 if field in _COUNTS else jnp.float32]
    }
    return HiDLRState(
        count=jnp.zeros((), jnp.int32),
        refreshes=jnp.zeros((), jnp.int32),
        cuts=jnp.zeros((), jnp.int32),
        ascents=jnp.zeros((), jnp.int32),
        value_mismatches=jnp.zeros((), jnp.int32),
        gradient_mismatches=jnp.zeros((), jnp.int32),
        gradient_factor=jnp.ones((), jnp.float32),
        loss_noise=jnp.zeros((), jnp.float32),
        step_mismatches=jnp.zeros((), jnp.int32),
        position=jnp.zeros((), jnp.float32),
        position_count=jnp.zeros((), jnp.int32),
        schedule_factor=jnp.ones((), jnp.float32),
        **per_group | {"group_learning_rates": initial_rates(init_learning_rate, names)},
        coupling=jnp.zeros((len(names), len(names)), jnp.float32) if couples else None,
        progress=progress,
        direction=direction,
    )


class Clock(NamedTuple):
    """The place of a call of `update` in its run.

    Attributes:
      warmup: () int32, the number of first updates during which the rates are found.
      finding: () bool, whether this is one of them.
      due: () bool, whether there is a refresh.
      allowed: () bool, whether there may be one.
      never: whether that is known to be false when the step is traced.
      factor: () float32, of the schedule.
    """

    warmup: jax.Array
    finding: jax.Array
    due: jax.Array
    allowed: jax.Array
    never: bool
    factor: jax.Array


def widened(count: Any, interval: Any, warmup: Any, after: float) -> Any:
    """The interval at this update, () int32: as it is given, or a power of two times that.

    From twice `after` intervals on, it is doubled whenever the run has become twice as long. Each
    due update of a wider interval is one of the narrower, too, and no state is needed. An interval
    of one is asked for where every step counts, and stays.
    """
    if after == math.inf:
        return interval
    passed = jnp.maximum(count - warmup, 0) // interval
    doublings = 31 - jax.lax.clz(jnp.maximum(passed // int(after), 1))
    return jnp.where(interval > 1, interval << doublings, interval)


def is_due(step: int, update_interval: int = 10, warmup: int = 20, widen_after: float = 50) -> bool:
    """Whether `hidlr` with these arguments may have a refresh at a step, for the loop around it.

    For `refresh=is_due(step)` as a static argument of the jitted step, which makes two programs of
    it, one without a branch. The arguments are those of `hidlr` and `hold`, with their defaults.

    Args:
      step: updates before this one, a Python number: 0 at the first.
      update_interval: Φ.
      warmup: first steps, with a refresh at each.
      widen_after: intervals after which they become longer; `math.inf` for other solvers.

    Returns:
      A Python bool.

    Example:
      >>> import hidlr_optax as hd
      >>> [step for step in range(60) if hd.is_due(step, warmup=3)]
      [0, 1, 2, 10, 20, 30, 40, 50]
      >>> sum(map(hd.is_due, range(100_000)))
      448
    """
    doublings = 0
    if update_interval > 1 and widen_after != math.inf:
        passed = max(step - warmup, 0) // update_interval
        doublings = max(passed // int(widen_after), 1).bit_length() - 1
    return step < warmup or step % (update_interval << doublings) == 0


def clock(
    count: jax.Array,
    update_interval: Any,
    warmup: Any,
    schedule: optax.Schedule | None,
    refresh: Any,
    widen_after: float = math.inf,
) -> Clock:
    """Reads the clock at the update after `count` others."""
    warmup = jnp.asarray(warmup).astype(jnp.int32)
    interval = jnp.asarray(update_interval).astype(jnp.int32)
    interval = widened(count, interval, warmup, widen_after)
    finding = count < warmup
    allowed = jnp.asarray(refresh)
    factor = jnp.asarray(1.0 if schedule is None else schedule(count), jnp.float32)
    due = ((count % interval == 0) | finding) & allowed
    return Clock(warmup, finding, due, allowed, refresh is False, factor)


def where_due(due: jax.Array, found: Callable[[], Any], kept: Any) -> Any:
    """Returns what `found` does where something is due, else what is kept.

    Outside of jit, where `due` is known, nothing is compiled for the branch that is not taken.
    """
    if not isinstance(due, Tracer):
        return found() if due else kept
    try:
        return jax.lax.cond(due, found, lambda: kept)
    except TypeError as error:
        error.add_note(
            "If this is inside shard_map: the loss differs from device to device, and each would "
            "come to its own learning rates. Use jax.lax.pmean on the loss, value and grad."
        )
        raise
