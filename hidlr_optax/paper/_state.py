"""The state of `one_step`."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._checks.rates import check_names, initial_rates
from hidlr_optax._diagnostics import Diagnostics, PerGroup
from hidlr_optax._groups import Groups, is_placeholder


class OneStepState(NamedTuple, Generic[PerGroup]):
    """State of `one_step`: O(K) scalars, per-group ones in dicts keyed by label.

    Inside a refresh, they are (K,) arrays in the order of the sorted labels.

    Attributes:
      count: () int32, updates so far.
      group_learning_rates: η, () float32 each, without the schedule's factor.
      applied: (K,) float32, the rates of the last step in the order of the sorted labels, times the
        factor of the schedule.
      measurements: () int32 each, how many refreshes the averages of slope and curvature hold.
      coupling: the curvature between groups, (K, K) float32 in the order of the sorted labels, zero
        on its diagonal, averaged; None where the estimator does not measure it.
      direction: u of the last update, like params, for `slope="lagged"`; () for other slopes.
      diagnostics: a `Diagnostics`; the averages of slope and curvature are among them.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    group_learning_rates: PerGroup
    applied: jax.Array
    measurements: PerGroup
    coupling: Any
    direction: Any
    diagnostics: Diagnostics[PerGroup]


Stored = OneStepState[dict[str, jax.Array]]
Packed = OneStepState[jax.Array]


def _each(state: OneStepState[Any], change: Callable[[Any], Any], diagnostics: Any) -> Any:
    return state._replace(
        group_learning_rates=change(state.group_learning_rates),
        measurements=change(state.measurements),
        diagnostics=diagnostics,
    )


def pack(state: Stored, groups: Groups) -> Packed:
    """The state with (K,) arrays for the dicts keyed by label, and without the direction."""
    check_names(state.group_learning_rates, groups)
    return _each(state._replace(direction=()), groups.pack, state.diagnostics.pack(groups))


def unpack(state: Packed, groups: Groups) -> Stored:
    """The state with dicts keyed by label for the (K,) arrays."""
    return _each(state, groups.unpack, state.diagnostics.unpack(groups))


def initial_state(
    params: Any, param_labels: Any, init_learning_rate: Any, couples: bool, looks_back: bool
) -> Stored:
    """The state before the first update."""
    if is_placeholder(params):
        # Which fields are like params: a prefix of the state says it.
        leaf: Any = jnp.zeros(())
        direction = params if looks_back else ()
        return OneStepState(leaf, leaf, leaf, leaf, leaf if couples else None, direction, leaf)
    names = Groups.of(param_labels, params).names
    return OneStepState(
        count=jnp.zeros((), jnp.int32),
        group_learning_rates=initial_rates(init_learning_rate, names),
        applied=jnp.zeros(len(names), jnp.float32),
        measurements={name: jnp.zeros((), jnp.int32) for name in names},
        coupling=jnp.zeros((len(names), len(names)), jnp.float32) if couples else None,
        direction=optax.tree.zeros_like(params) if looks_back else (),
        diagnostics=Diagnostics.begin(names),
    )
