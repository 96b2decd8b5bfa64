"""What `update` is given, checked at the door: the loss, trees like the parameters, the value."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hidlr_optax._checks.advice import model_hint, whole_numbers
from hidlr_optax._groups import OUTSIDE, wide
from hidlr_optax._paths import leaf_paths
from hidlr_optax._remember import RememberingLoss
from hidlr_optax._step_loss import StepLoss

LossFn = Callable[[Any, Any], jax.Array]
ValueFn = Callable[[Any], jax.Array]

PASSES_NOTHING = (
    "In a loop that passes nothing but gradients: loss_fn = hidlr_optax.remember_batch(loss_fn), "
    "for the loop and for hidlr; or bind a sample, functools.partial(loss_fn, batch=sample)"
)


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


def named_otherwise(
    value: Any, value_fn: Callable[..., Any] | None, extra_args: Mapping[str, Any]
) -> tuple[Any, Callable[..., Any] | None]:
    """`value` and `value_fn`, by the names that other loops have for them: `loss`, `obj_fn`."""
    for name in ("obj_fn", "loss_fn"):
        value_fn = extra_args.get(name) if value_fn is None else value_fn
    return extra_args.get("loss") if value is None else value, value_fn


def bind_loss(
    loss_fn: LossFn | None, value_fn: Callable[..., Any] | None, batch: Any, extra_args: Any
) -> ValueFn:
    """The loss of the parameters alone: `value_fn` where it is given, else `loss_fn` of `batch`.

    Without a batch, it is the one that `loss_fn` remembers, or that is bound to it.
    """
    if value_fn is not None:
        # As Optax's line searches do: keywords that its signature names are handed on.
        named = inspect.signature(value_fn).parameters
        kwargs = {key: x for key, x in ({"batch": batch} | extra_args).items() if key in named}
        return functools.partial(value_fn, **kwargs) if kwargs else value_fn
    if loss_fn is None:
        raise ValueError(
            "hidlr has no loss to probe: build it with loss_fn(params, batch) and pass batch=... "
            "to update, or pass value_fn=... (params -> scalar; obj_fn or loss_fn will do). "
            f"{PASSES_NOTHING}"
        )
    if isinstance(loss_fn, RememberingLoss):
        if batch is None:
            return loss_fn.value_fn()
        loss_fn = loss_fn.loss_fn
    if _takes_params_alone(loss_fn):
        return loss_fn  # pyright: ignore[reportReturnType]
    return functools.partial(_without_batch if batch is None else _with_batch, loss_fn, batch)


def _takes_params_alone(loss_fn: Callable[..., Any]) -> bool:
    """Whether a batch is bound already, or there is none."""
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 1 and not any(p.kind == p.VAR_POSITIONAL for p in parameters)


def _with_batch(loss_fn: LossFn, batch: Any, params: Any) -> Any:
    return loss_fn(params, batch)


def _without_batch(loss_fn: LossFn, batch: Any, params: Any) -> Any:
    try:
        return loss_fn(params, batch)
    except Exception as error:
        raise ValueError(
            "loss_fn(params, None) failed, and update was called without a batch: pass "
            f"batch=..., or value_fn=.... {PASSES_NOTHING}"
        ) from error


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


def check_scalar(step_loss: StepLoss) -> None:
    """Traces the loss once, so that what is wrong with it is said here and not inside a vmap."""
    try:
        out = jax.eval_shape(step_loss.start)
    except Exception as error:
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
            "value must be the scalar loss at params (loss is another name for it), got shape "
            f"{value.shape} of {value.dtype}"
        )
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(params)]
    as_wide = all(jnp.finfo(value.dtype).bits >= jnp.finfo(wide(dtype)).bits for dtype in dtypes)
    return value if as_wide and all(wide(dtype) == dtype for dtype in dtypes) else None
