"""What `update` is given, checked at the door: the loss, trees like the parameters, the value."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hidlr_optax._checks.advice import model_hint, whole_numbers
from hidlr_optax._groups import OUTSIDE, wide
from hidlr_optax._paths import leaf_paths
from hidlr_optax._step_loss import StepLoss

LossFn = Callable[[Any, Any], jax.Array]
ValueFn = Callable[[Any], jax.Array]


def check_loss_fn(loss_fn: Any) -> None:
    """Raises a ValueError unless this is a function, or None."""
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(
            f"loss_fn must be a callable (params, batch) -> scalar, or None where update is given "
            f"value_fn, got {type(loss_fn).__name__}"
        )


def check_like(tree: Any, params: Any, name: str) -> None:
    """Raises a ValueError unless a tree has the structure and the shapes of the parameters."""
    expected, got = jax.tree.structure(params), jax.tree.structure(tree)
    if got != expected:
        raise ValueError(
            f"{name} must have the structure of params, {expected}; got {got}. If hidlr is wrapped "
            f"in a transformation that changes the tree: {OUTSIDE}"
        )
    for (path, leaf), param in zip(leaf_paths(tree), jax.tree.leaves(params), strict=True):
        if np.shape(leaf) != np.shape(param):
            raise ValueError(
                f"{name} must have the shapes of params: {np.shape(param)} at {'/'.join(path)!r}, "
                f"got {np.shape(leaf)}"
            )


def bind_loss(
    loss_fn: LossFn | None, value_fn: Callable[..., Any] | None, batch: Any, extra_args: Any
) -> ValueFn:
    """The loss of the parameters alone: `value_fn` where it is given, else `loss_fn` of `batch`."""
    if value_fn is not None:
        # As Optax's line searches do: keywords that its signature names are handed on.
        named = inspect.signature(value_fn).parameters
        kwargs = {key: x for key, x in ({"batch": batch} | extra_args).items() if key in named}
        return functools.partial(value_fn, **kwargs) if kwargs else value_fn
    if loss_fn is None:
        raise ValueError(
            "hidlr has no loss to probe: build it with loss_fn(params, batch) and pass batch=... "
            "to update, or pass value_fn=... (params -> scalar) to update"
        )
    return lambda params: loss_fn(params, batch)


def fitting(step_loss: StepLoss) -> StepLoss:
    """The loss with parameters in float32 or wider; in their own types where that fails.

    A scan over layers carries its first type, a convolution wants one type: with bfloat16
    parameters, not every loss takes wider ones.
    """
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(step_loss.params)]
    if all(wide(dtype) == dtype for dtype in dtypes):
        return step_loss
    for candidate in (step_loss, step_loss.narrow()):
        try:
            jax.eval_shape(candidate.start)
        except Exception:  # whatever the loss raises: `check_scalar` says it
            continue
        return candidate
    return step_loss


def check_scalar(step_loss: StepLoss, no_batch: bool) -> None:
    """Traces the loss once, so that what is wrong with it is said here and not inside a vmap."""
    try:
        out = jax.eval_shape(step_loss.start)
    except Exception as error:
        if no_batch:
            raise ValueError(
                "loss_fn(params, None) failed, and update was called without a batch: pass "
                "batch=..., or value_fn=..."
            ) from error
        hint = model_hint(step_loss.params)
        if hint is not None and isinstance(error, TypeError | AttributeError):
            raise ValueError(f"the loss failed while hidlr traced it: {error}. {hint}") from error
        error.add_note(
            "hidlr was tracing the loss it is to probe, loss_fn(params, batch) or "
            "value_fn(params), with parameters in float32 or wider. Parameters that peft.split has "
            "frozen are None there: merge them in a value_fn, and use hidlr(None, ...). If hidlr "
            f"is wrapped in a transformation that changes the tree: {OUTSIDE}"
        )
        raise
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"the loss must return a real scalar and nothing beside it, got {out}; take the mean "
            "over examples and leave auxiliary outputs out" + whole_numbers(step_loss.params)
        )


def usable_value(value: Any, params: Any) -> jax.Array | None:
    """The loss at params, if it was computed as precisely as the probes will be.

    Probes run in float32 at least, and in float64 where a parameter is. Against them, a loss
    computed from bfloat16 parameters, or rounded to it, is off by more than the curvature that is
    looked for.
    """
    if value is None:
        return None
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"value must be the scalar loss at params, got shape {value.shape} of {value.dtype}"
        )
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(params)]
    as_wide = all(jnp.finfo(value.dtype).bits >= jnp.finfo(wide(dtype)).bits for dtype in dtypes)
    return value if as_wide and all(wide(dtype) == dtype for dtype in dtypes) else None
