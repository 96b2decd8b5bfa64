"""Metrics and influence: the state as flat scalars, and what each group is worth over a run.

The paper ranks groups by influence summed over training. One refresh says little: `start`,
`accumulate` at every step, `summarise` at the end.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hidlr_optax._state import HiDLRState
from hidlr_optax.influence._moments import LIMB, Moments, Running, count, start
from hidlr_optax.influence._report import GroupInfluence, Influence

__all__ = [
    "GroupInfluence",
    "Influence",
    "Moments",
    "Running",
    "accumulate",
    "find_state",
    "metrics",
    "start",
    "summarise",
]


_TOTALS = (
    "refreshes",
    "cuts",
    "ascents",
    "value_mismatches",
    "gradient_mismatches",
    "step_mismatches",
    "loss_noise",
)


def _is_state(node: Any) -> bool:
    return isinstance(node, HiDLRState)


def _array(leaf: Any) -> jax.Array:
    """The array of a leaf that nnx.Optimizer may have wrapped in a Variable."""
    return jax.tree.leaves(leaf)[0]


def find_state(opt_state: Any) -> HiDLRState:
    """The one `HiDLRState` in an optimizer state, at any depth.

    Args:
      opt_state: of anything that contains `hidlr`, as for `metrics`.

    Returns:
      The state itself, not a copy.

    Raises:
      ValueError: there is none, or there are several.

    Example:
      >>> import jax.numpy as jnp, optax, hidlr_optax as hd
      >>> state = optax.chain(optax.sgd(1.0), hd.hiulr(None)).init({"w": jnp.zeros(3)})
      >>> int(hd.influence.find_state(state).refreshes)
      0
    """
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
    if len(states) != 1:
        raise ValueError(
            f"expected one HiDLRState in the optimizer state, found {len(states)}; pass the state "
            "of a chain that holds one hidlr, or one of the states themselves"
        )
    return states[0]


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Rates, slopes, curvatures and influences as a flat dict of () arrays; works inside jit.

    The arrays are the caller's own: they outlive a state that is donated to the next step.

    Args:
      opt_state: the state of `hidlr` or of anything that contains it: a chain, `MultiSteps`,
        `inject_hyperparams`, `nnx.Optimizer.opt_state`, ….

    Returns:
      For each label: `learning_rate/…` (as applied at the last update, schedule included; without
      it, `optax.tree.get(opt_state, "group_learning_rates")`),
      `slope/…` (b, loss per unit learning rate), `curvature/…` (a, loss per unit learning rate
      squared), `ppi/…` (influence per parameter, b²/(a d), loss per parameter; `influence/…` is the
      same under its former name) and `kept/…` (a `Kept`: 0 where the last refresh set a new rate,
      else the reason why not). Beside them `refreshes`; `cuts`, how often the guard stepped in; and
      what should stay at 0: `value_mismatches` and `gradient_mismatches`, at how many refreshes
      `value` and `grad` were found not to be those of the probed loss; `step_mismatches`, at how
      many the parameters had not moved by the step that `hidlr` returned; and `ascents`, at how
      many no group's step went downhill: a few are noise. `loss_noise` is the part of the loss that
      is rounding: 1e-6 or less in float32, 1e-4 to 1e-2 where its arithmetic is in bfloat16.
      `explain` says what to do about all of these.

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
        "ppi": state.influence,
        "influence": state.influence,  # the key of before: no number of its own
        "kept": state.kept,
    }
    flat = {f"{field}/{name}": x for field, group in fields.items() for name, x in group.items()}
    totals = {name: getattr(state, name) for name in _TOTALS}
    return {key: jnp.copy(_array(x)) for key, x in (flat | totals).items()}


def _unwrapped(state: HiDLRState) -> HiDLRState:
    """The state's scalars and dicts as bare arrays, without the direction."""

    def bare(field: Any) -> Any:
        if isinstance(field, Mapping):
            return {name: _array(x) for name, x in field.items()}
        return None if field is None else _array(field)

    return HiDLRState(*map(bare, state._replace(progress=None, direction=None)))


def accumulate(running: Running, opt_state: Any) -> Running:
    """Counts the last refresh of `hidlr`, if it has not been counted yet; works inside jit.

    Call it at every step: of several refreshes between two calls, the last one counts. All
    refreshes count alike, and with `warmup` there is one at each of the first steps: in a short run
    the mean is that of the warm-up. For what comes after it, begin to accumulate there. A refresh
    gives each group its total influence b²/a, from what was measured at this refresh alone, where
    the curvature is positive. It also gives its marginal share of the best joint step, what that
    step would lose without the group, from the state's averages: J − J_k, J = ½ bᵀA⁻¹b, with the
    coupling between groups where the estimator measures it (`hessian`, `gauss_newton`), and
    ½ b²/a where not. A is made positive definite where it is not, by drawing the correlations
    between groups towards none as little as that takes.

    A slope that is all noise has b² > 0 too, so the mean total of a group that does nothing is not
    zero: batches as large as can be had make it small. Averaged slopes, and so marginal shares,
    hold less of that noise.

    Args:
      running: from `start`, or from the step before.
      opt_state: the state after `update`, of `hidlr` or of anything that contains it.

    Returns:
      The running counts, of the same structure and types.

    Raises:
      ValueError: there is no `HiDLRState` in the state, or more than one, or its labels are not
        those of `running`.

    Example:
      >>> import jax, jax.numpy as jnp, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return params["x"] ** 2 / 2
      >>> params = {"x": jnp.asarray(3.0)}
      >>> tx = hd.hidlr(loss_fn, "all", slope="gradient")
      >>> running = hd.influence.start("all", params)
      >>> grad = jax.grad(loss_fn)(params, None)
      >>> _, state = tx.update({"x": -grad["x"]}, tx.init(params), params, grad=grad)
      >>> running = jax.jit(hd.influence.accumulate)(running, state)
      >>> found = hd.influence.summarise(running)
      >>> print(f"{found.groups['all'].total:.1f}")  # twice the loss, all of which one step can win
      9.0
    """
    state = _unwrapped(find_state(opt_state))
    names, labels = sorted(running.marginal.count), sorted(state.group_learning_rates)
    if names != labels:
        raise ValueError(
            f"start was given the labels {names}, but the state belongs to {labels}: call "
            "start(labels, params) with the labels and parameters that hidlr has"
        )
    is_new = state.refreshes != running.refreshes
    return jax.lax.cond(is_new, lambda: count(running, state), lambda: running)


def _mean_and_error(moments: Moments, name: str) -> tuple[float | None, float | None]:
    count, mean = int(moments.count[name]), float(moments.mean[name])
    if count == 0:
        return None, None
    if count == 1:
        return mean, None
    error = math.sqrt(float(moments.squares[name]) / (count - 1) / count)
    return mean, error if math.isfinite(error) else None


def summarise(running: Running) -> Influence:
    """Summarises the counts as Python numbers on the host.

    Args:
      running: from `accumulate`.

    Returns:
      An `Influence`. A group is resolved if at least half of the refreshes gave it a number.

    Raises:
      ValueError: no refresh has been counted.

    Example:
      See `accumulate`.
    """
    running = jax.device_get(running)
    refreshes = int(running.counted)
    if refreshes == 0:
        raise ValueError(
            "no refresh has been counted: call running = accumulate(running, opt_state) after "
            "every update of the optimizer, and keep what it returns"
        )

    def group(name: str) -> GroupInfluence:
        first, second = map(int, np.asarray(running.sizes[name]))
        resolved = 2 * int(running.total.count[name]) >= refreshes
        nothing = None, None
        total, total_error = _mean_and_error(running.total, name) if resolved else nothing
        has_share = resolved and name not in running.members
        share, share_error = _mean_and_error(running.marginal, name) if has_share else nothing
        return GroupInfluence(
            size=first * LIMB + second,
            refreshes=refreshes,
            negative=int(running.negative[name]),
            unresolved=int(running.unresolved[name]),
            total=total,
            total_error=total_error,
            marginal=share,
            marginal_error=share_error,
        )

    found = {name: group(name) for name in sorted(running.sizes)}
    joint = {name: found.pop(name) for name in sorted(running.members)}
    return Influence(found, int(running.steps), joint)
