"""The branch of a step that a refresh is in."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def where_due(due: jax.Array, found: Callable[[], Any], kept: Any) -> Any:
    """What `found` returns where something is due, else what is kept.

    Outside of jit, where `due` is known, nothing is compiled for the branch that is not taken.
    """
    if not isinstance(due, Tracer):
        return found() if due else kept
    try:
        return jax.lax.cond(due, found, lambda: kept)
    except TypeError as error:
        if "manual ax" in str(error):
            error.add_note(
                "The loss differs from device to device, and each would come to its own learning "
                "rates. Use jax.lax.pmean on the loss, value and grad."
            )
        raise
