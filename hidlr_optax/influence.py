"""Reading the state: rates, slopes, curvatures and influences as flat scalars for any logger."""

from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax._transform import HiDLRState


def _is_state(node: Any) -> bool:
    return isinstance(node, HiDLRState)


def _array(leaf: Any) -> jax.Array:
    """The array of a leaf that nnx.Optimizer may have wrapped in a Variable."""
    return jax.tree.leaves(leaf)[0]


def find_state(opt_state: Any) -> HiDLRState:
    """The one `HiDLRState` in an optimizer state, at any depth.

    Raises:
      ValueError: there is none, or there are several.
    """
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
    if len(states) != 1:
        raise ValueError(
            f"expected one HiDLRState in the optimizer state, found {len(states)}; pass the state "
            "of a chain that holds one hidlr, or one of the states themselves"
        )
    return states[0]


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """What `hidlr` knows, as a flat dict of () arrays; works inside jit.

    The arrays are the caller's own: they outlive a state that is donated to the next step.

    Args:
      opt_state: the state of `hidlr` or of anything that contains it: a chain, `MultiSteps`,
        `inject_hyperparams`, `nnx.Optimizer.opt_state`, ….

    Returns:
      For each label: `learning_rate/…` (as applied at the last update, schedule included; without
      it, `optax.tree.get(opt_state, "group_learning_rates")`),
      `slope/…` (b, loss per unit learning rate), `curvature/…` (a, loss per unit learning rate
      squared), `influence/…` (PPI, loss per parameter) and `kept/…` (a `Kept`: 0 where the last
      refresh set a new rate, else the reason why not). Beside them `refreshes` and `cuts`, how
      often the guard stepped in.

    Raises:
      ValueError: there is no `HiDLRState` in the state, or more than one.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> state = hd.hidlr(None, "all", init_learning_rate=0.5).init({"w": jnp.zeros(3)})
      >>> float(hd.metrics((state,))["learning_rate/all"])
      0.5
    """
    state = find_state(opt_state)
    fields = {
        "learning_rate": {
            name: rate * state.schedule_factor for name, rate in state.group_learning_rates.items()
        },
        "slope": state.slope,
        "curvature": state.curvature,
        "influence": state.influence,
        "kept": state.kept,
    }
    flat = {f"{field}/{name}": x for field, group in fields.items() for name, x in group.items()}
    totals = {"refreshes": state.refreshes, "cuts": state.cuts}
    return {key: jnp.copy(_array(x)) for key, x in (flat | totals).items()}
