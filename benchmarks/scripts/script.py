"""What the scripts have in common: what they hand to the comparison, and batches in epochs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.problems import data


class Loop(NamedTuple):
    """A training script without its `for`.

    Attributes:
      start: seed -> what a step goes on from, such as (params, state).
      step: jitted, (*state, batch) -> (*state, log), or log alone where nnx changes the state in
        place.
    """

    start: Callable[[int], tuple[Any, ...]]
    step: Any


class Script(NamedTuple):
    """A task, and the two ways to train it.

    Attributes:
      optimizer: the usual one and its rate, for the table.
      rate: that rate.
      updates: of the parameters in a run.
      metric: what `evaluate` returns.
      usual: learning rate or schedule of rates -> the loop.
      with_hidlr: (labels, schedule of factors or None) -> the loop.
      batches: seed -> batches without end.
      evaluate: *state -> score on data that is not trained on, lower is better.
      digits: of that score, in the table.
      accumulated: calls of `Loop.step` that make one update.
      schedule: (rate, updates) -> the published schedule; None: there is none.
    """

    optimizer: str
    rate: float
    updates: int
    metric: str
    usual: Callable[[Any], Loop]
    with_hidlr: Callable[[Any, Any], Loop]
    batches: Callable[[int], Iterator[Any]]
    evaluate: Callable[..., float]
    digits: int = 1
    accumulated: int = 1
    schedule: Callable[[float, int], Any] | None = None


def epochs(seed: int, size: int, *arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Batches of `size` rows without end, every epoch in another order."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(arrays[0]))
        for rows in order[: len(order) // size * size].reshape(-1, size):
            yield tuple(array[rows] for array in arrays)


@functools.cache
def mnist() -> tuple[data.Images, data.Images]:
    """4,000 images to train on and 1,000 to test."""
    everything = data.mnist()
    order = np.random.default_rng(0).permutation(len(everything.labels))
    return everything.take(order[1000:]), everything.take(order[:1000])
