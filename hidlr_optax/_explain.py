"""The state of a run in ten lines of text, for a person."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hidlr_optax._quadratic import Kept
from hidlr_optax._rule.advice import LOW_PEAK
from hidlr_optax._state import HiDLRState
from hidlr_optax.influence import find_state
from hidlr_optax.influence._report import aligned

_SHOWN = 5  # groups, so that there are ten lines
_SUNK = 0.1  # of its highest: a rate below it has sunk
_HIGH = 10.0  # a rate above it is one of a step that had been shortened before
_NOISY = 3e-5  # of the loss: more noise than float32 has
_FOUND = 20  # refreshes before which a schedule may be warming up

_STATUS = {
    Kept.UPDATED: "ok",
    Kept.NON_FINITE: "not finite: look for NaN in the loss, gradient or update",
    Kept.UNRESOLVED: "changes the loss by less than its rounding: converged, or in bfloat16",
    Kept.NOT_CONVEX: "no minimum along it: larger batches, or hold(), which needs none",
    Kept.NO_SLOPE: "no gradient or no update: frozen or unused? split it off",
    Kept.OTHER_GROUP: "kept because of another group's numbers",
    Kept.ASCENDS: "goes uphill: see below",
}


class _Run(NamedTuple):
    """Python numbers of a state."""

    updates: int
    refreshes: int
    cuts: int
    ascents: int
    values: int
    gradients: int
    steps: int
    factor: float
    noise: float
    schedule: float
    peak: float
    rates: dict[str, float]
    highest: dict[str, float]
    kept: dict[str, int]


def _read(state: HiDLRState) -> _Run:
    def number(leaf: Any) -> Any:
        return jax.tree.leaves(leaf)[0].item()  # nnx.Optimizer wraps it in a Variable

    def by_label(field: Any) -> dict[str, Any]:
        return {name: number(field[name]) for name in sorted(field)}

    host = jax.device_get(state._replace(direction=()))
    return _Run(
        updates=number(host.count),
        refreshes=number(host.refreshes),
        cuts=number(host.cuts),
        ascents=number(host.ascents),
        values=number(host.value_mismatches),
        gradients=number(host.gradient_mismatches),
        steps=number(host.step_mismatches),
        factor=number(host.gradient_factor),
        noise=number(host.loss_noise),
        schedule=number(host.schedule_factor),
        peak=number(host.progress.peak) if host.progress else 1.0,  # hold alone keeps it
        rates=by_label(host.group_learning_rates),
        highest=by_label(host.highest_learning_rates),
        kept=by_label(host.kept),
    )


def _part(run: _Run, name: str) -> float:
    """The rate as a part of the highest that it has been."""
    return run.rates[name] / run.highest[name] if run.highest[name] > 0 else 1.0


def _trend(part: float) -> str:
    return "at its highest" if part > 0.95 else f"{part:.2g} of its highest"


def _table(run: _Run) -> list[str]:
    """The groups by name; of more than are shown, those with most to tell."""
    order = sorted(run.rates, key=lambda name: (run.kept[name] == 0, _part(run, name)))
    rate = "learning rate" if run.schedule == 1 else "unscheduled learning rate"
    rows = [("group", rate, "trend", "")]
    for name in sorted(order[:_SHOWN]):
        trend = _trend(_part(run, name))
        rows.append((name, f"{run.rates[name]:.3g}", trend, f"  {_STATUS[Kept(run.kept[name])]}"))
    more = [f"and {len(order) - _SHOWN} more, of less to tell"] if len(order) > _SHOWN else []
    widest = max(len(row[-1]) for row in rows)
    padded = [(*row[:-1], row[-1].ljust(widest)) for row in rows]
    return [line.rstrip() for line in aligned(padded)] + more


def _ascends(run: _Run) -> str | None:
    if 2 * run.ascents < max(run.refreshes, 4):
        return None
    return (
        f"At {run.ascents} of {run.refreshes} refreshes every group went uphill: the direction has "
        "the wrong sign, or none. Use optax.adamw(1.0), or optax.scale(-1.0) after "
        "scale_by_adam(), and put hidlr last in the chain, behind them."
    )


def _wrong_value(run: _Run) -> str | None:
    if not run.values:
        return None
    return (
        "`value` is not the loss that is probed (another dropout key, batch or scale?): the loss "
        "is evaluated in its place. Leave `value` out, or pass that of the probed function."
    )


def _wrong_gradient(run: _Run) -> str | None:
    if not run.gradients:
        return None
    factor = f", and its slopes are multiplied by {run.factor:.3g}" if run.factor != 1 else ""
    return (
        f"`grad` is not the gradient of the loss that is probed (scaled, summed, clipped, "
        f"conjugated, of another batch or dropout key?){factor}. Pass the raw gradient of the "
        "probed function."
    )


def _other_steps(run: _Run) -> str | None:
    if not run.steps:
        return None
    times = "once" if run.steps == 1 else f"{run.steps} times"
    return (
        f"The parameters did not move by the step that hidlr had returned ({times}): its sign or "
        "size was changed, or it was not taken. Put hidlr last in the chain, add its updates as "
        "they are, and hand a schedule to it as schedule=."
    )


def _noisy(run: _Run) -> str | None:
    if run.noise < _NOISY:
        return None
    return (
        f"The loss is rounded to {run.noise:.1g} of itself, as by arithmetic in bfloat16: where a "
        "step changes it by less, its curvature is noise, and the rates stay."
    )


def _low_schedule(run: _Run) -> str | None:
    if run.refreshes < _FOUND or not 0 < run.peak < LOW_PEAK:
        return None
    return (
        f"The schedule has not been above {run.peak:.2g} yet: it is a factor, 1 at its peak, and "
        "no learning rate."
    )


def _high(run: _Run) -> str | None:
    if not any(rate > _HIGH for rate in run.rates.values()):
        return None
    return (
        f"Rates above {_HIGH:g}: was the base optimizer given a learning rate, or a schedule? "
        "It is to have one of 1.0."
    )


def _sank(run: _Run) -> str | None:
    if run.refreshes == 0 or any(_part(run, name) > _SUNK for name in run.rates):
        return None
    return (
        "All rates sank together, below a tenth of what they were: docs/sinking.md lists the "
        "causes, the likeliest first."
    )


def _schedule(run: _Run) -> list[str]:
    if run.updates == 0 or run.schedule == 1:
        return []
    return [
        f"The schedule's factor was {run.schedule:.3g} at the last update; the rates above are "
        "without it, those of `metrics` with it."
    ]


_FINDINGS: tuple[Callable[[_Run], str | None], ...] = (
    _ascends,
    _wrong_value,
    _wrong_gradient,
    _other_steps,
    _noisy,
    _low_schedule,
    _high,
    _sank,
)


def explain(opt_state: Any) -> str:
    """Says how a run is doing, in about ten lines of text for a person.

    The rate of each group, how it stands to the highest that it has been, what its status asks for;
    how often the guard stepped in; and what is wrong, where something is: a direction that goes
    uphill, a `value` or `grad` of another function, steps that were changed after `hidlr`, a
    schedule in learning rates, rates that sank together. Of many groups, the five that have most to
    tell. Outside of jit: it reads the numbers.

    Args:
      opt_state: the state of `hidlr` or of anything that contains it.

    Returns:
      Lines to print.

    Raises:
      ValueError: there is no `HiDLRState` in the state, or more than one.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> state = hd.hidlr(None, "all", init_learning_rate=0.5).init({"w": jnp.zeros(3)})
      >>> print(hd.explain(state))
      0 updates, 0 refreshes; the guard stepped in 0 times.
      group  learning rate           trend
      all              0.5  at its highest    ok
      Nothing stands out.
    """
    run = _read(find_state(opt_state))
    times = "once" if run.cuts == 1 else f"{run.cuts} times"
    head = f"{run.updates} updates, {run.refreshes} refreshes; the guard stepped in {times}."
    found = [text for text in (finding(run) for finding in _FINDINGS) if text is not None]
    found = found or ["Nothing stands out."]
    return "\n".join([head, *_table(run), *_schedule(run), *found])
