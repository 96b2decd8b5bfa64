"""What a refresh leaves behind for a person to read, apart from what a rule needs to go on."""

import enum
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from hidlr_optax._groups import Groups

PerGroup = TypeVar("PerGroup")


class Kept(enum.IntEnum):
    """The status of a group after a refresh: updated, or why its learning rate was kept.

    UPDATED (0): nothing was kept, the rate is new. NON_FINITE (1): a loss, gradient or update was
    NaN or infinite. UNRESOLVED (2): the group's probes change the loss by less than its
    floating-point type resolves. NOT_CONVEX (3): the curvature is negative or zero, so the
    quadratic has no minimum. NO_SLOPE (4): the group's gradient or update is zero, and nothing asks
    for a rate. OTHER_GROUP (5): another group's fit failed, and all rates are kept or none. ASCENDS
    (6): the step as a whole goes uphill on the batch that made it.
    """

    UPDATED = 0
    NON_FINITE = 1
    UNRESOLVED = 2
    NOT_CONVEX = 3
    NO_SLOPE = 4
    OTHER_GROUP = 5
    ASCENDS = 6


class Diagnostics(NamedTuple, Generic[PerGroup]):
    """Counts and the measurements of the last refresh: O(K) scalars in dicts keyed by label.

    Inside a refresh, they are (K,) arrays in the order of the sorted labels.

    Attributes:
      refreshes: () int32, refreshes so far, those that kept the rates included.
      cuts: () int32, how often the guard has cut the rates.
      kept: () int32 each, a `Kept`: why the last refresh kept the group's rate, 0 if it did not.
      slope: b, () float32 each, loss per unit learning rate, averaged over refreshes.
      curvature: a, () float32 each, loss per unit learning rate squared, averaged.
      measured_slope: b of the last refresh alone, () float32 each, not averaged; zero where it was
        not finite.
      measured_curvature: a of the last refresh alone, () float32 each, not averaged; zero where it
        was not finite, or too small to be told from none.
      influence: the influence per parameter (PPI), b²/(a d), () float32 each, loss per parameter,
        of the last refresh whose curvature was positive; zero before.
      highest_learning_rates: () float32 each, the highest that η has been after a refresh.
    """

    refreshes: jax.Array
    cuts: jax.Array
    kept: PerGroup
    slope: PerGroup
    curvature: PerGroup
    measured_slope: PerGroup
    measured_curvature: PerGroup
    influence: PerGroup
    highest_learning_rates: PerGroup

    @staticmethod
    def begin(names: tuple[str, ...]) -> "Diagnostics[dict[str, jax.Array]]":
        """Before the first refresh: zeros."""

        def zeros(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
            return {name: jnp.zeros((), dtype) for name in names}

        counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return Diagnostics(*counts, zeros(jnp.int32), *(zeros() for _ in range(6)))

    def pack(self, groups: Groups) -> "Diagnostics[jax.Array]":
        """The same with (K,) arrays for the dicts keyed by label."""
        return self._each(groups.pack)

    def unpack(self, groups: Groups) -> "Diagnostics[dict[str, jax.Array]]":
        """The same with dicts keyed by label for the (K,) arrays."""
        return self._each(groups.unpack)

    def _each(self, change: Callable[[Any], Any]) -> "Diagnostics[Any]":
        refreshes, cuts, *per_group = self
        return Diagnostics(refreshes, cuts, *map(change, per_group))
