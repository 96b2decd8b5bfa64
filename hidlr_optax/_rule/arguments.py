"""Arguments of `hidlr` and `update`: checked at the door, with errors that say how to mend them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hidlr_optax._groups import OUTSIDE, wide
from hidlr_optax._paths import leaf_paths
from hidlr_optax._rule.advice import model_hint, whole_numbers
from hidlr_optax._rule.hold import Hold
from hidlr_optax._step_loss import SLOPE_SOURCES, SlopeSource, StepLoss
from hidlr_optax.curvature._measurement import Estimator, fits_slope
from hidlr_optax.solvers import Coupled, Diagonal

LossFn = Callable[[Any, Any], jax.Array]
ValueFn = Callable[[Any], jax.Array]
Slope = Literal["gradient", "lagged", "probes"]


def _is_concrete(value: Any) -> bool:
    return not isinstance(value, Tracer)  # inject_hyperparams hands tracers to factories


def _check_rate(rate: Any, where: str) -> None:
    if callable(rate):
        raise ValueError(
            f"{where} must be a number, got a callable: a schedule goes into schedule=..."
        )
    if _is_concrete(rate) and not (np.isfinite(float(rate)) and float(rate) > 0):
        raise ValueError(f"{where} must be finite and > 0, got {rate}")


def _check_part(part: Any, members: tuple[str, ...], argument: str, examples: str) -> None:
    """By protocol: what has these members can be used."""
    missing = [name for name in members if not hasattr(part, name)]
    if isinstance(part, type) or missing:
        lacks = "a class, not a value" if isinstance(part, type) else f"without {missing}"
        raise ValueError(
            f"{argument} must be {examples}, or a value of your own with {list(members)}; got "
            f"{part!r}, {lacks}"
        )


def check_solver(solver: Any, ema_decay: Any, max_rise: Any) -> None:
    """Raises a ValueError unless this is a solver, and what is given beside it has an effect."""
    given = {"ema_decay": ema_decay, "max_rise": max_rise}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(solver, Hold):
        if given:
            raise ValueError(
                f"{given} has no effect with hold(), which has averages and a guard of its own; "
                "leave it out, or use coupled(), diagonal() or a solver of your own"
            )
        return
    _check_part(solver, ("solve",), "solver", "a solver such as hold(), coupled() or diagonal()")
    for name, argument in {"averaging": "ema_decay", "max_rise": "max_rise"}.items():
        value = getattr(solver, name, None)
        is_deprecated = isinstance(solver, Coupled | Diagonal) and argument not in given
        if value is not None and not is_deprecated:
            raise ValueError(
                f"{name} is not the solver's: leave it out of {solver!r} and pass "
                f"hidlr(..., {argument}={given.get(argument, value)})"
            )
    if ema_decay is not None and _is_concrete(ema_decay) and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}; 0 is no averaging")
    if max_rise is not None and _is_concrete(max_rise) and not max_rise >= 0:
        raise ValueError(f"max_rise must be >= 0, got {max_rise}; math.inf is no guard")


def check_arguments(
    loss_fn: Any,
    init_learning_rate: Any,
    update_interval: Any,
    schedule: Any,
    curvature: Any,
    slope: Any,
    warmup: Any,
) -> None:
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(
            f"loss_fn must be a callable (params, batch) -> scalar, or None where update is given "
            f"value_fn, got {type(loss_fn).__name__}"
        )
    if schedule is not None and not callable(schedule):
        raise ValueError(f"schedule must be a callable step -> factor, or None, got {schedule!r}")
    if isinstance(init_learning_rate, Mapping):
        for name, rate in init_learning_rate.items():
            _check_rate(rate, f"init_learning_rate[{name!r}]")
    elif init_learning_rate is not None:
        _check_rate(init_learning_rate, "init_learning_rate")
    if _is_concrete(warmup) and (warmup < 0 or warmup != int(warmup)):
        raise ValueError(f"warmup must be a whole number >= 0, got {warmup}")
    if init_learning_rate is None and _is_concrete(warmup) and warmup == 0:
        raise ValueError("init_learning_rate=None is found during warm-up, but warmup is 0")
    if _is_concrete(update_interval) and (
        update_interval < 1 or update_interval != int(update_interval)
    ):
        raise ValueError(f"update_interval must be a whole number >= 1, got {update_interval}")
    estimator_members = "estimate", "couples", "separates"
    _check_part(curvature, estimator_members, "curvature", "an estimator such as probes()")
    if slope not in SLOPE_SOURCES:
        raise ValueError(f"slope must be 'gradient', 'lagged', 'probes' or None, got {slope!r}")
    if slope == "probes" and not fits_slope(curvature):
        raise ValueError(
            f"slope='probes' fits two unknowns per group, and probes() needs per_group >= 2, got "
            f"{curvature!r}; with slope='gradient' one probe per group is enough"
        )


def check_like(tree: Any, params: Any, name: str) -> None:
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


def check_gradient(
    source: SlopeSource, estimator: Estimator, init_learning_rate: Any, grad: Any, params: Any
) -> None:
    """Raises a ValueError where there is no gradient and one is needed, or it is none of params."""
    if grad is not None:
        check_like(grad, params, "grad")
    elif init_learning_rate is None:
        raise ValueError(
            "init_learning_rate=None is found from the gradient: pass grad=... to update, or a "
            "number to hidlr"
        )
    elif source.needs_gradient:
        raise ValueError(
            f"slope={source.name!r} needs the raw gradient of the loss: pass grad=... to update, "
            "before any clipping or preconditioning (in linen, hidlr_optax.flax.TrainState does). "
            "If it was passed: a wrapper around the chain (optax.lookahead is one) drops keywords, "
            "and hidlr cannot work inside of it"
        )
    elif not fits_slope(estimator):
        raise ValueError(
            f"{estimator!r} cannot fit the slope as well: pass grad=... to update, or use probes() "
            "with per_group >= 2"
        )


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


def check_scalar(step_loss: StepLoss, no_batch: bool) -> bool:
    """Traces the loss once, so that what is wrong with it is said here and not inside a vmap.

    Returns whether JAX can differentiate it in forward mode, as far as its jaxpr tells.
    """
    try:
        jaxpr, out = jax.make_jaxpr(step_loss.start, return_shape=True)()
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
    return not _has_own_backward_pass(jaxpr.jaxpr)


def _has_own_backward_pass(jaxpr: Any) -> bool:
    """Whether there is a `jax.custom_vjp` in it, which says so at lowering alone."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("custom_vjp"):
            return True
        for part in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(part, "jaxpr", part)  # of a ClosedJaxpr
            if hasattr(inner, "eqns") and _has_own_backward_pass(inner):
                return True
    return False


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
