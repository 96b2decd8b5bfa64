"""Warnings, and hints for error messages: what is known of a slip while Python still runs."""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from hidlr_optax._paths import leaf_paths, listing, nodes

_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(__file__).parents[1],
        *(Path(str(module.__file__)).parent for module in (jax, optax)),
    )
)  # whose frames are not the user's

LOW_PEAK, HIGH_PEAK = 0.1, 1.1  # a schedule that stays below, or goes beyond, is no factor
_FIRST_STEPS = 2**20  # of a schedule: its peak comes before


def stacklevel() -> int:
    """For a warning of the caller: up to the first frame outside of the libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    return level


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def finds_rates(make: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A transformation whose TypeError for `learning_rate=` says what takes its place."""

    @functools.wraps(make)
    def made(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        for name in kwargs:
            if name in ("learning_rate", "lr", "eta"):
                raise TypeError(
                    f"{make.__name__}() takes no {name!r}: it finds the learning rates, and the "
                    "optimizer before it has rate one, such as optax.adamw(1.0). Proportions to "
                    "start from are init_learning_rate={label: rate}, a schedule is a factor, "
                    "schedule=optax.cosine_decay_schedule(1.0, steps)"
                )
        return make(*args, **kwargs)

    return made


def warn_of_peak(schedule: optax.Schedule | None) -> None:
    """Warns where a schedule stays far below one, or exceeds it: it is no factor."""
    if schedule is None:
        return
    doublings = np.unique(np.geomspace(1, _FIRST_STEPS, 41).astype(np.int32))
    steps = np.concatenate([np.arange(2, dtype=np.int32), doublings])
    try:
        # inject_hyperparams makes transformations inside jit; Optax's schedules promote types.
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            factors = np.asarray(jax.vmap(schedule)(jnp.asarray(steps)))
    except Exception:  # a schedule of the user's own, that a warning must not break
        return
    peak, highest = float(np.max(np.abs(factors))), float(np.max(factors))
    if 0 < peak < LOW_PEAK:  # of zero, it is a switch
        warnings.warn(
            f"schedule never exceeds {peak:.3g}, but it is a factor of the rates, 1 at its peak: "
            "hidlr finds the rates themselves. Give it the same schedule with a peak of 1.0, such "
            "as optax.cosine_decay_schedule(1.0, steps) or warmup_cosine_decay_schedule(0.0, 1.0, "
            "warmup_steps, steps)",
            UserWarning,
            stacklevel=stacklevel(),
        )
    # One that grows for ever, such as step / 100, is cut off by the end of the run.
    if HIGH_PEAK < highest < np.inf and np.argmax(factors) < len(factors) - 1:
        warnings.warn(
            f"schedule reaches {highest:.3g}, but it is a factor of the rates, 1 at its peak: "
            "hidlr finds the rates for a factor of 1. Divide the schedule by its peak, such as "
            "optax.cosine_decay_schedule(1.0, steps)",
            UserWarning,
            stacklevel=stacklevel(),
        )


def has_schedule(state: Any) -> bool:
    """Whether there is a schedule of an optimizer in its state: a counter, or a hyperparameter."""

    def is_counter(node: Any) -> bool:
        if type(node).__name__ == "InjectStatefulHyperparamsState":
            return "learning_rate" in node.hyperparams_states
        return isinstance(node, optax.ScaleByScheduleState)

    return bool(nodes(state, is_counter))


OWN_SCHEDULE = (
    "The optimizer has a schedule of its own, which hidlr does not know and works against: give it "
    "rate one, such as optax.adamw(1.0), and hand the schedule to hidlr, divided by its peak, as "
    "schedule=."
)


def warn_of_schedule(state: Any) -> None:
    """Warns where the state of a base optimizer has a schedule in it."""
    if has_schedule(state):
        warnings.warn(OWN_SCHEDULE, UserWarning, stacklevel=stacklevel())


def unjitted_watch() -> Callable[[Any], None]:
    """A function that warns, once, at the second update whose arrays are concrete.

    One alone is no loop. Every transformation has a watch of its own.
    """
    calls = 0

    def watch(arrays: Any) -> None:
        nonlocal calls
        if calls > 1 or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return
        calls += not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays))
        if calls > 1:
            warnings.warn(
                "hidlr: update is called outside of jax.jit, where every refresh compiles its "
                "probes again. Put the training step, tx.update in it, under jax.jit (nnx.jit)",
                UserWarning,
                stacklevel=stacklevel(),
            )

    return watch


def _bases(tree: Any) -> set[str]:
    """`library:Class` for the classes of the outermost node."""
    return {f"{kind.__module__.split('.')[0]}:{kind.__name__}" for kind in type(tree).__mro__}


def model_hint(params: Any) -> str | None:
    """Hint on a loss of parameters from that of a model, for the libraries we know."""
    bases = _bases(params)
    if bases & {"flax:State"}:
        return (
            "The parameters are an nnx.State: a loss of the model, loss_fn(model, batch), cannot "
            "be called with them. Build hidlr(None, labels), and pass "
            "value_fn=hidlr_optax.flax.value_fn_for(model, loss_fn, batch) to optimizer.update"
        )
    if bases & {"equinox:Module", "equinox:_Module"}:
        return (
            "The parameters are a filtered Equinox model, None where it holds other things: a loss "
            "of the whole model cannot be called with them. Put it together inside: params, "
            "static = eqx.partition(model, eqx.is_inexact_array), and value_fn=lambda params: "
            "loss_fn(eqx.combine(params, static), batch)"
        )
    return None


def whole_numbers(params: Any) -> str:
    """The parameters that are not floating point, in words; empty where there are none."""
    found = [
        path
        for path, leaf in leaf_paths(params)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    if not found:
        return ""
    return (
        f". Not floating point, and so without a gradient, are the parameters {listing(found)}: "
        "keep them out of params, or make floats of them"
    )
