"""The one state with rates in an optimizer state, at any depth."""

from typing import Any

import jax

from hidlr_optax._diagnostics import Diagnostics
from hidlr_optax._paths import nodes


def is_state(node: Any) -> bool:
    """Whether this is the state of a rule that has rates."""
    return isinstance(getattr(node, "diagnostics", None), Diagnostics)


def array(leaf: Any) -> jax.Array:
    """The array of a leaf that nnx.Optimizer may have wrapped in a Variable."""
    return jax.tree.leaves(leaf)[0]


def find_state(opt_state: Any) -> Any:
    """The one `HiDLRState` in an optimizer state, or the one state of `paper.one_step`.

    Args:
      opt_state: of anything that contains `hidlr`, as for `metrics`.

    Returns:
      The state itself, not a copy.

    Raises:
      ValueError: there is none, or there are several.

    Example:
      >>> import jax.numpy as jnp, optax, hidlr_optax as hd
      >>> state = optax.chain(optax.sgd(1.0), hd.hiulr(None)).init({"w": jnp.zeros(3)})
      >>> int(hd.report.find_state(state).count)
      0
    """
    states = nodes(opt_state, is_state)
    if len(states) != 1:
        raise ValueError(
            f"expected one HiDLRState in the optimizer state, found {len(states)}; pass the state "
            "of a chain that holds one hidlr, or one of the states themselves"
        )
    return states[0]


def applied(state: Any) -> dict[str, jax.Array]:
    """The learning rates of the last step by label, schedule and guard included."""
    rates = array(state.applied)
    return {name: rates[..., k] for k, name in enumerate(sorted(state.group_learning_rates))}
