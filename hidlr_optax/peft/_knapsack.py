"""The 0–1 knapsack for all budgets at once: the front of non-dominated subsets."""

import heapq
import math
from collections.abc import Sequence

_MOST_SUBSETS = 2**20

Subset = tuple[int, float, int]  # size, value, and a bit for each item in it


def best_subsets(items: Sequence[tuple[int, float]], budget: float) -> list[Subset]:
    """All subsets within the budget that no other, as small and as valuable, dominates.

    Nemhauser and Ullmann 1969: the front of the first k items, merged with itself plus item k + 1.
    From the smallest subset, the empty one, to the largest; values grow strictly. In the worst case
    the front doubles with each item.

    Args:
      items: size ≥ 0 and value > 0 of each.
      budget: the largest size of a subset.

    Raises:
      ValueError: the front grows beyond a million subsets.
    """
    subsets: list[Subset] = [(0, 0.0, 0)]
    for bit, (size, value) in enumerate(items):
        more = ((s + size, v + value, members | 1 << bit) for s, v, members in subsets)
        best, front = -math.inf, []
        for subset in heapq.merge(subsets, more, key=lambda subset: (subset[0], -subset[1])):
            if subset[1] > best and subset[0] <= budget:
                best = subset[1]
                front.append(subset)
        if len(front) > _MOST_SUBSETS:
            raise ValueError(
                f"more than {_MOST_SUBSETS} subsets of {len(items)} groups are best for some "
                "budget: use fewer groups"
            )
        subsets = front
    return subsets
