"""Influence: what each group is worth over a run.

The paper ranks groups by influence summed over training. One refresh says little: `start`,
`accumulate` at every step, `summarise` at the end.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hidlr_optax.influence._moments import LIMB, Moments, Running, State, count, start
from hidlr_optax.influence._report import GroupInfluence, Influence
from hidlr_optax.report._find import array, find_state

__all__ = [
    "GroupInfluence",
    "Influence",
    "Moments",
    "Running",
    "accumulate",
    "start",
    "summarise",
]


def _unwrapped(state: Any) -> State:
    """What is counted of a state, as bare arrays."""
    found = state.diagnostics
    groups = {name: array(leaf) for name, leaf in state.group_learning_rates.items()}
    bare = found._replace(**{field: _bare(leaf) for field, leaf in found._asdict().items()})
    coupling = getattr(state, "coupling", None)
    coupling = None if coupling is None else array(coupling)
    memory = getattr(state, "memory", None)
    loss = jnp.zeros((), jnp.float32) if memory is None else array(memory.loss)
    return State(array(state.count), groups, coupling, bare, loss)


def _bare(field: Any) -> Any:
    if isinstance(field, Mapping):
        return {name: array(leaf) for name, leaf in field.items()}
    return array(field)


def accumulate(running: Running, opt_state: Any) -> Running:
    """Counts the last refresh of `hidlr`, if it has not been counted yet; works inside jit.

    Call it at every step: of several refreshes between two calls, the last one counts. With
    `hidlr` and K > 1, those count that measure the curvature of each group alone: every second one,
    once the rates are found. A refresh
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
      ValueError: there is no `HiDLRState` in the state, or more than one, or that of many runs at
        once, or its labels are not those of `running`.

    Example:
      >>> import jax, jax.numpy as jnp, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return params["x"] ** 2 / 2
      >>> params = {"x": jnp.asarray(3.0)}
      >>> tx = hd.paper.one_step(loss_fn, "all", slope="gradient")
      >>> running = hd.influence.start("all", params)
      >>> grad = jax.grad(loss_fn)(params, None)
      >>> _, state = tx.update({"x": -grad["x"]}, tx.init(params), params, grad=grad)
      >>> running = jax.jit(hd.influence.accumulate)(running, state)
      >>> found = hd.influence.summarise(running)
      >>> print(f"{found.groups['all'].total:.1f}")  # twice the loss, all of which one step can win
      9.0
    """
    state = _unwrapped(find_state(opt_state))
    if np.ndim(state.count):
        raise ValueError(
            f"this state is of {np.shape(state.count)} runs, as vmap makes it: put accumulate, and "
            "start, under the same vmap, and summarise one run, jax.tree.map(lambda leaf: leaf[0], "
            "running)"
        )
    names, labels = sorted(running.marginal.count), sorted(state.group_learning_rates)
    if names != labels:
        raise ValueError(
            f"start was given the labels {names}, but the state belongs to {labels}: call "
            "start(labels, params) with the labels and parameters that hidlr has"
        )
    is_new = state.diagnostics.measured != running.refreshes
    running = jax.lax.cond(is_new, lambda: count(running, state), lambda: running)
    # A copy: inside of jit too, the state may be donated to the next step.
    return running._replace(steps=jnp.copy(state.count))


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
    return Influence(found, int(running.steps), joint, float(running.loss) or None)
