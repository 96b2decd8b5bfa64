"""The state of a run in ten lines of text, for a person."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from hidlr_optax._checks.advice import HIGH_PEAK, LOW_PEAK, OWN_SCHEDULE, has_schedule
from hidlr_optax._diagnostics import Kept, Slip
from hidlr_optax._text import aligned
from hidlr_optax.report._find import applied, array, find_state

_SHOWN = 5  # groups, so that there are ten lines
_FOUND = 20  # refreshes before which a schedule may be warming up
_GUARDED = 0.7  # the factor of the guard below which it is worth a line

_SLIPS = {
    Slip.VALUE: (
        "`value` is not the loss at the parameters (another batch, dropout key or scale?): nothing "
        "can be measured, and the rates stay. Leave `value` out, or pass that of the same function."
    ),
    Slip.STEP: (
        "The parameters did not move by the step that hidlr had returned: its sign or size was "
        "changed, or it was not taken. Put hidlr last in the chain, add its updates as they are, "
        "and hand a schedule to it as schedule=."
    ),
}


class _Run(NamedTuple):
    """Python numbers of a state."""

    updates: int
    refreshes: int
    looks: float
    cuts: int
    slips: Slip
    guard: float
    peak: float
    rates: dict[str, float]
    applied: dict[str, float]
    kept: dict[str, Kept]
    types: frozenset[str]
    has_schedule: bool


def _read(opt_state: Any) -> _Run:
    state = find_state(opt_state)

    def number(leaf: Any) -> Any:
        return array(leaf).item()  # nnx.Optimizer wraps it in a Variable

    def by_label(field: Any) -> dict[str, Any]:
        return {name: number(field[name]) for name in sorted(field)}

    if np.ndim(array(state.count)):
        raise ValueError(
            f"this state is of {np.shape(array(state.count))} runs, as vmap makes it; pass that of "
            "one: jax.tree.map(lambda leaf: leaf[0], state)"
        )
    types = frozenset(str(leaf.dtype) for leaf in jax.tree.leaves(state.direction))
    host = jax.device_get(state._replace(direction=()))
    found, memory = host.diagnostics, getattr(host, "memory", None)
    return _Run(
        updates=number(host.count),
        refreshes=number(found.refreshes),
        looks=number(found.refreshes if memory is None else memory.looks),
        cuts=number(found.cuts),
        slips=Slip(number(found.slips)),
        guard=1.0 if memory is None else number(memory.guard),
        peak=1.0 if memory is None else number(memory.peak),
        rates=by_label(host.group_learning_rates),
        applied=by_label(applied(host)),
        kept={name: Kept(code) for name, code in by_label(found.kept).items()},
        types=types,
        has_schedule=has_schedule(opt_state),
    )


def _table(run: _Run) -> list[str]:
    """The groups by name; of more than are shown, those with most to tell."""
    order = sorted(run.rates, key=lambda name: run.kept[name] == Kept.UPDATED)
    rows = [("group", "learning rate", "at the last step", "")]
    for name in sorted(order[:_SHOWN]):
        numbers = f"{run.rates[name]:.3g}", f"{run.applied[name]:.3g}"
        is_moved = run.kept[name] == Kept.UPDATED and Slip.STEP in run.slips
        rows.append((name, *numbers, f"  {'see below' if is_moved else run.kept[name].message}"))
    more = [f"and {len(order) - _SHOWN} more"] if len(order) > _SHOWN else []
    widest = max(len(row[-1]) for row in rows)
    padded = [(*row[:-1], row[-1].ljust(widest)) for row in rows]
    return [line.rstrip() for line in aligned(padded)] + more


def _statuses(run: _Run) -> str | None:
    kinds = set(run.kept.values()) - {Kept.UPDATED}
    if kinds == {Kept.ASCENDS}:
        return (
            "The step goes uphill on the batch that made it: the direction has the wrong sign, or "
            "none. Use optax.adamw(1.0), or optax.scale(-1.0) after scale_by_adam(), and put hidlr "
            "last in the chain, behind them. A few such refreshes are noise."
        )
    if not kinds:
        return None
    names = [name for name in run.rates if run.kept[name] in kinds]
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return f"The last refresh did not move the rates of {shown}: see above."


def _unresolved(run: _Run) -> str | None:
    if Kept.UNRESOLVED not in run.kept.values():
        return None
    return (
        "The last step changes the loss by less than the loss is rounded to. Converged runs end "
        "so. Otherwise the loss is in half precision (compute it in float32), holds a large "
        "constant (subtract it), or the schedule is near zero."
    )


def _unmeasured(run: _Run) -> str | None:
    if run.looks > 0 or run.refreshes < 3:
        return None
    return (
        f"None of {run.refreshes} refreshes has measured anything: the loss does not change along "
        "the steps by more than its rounding, or it is not finite."
    )


def _eps(run: _Run) -> str | None:
    if "float16" not in run.types or Kept.NON_FINITE not in run.kept.values():
        return None
    return (
        "The parameters are float16, where the eps=1e-8 of Adam is zero, and 0/0 no number: "
        "optax.adamw(1.0, eps=1e-4), or float32 parameters that the loss casts."
    )


def _guarded(run: _Run) -> str | None:
    if run.guard > _GUARDED:
        return None
    return (
        f"The guard holds the steps at {run.guard:.2g} of their rates, since a step raised the "
        "loss by 30 % of itself. It recovers in some hundred steps."
    )


def _schedule(run: _Run) -> str | None:
    if run.has_schedule:
        return OWN_SCHEDULE
    if run.peak > HIGH_PEAK:
        return (
            f"The schedule has been at {run.peak:.3g}: it is a factor, 1 at its peak. Divide it by "
            "its peak."
        )
    if run.refreshes < _FOUND or not 0 < run.peak < LOW_PEAK:
        return None
    return (
        f"The schedule has not been above {run.peak:.2g} yet: it is a factor, 1 at its peak, and "
        "no learning rate."
    )


_FINDINGS: tuple[Callable[[_Run], str | None], ...] = (
    _statuses,
    _unresolved,
    _unmeasured,
    _eps,
    _guarded,
    _schedule,
)


def explain(opt_state: Any) -> str:
    """Says how a run is doing, in about ten lines of text for a person.

    The rate of each group, without schedule and guard and with them, and the status of its last
    refresh; how often the guard stepped in; and what is wrong, where something is: a direction that
    goes uphill, a `value` or `grad` of another function, steps that were changed after `hidlr`, a
    schedule in learning rates, numbers that are not finite. Of many groups, the five that have most
    to tell. Outside of jit: it reads the numbers.

    Args:
      opt_state: the state of `hidlr` or of anything that contains it.

    Returns:
      Lines to print.

    Raises:
      ValueError: there is no `HiDLRState` in the state, or more than one, or it is that of many
        runs at once.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> state = hd.hidlr(None, "all", init_learning_rate=0.5).init({"w": jnp.zeros(3)})
      >>> print(hd.explain(state))
      0 updates, 0 refreshes; the guard stepped in 0 times.
      group  learning rate  at the last step
      all              0.5                 0    ok
      Nothing stands out.
    """
    run = _read(opt_state)
    times = "once" if run.cuts == 1 else f"{run.cuts} times"
    head = f"{run.updates} updates, {run.refreshes} refreshes; the guard stepped in {times}."
    found = [text for text in (finding(run) for finding in _FINDINGS) if text is not None]
    found += [text for slip, text in _SLIPS.items() if slip in run.slips]
    found = found or ["Nothing stands out."]
    return "\n".join([head, *_table(run), *found])
