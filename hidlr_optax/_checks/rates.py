"""Rates and whole numbers that a user gives, and a state that was made with other labels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hidlr_optax._groups import Groups


def is_concrete(value: Any) -> bool:
    """Whether a number can be looked at: `inject_hyperparams` hands tracers to factories."""
    return not isinstance(value, Tracer)


def check_whole(number: Any, name: str, least: int) -> None:
    """Raises a ValueError unless this is a whole number of at least so much."""
    if is_concrete(number) and (number < least or number != int(number)):
        raise ValueError(f"{name} must be a whole number >= {least}, got {number}")


def check_schedule(schedule: Any) -> None:
    """Raises a ValueError unless this is a function, or None."""
    if schedule is not None and not callable(schedule):
        raise ValueError(f"schedule must be a callable step -> factor, or None, got {schedule!r}")


def _check_rate(rate: Any, where: str) -> None:
    if callable(rate):
        raise ValueError(
            f"{where} must be a number, got a callable: a schedule goes into schedule=..."
        )
    if is_concrete(rate) and not (np.isfinite(float(rate)) and float(rate) > 0):
        raise ValueError(f"{where} must be finite and > 0, got {rate}")


def check_rates(initial: Any) -> None:
    """Raises a ValueError unless these are one rate, a rate for each label, or None."""
    if isinstance(initial, Mapping):
        for name, rate in initial.items():
            _check_rate(rate, f"init_learning_rate[{name!r}]")
    elif initial is not None:
        _check_rate(initial, "init_learning_rate")


def check_bounds(bounds: Any) -> None:
    """Raises a ValueError unless these are a lowest and a highest rate for each label, or None."""
    if bounds is None:
        return
    if not isinstance(bounds, Mapping):
        raise ValueError(f"bounds must be {{label: (lowest, highest)}}, got {bounds!r}")
    for name, pair in bounds.items():
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise ValueError(
                f"bounds[{name!r}] must be a pair (lowest, highest), got {pair!r}: (None, 1e-3) is "
                "a ceiling, (1e-3, 1e-3) holds the rate"
            )
        for rate in pair:
            if rate is not None:
                _check_rate(rate, f"bounds[{name!r}]")
        low, high = pair
        if low is not None and high is not None and low > high:
            raise ValueError(f"bounds[{name!r}] must be (lowest, highest), got {tuple(pair)}")


def packed_bounds(bounds: Mapping[str, Any] | None, names: tuple[str, ...]) -> Any:
    """Lowest and highest rates, (K,) each in the order of the names; None without any."""
    if bounds is None:
        return None
    unknown = [name for name in bounds if name not in names]
    if unknown:
        raise ValueError(f"bounds for {unknown}, but the groups are {list(names)}")
    pairs = [bounds.get(name, (None, None)) for name in names]
    lowest = [0.0 if low is None else low for low, _ in pairs]
    highest = [np.inf if high is None else high for _, high in pairs]
    return np.asarray(lowest, np.float32), np.asarray(highest, np.float32)


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


def check_names(rates: Mapping[str, Any], groups: Groups) -> None:
    """Raises a ValueError where the state was made, or restored, with other labels."""
    found = sorted(rates)
    missing = [name for name in groups.names if name not in found]
    unknown = [name for name in found if name not in groups.names]
    if missing or unknown:
        raise ValueError(
            f"the state has the rates of other groups, {found}; the groups of the labels are "
            f"{list(groups.names)}, missing are {missing}, not among them are {unknown}. Restore a "
            "checkpoint with the labels that it was made with, or begin with tx.init(params)"
        )
