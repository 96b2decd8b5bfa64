"""What a refresh leaves behind for a person to read, apart from what a rule needs to go on."""

import enum
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from hidlr_optax._groups import Groups

PerGroup = TypeVar("PerGroup")


class Kept(enum.IntEnum):
    """The status of a group after a refresh: its number, and what it means to a person.

    Attributes:
      message: in words.
    """

    message: str

    UPDATED = 0, "ok"
    NON_FINITE = 1, "not finite: look for NaN in the loss, gradient or update"
    UNRESOLVED = 2, "changes the loss by less than its rounding"
    NOT_CONVEX = 3, "no minimum along it: larger batches, or hidlr, which needs none"
    NO_SLOPE = 4, "no slope on the last batch: masked, or not used by the loss?"
    OTHER_GROUP = 5, "kept because of another group's numbers"
    ASCENDS = 6, "goes uphill: see below"
    DISTRUSTED = 7, "not measured: see below"

    def __new__(cls, code: int, message: str) -> "Kept":
        """A number with a message."""
        status = int.__new__(cls, code)
        status._value_ = code
        status.message = message
        return status


class Slip(enum.IntFlag):
    """What a caller got wrong, found by numbers: flags, 0 where nothing was.

    VALUE (1): `value` was not the loss at the parameters, at the first update. STEP (2): the
    parameters did not move by the step that was returned.
    """

    VALUE = 1
    STEP = 2


class Diagnostics(NamedTuple, Generic[PerGroup]):
    """Counts and the measurements of the last refresh: O(K) scalars in dicts keyed by label.

    Inside a refresh, they are (K,) arrays in the order of the sorted labels.

    Attributes:
      refreshes: () int32, refreshes so far, those that kept the rates included.
      measured: () int32, how many of them measured the curvature of each group.
      cuts: () int32, how often the guard has cut the rates.
      slips: () int32 of `Slip`: what the caller got wrong.
      kept: () int32 each, a `Kept`: why the last refresh kept the group's rate, 0 if it did not.
      slope: b, () float32 each, loss per unit learning rate, averaged over refreshes.
      curvature: a, () float32 each, loss per unit learning rate squared, averaged.
      measured_slope: b of the last refresh alone, () float32 each, not averaged; zero where it was
        not finite.
      measured_curvature: a of the last refresh alone, () float32 each, not averaged; zero where it
        was not finite, or too small to be told from none.
      influence: the influence per parameter (PPI), b²/(a d), () float32 each, loss per parameter,
        of the last refresh whose curvature was positive; zero before.
    """

    refreshes: jax.Array
    measured: jax.Array
    cuts: jax.Array
    slips: jax.Array
    kept: PerGroup
    slope: PerGroup
    curvature: PerGroup
    measured_slope: PerGroup
    measured_curvature: PerGroup
    influence: PerGroup

    @staticmethod
    def begin(names: tuple[str, ...]) -> "Diagnostics[dict[str, jax.Array]]":
        """Before the first refresh: zeros."""

        def zeros(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
            return {name: jnp.zeros((), dtype) for name in names}

        fields: Any = {name: jnp.zeros((), jnp.int32) for name in Diagnostics._fields[:4]}
        fields |= {name: zeros() for name in Diagnostics._fields[4:]}
        return Diagnostics(**fields | {"kept": zeros(jnp.int32)})

    def pack(self, groups: Groups) -> "Diagnostics[jax.Array]":
        """The same with (K,) arrays for the dicts keyed by label."""
        return self._each(groups.pack)

    def unpack(self, groups: Groups) -> "Diagnostics[dict[str, jax.Array]]":
        """The same with dicts keyed by label for the (K,) arrays."""
        return self._each(groups.unpack)

    def _each(self, change: Callable[[Any], Any]) -> "Diagnostics[Any]":
        fields = self._asdict()
        changed = {name: change(field) for name, field in list(fields.items())[4:]}
        return self._replace(**changed)
