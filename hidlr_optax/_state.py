"""The state of `hidlr`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class HiDLRState(NamedTuple):
    """State of `hidlr`: O(K) scalars, per-group ones in dicts keyed by label.

    Attributes:
      count: () int32, updates so far.
      refreshes: () int32, refreshes so far, those that kept the rates included.
      cuts: () int32, how often the guard has cut the rates that a refresh had found.
      schedule_factor: () float32, the factor of warm-up and schedule at the last update.
      group_learning_rates: η, () float32 each, without the schedule's factor.
      slope: b, () float32 each, loss per unit learning rate, averaged over refreshes.
      curvature: a, () float32 each, loss per unit learning rate squared, averaged.
      influence: PPI, () float32 each, loss per parameter, of the last refresh whose curvature was
        positive; zero before.
      measured_slope: b of the last refresh alone, () float32 each, not averaged; zero where it was
        not finite.
      measured_curvature: a of the last refresh alone, () float32 each, not averaged; zero where it
        was not finite, or too small to be told from none.
      coupling: the curvature between groups, (K, K) float32 in the order of the sorted labels, zero
        on its diagonal, averaged; None where the estimator does not measure it.
      measurements: () int32 each, how many refreshes the averages hold.
      kept: () int32 each, a `Kept`: why the last refresh kept the group's rate, 0 if it did not.
      progress: what the default solver, `hold`, remembers; () for other solvers.
      direction: u of the last update, like params, for `slope="lagged"`; () for other slopes.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshes: jax.Array
    cuts: jax.Array
    schedule_factor: jax.Array
    group_learning_rates: dict[str, jax.Array]
    slope: dict[str, jax.Array]
    curvature: dict[str, jax.Array]
    influence: dict[str, jax.Array]
    measured_slope: dict[str, jax.Array]
    measured_curvature: dict[str, jax.Array]
    coupling: Any
    measurements: dict[str, jax.Array]
    kept: dict[str, jax.Array]
    progress: Any
    direction: Any


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
) -> HiDLRState:
    """Before the first update."""

    def zeros(dtype: Any) -> dict[str, jax.Array]:
        return {name: jnp.zeros((), dtype) for name in names}

    return HiDLRState(
        count=jnp.zeros((), jnp.int32),
        refreshes=jnp.zeros((), jnp.int32),
        cuts=jnp.zeros((), jnp.int32),
        schedule_factor=jnp.ones((), jnp.float32),
        group_learning_rates=initial_rates(init_learning_rate, names),
        slope=zeros(jnp.float32),
        curvature=zeros(jnp.float32),
        influence=zeros(jnp.float32),
        measured_slope=zeros(jnp.float32),
        measured_curvature=zeros(jnp.float32),
        coupling=jnp.zeros((len(names), len(names)), jnp.float32) if couples else None,
        measurements=zeros(jnp.int32),
        kept=zeros(jnp.int32),
        progress=progress,
        direction=direction,
    )
