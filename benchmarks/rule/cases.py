"""The cases of the suite: problem, optimizer, groups, Φ, and how far off the initial rate is."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

from benchmarks.problems.small import PROBLEMS

TOYS = ("ellipse", "Beale + Rosenbrock")
INTERVALS = (1, 4, 10, 20)
SCALES = (0.01, 1.0, 100.0)  # how far off the initial rate is

# Runs ten times as long. The images are memorised in them; the others are not.
LONG_STEPS = 4000
LONG = (
    ("MNIST CNN", "AdamW"),
    ("MNIST CNN", "momentum"),
    ("digits, 20 % noise", "momentum"),
    ("LoRA", "AdamW"),
    ("synthetic NAM", "SGD"),
    ("housing NAM", "AdamW"),
    ("text", "AdamW"),
    ("text", "SGD"),
)

# The direction at unit rate, what an experienced user would begin with, and the middle of the grid.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": lambda: optax.adamw(1.0),
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
    "SGD": lambda: optax.sgd(1.0),
    "Lion": lambda: optax.lion(1.0),
}
USUAL = {"AdamW": 1e-3, "momentum": 1e-2, "SGD": 1e-1, "Lion": 1e-4}
CENTRES = {"AdamW": 10**-2.5, "momentum": 1e-2, "SGD": 1e-1, "Lion": 10**-3.5}
TOY_CENTRES = {"AdamW": 10**-0.5, "momentum": 1e-4, "SGD": 10**-3.5, "Lion": 10**-0.5}


class Case(NamedTuple):
    """One setting of the suite; `grouping` is an index into the problem's groupings."""

    workload: str
    optimizer: str
    grouping: int
    interval: int
    scale: float


@functools.cache
def cases() -> list[Case]:
    """A case for each problem and optimizer; every pair of settings occurs in one of them."""
    choices = (tuple(PROBLEMS), tuple(OPTIMIZERS), (0, 1), INTERVALS, SCALES)
    pairs = set().union(*(_pairs(case) for case in itertools.product(*choices)))
    for seed in itertools.count():
        rng, seen, chosen = np.random.default_rng(seed), set(), []
        for place in itertools.product(*choices[:2]):
            options = [(*place, *setting) for setting in itertools.product(*choices[2:])]
            gains = [len(_pairs(option) - seen) + 0.1 * rng.random() for option in options]
            chosen.append(Case(*options[int(np.argmax(gains))]))
            seen |= _pairs(chosen[-1])
        if seen == pairs:
            return chosen
    raise AssertionError  # the loop does not end before


def _pairs(case: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def grid(name: str, optimizer: str) -> np.ndarray:
    """Seven rates, half a decade apart."""
    centre = (TOY_CENTRES if name in TOYS else CENTRES)[optimizer]
    return centre * np.logspace(-1.5, 1.5, 7)
