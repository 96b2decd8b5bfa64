"""Tables in Markdown, and what stands in their cells."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_sd(values: Sequence[float] | np.ndarray, digits: int = 3, ddof: int = 0) -> str:
    """Mean ± standard deviation: of these values, or with `ddof=1` as estimated from a sample.

    One value alone has no spread.
    """
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=ddof):.{digits}f}" if len(values) > 1 else mean


def finite_mean(values: Iterable[float]) -> float:
    """The mean; infinite where one of the values is not finite."""
    known = np.array(list(values))
    return float(np.mean(known)) if np.all(np.isfinite(known)) else np.inf


def score(name: str, values: Sequence[float]) -> str:
    """Of one run or several; anything but a loss in percent."""
    factor, digits, unit = (1, 3, "") if name == "loss" else (100, 1, " %")
    return mean_sd(factor * np.asarray(values), digits) + unit
