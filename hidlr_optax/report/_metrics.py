"""The state as a flat dict of scalars, for a log."""

from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax.report._find import applied, array, find_state


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Rates, slopes, curvatures and influences as a flat dict of () arrays; works inside jit.

    The arrays are the caller's own: they outlive a state that is donated to the next step.

    Args:
      opt_state: the state of `hidlr` or of anything that contains it: a chain, `MultiSteps`,
        `inject_hyperparams`, `nnx.Optimizer.opt_state`, ….

    Returns:
      For each label: `learning_rate/…` (of the last step, with schedule and guard),
      `unscheduled_rate/…` (without them),
      `slope/…` (b, loss per unit learning rate), `curvature/…` (a, loss per unit learning rate
      squared), `ppi/…` (influence per parameter, b²/(a d), loss per parameter) and `kept/…` (a
      `Kept`: 0 where the last refresh measured what it needs, else the reason why not). Beside them
      `refreshes`; `measured`, how many of these measured each group alone; `cuts`, how often the
      guard stepped in; and `slips`, a `Slip`, which should stay at 0.

    Raises:
      ValueError: there is no `HiDLRState` in the state, or more than one.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> state = hd.hidlr(None, "all").init({"w": jnp.zeros(3)})
      >>> int(hd.metrics((state,))["refreshes"])
      0
    """
    state = find_state(opt_state)
    found = state.diagnostics
    fields = {
        "learning_rate": applied(state),
        "unscheduled_rate": state.group_learning_rates,
        "slope": found.slope,
        "curvature": found.curvature,
        "ppi": found.influence,
        "kept": found.kept,
    }
    flat = {f"{field}/{name}": x for field, group in fields.items() for name, x in group.items()}
    totals = {name: getattr(found, name) for name in ("refreshes", "measured", "cuts", "slips")}
    return {key: jnp.copy(array(x)) for key, x in (flat | totals).items()}
