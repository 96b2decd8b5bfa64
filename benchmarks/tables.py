"""Tables in Markdown, and what stands in their cells."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_sd(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean ± standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def score(name: str, values: Sequence[float]) -> str:
    """Of one run or several; anything but a loss in percent."""
    factor, digits, unit = (1, 3, "") if name == "loss" else (100, 1, " %")
    mean = f"{factor * np.mean(values):.{digits}f}"
    spread = f" ± {factor * np.std(values):.{digits}f}" if len(values) > 1 else ""
    return mean + spread + unit
