"""One call for a training step: loss, gradient and probes go to the optimizer from one function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._paths import nodes
from hidlr_optax.report._find import is_state


def as_value_fn(loss_fn: Callable[..., Any], has_aux: bool, *args: Any, **kwargs: Any) -> Any:
    """The loss of the parameters alone, without auxiliary outputs."""

    def value_fn(params: Any) -> Any:
        out = loss_fn(params, *args, **kwargs)
        return out[0] if has_aux else out

    return value_fn


def evaluated(
    out_and_grad: tuple[Any, Any], has_aux: bool, edit: Callable[[Any], Any] | None
) -> tuple[Any, Any, dict[str, Any]]:
    """Returned loss, the gradient that the optimizer gets, and what `hidlr` is told.

    The optimizer's is edited, and of complex parameters conjugated, as Optax has it.
    """
    out, grad = out_and_grad
    downhill = jax.tree.map(jnp.conj, grad)
    downhill = downhill if edit is None else edit(downhill)
    return out, downhill, {"value": out[0] if has_aux else out, "grad": grad}


def unless_default(refresh: Any) -> dict[str, Any]:
    """`refresh` as a keyword, where it says anything: not every transformation knows it."""
    return {} if refresh is True else {"refresh": refresh}


def _check_order(tx: Any, loss_fn: Any, params: Any, state: Any) -> None:
    """Raises a TypeError unless the first arguments of `take_step` are these."""
    if not hasattr(tx, "update") or not callable(loss_fn):
        raise TypeError(
            "take_step(tx, loss_fn, params, state, *args) takes the transformation and then the "
            f"loss, got {type(tx).__name__} and {type(loss_fn).__name__}"
        )
    if nodes(params, is_state) and not nodes(state, is_state):
        raise TypeError(
            "take_step(tx, loss_fn, params, state, *args) takes the parameters and then the state: "
            "the parameters that it was given hold the state of an optimizer"
        )


def take_step(
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Any],
    params: Any,
    state: Any,
    *args: Any,
    has_aux: bool = False,
    value_and_grad: Callable[..., Any] | None = None,
    edit: Callable[[Any], Any] | None = None,
    refresh: Any = True,
    **kwargs: Any,
) -> tuple[Any, Any, Any]:
    """One training step: takes loss and gradient, and hands both and the probes to the optimizer.

    What `jax.value_and_grad`, `tx.update` and `optax.apply_updates` do, in one call that cannot be
    fed with a loss of one function and a gradient or probes of another. Build the chain with
    `hidlr(None, labels)`. For chains without `hidlr` it is the same step. Put it under `jax.jit`.

    Args:
      tx: the chain.
      loss_fn: (params, *args, **kwargs) -> loss, or (loss, auxiliary outputs) with `has_aux`.
      params: the parameters.
      state: of `tx`.
      *args: handed to `loss_fn`: the batch, a dropout key, batch statistics.
      has_aux: as `jax.value_and_grad` has it.
      value_and_grad: instead of `jax.value_and_grad(loss_fn)`, with the same arguments and
        results: an own gradient, accumulated over mini-batches or averaged over devices. The loss
        and the raw gradient of `loss_fn` for these arguments.
      edit: gradient -> gradient, before the optimizer gets it, such as a clip; slopes are taken
        from the raw one. Gradients of complex parameters are conjugated before.
      refresh: as `hidlr` has it: False to leave the rates alone at this step. A static argument of
        the jitted step makes two programs of it, one without a branch.
      **kwargs: handed to `loss_fn`.

    Returns:
      The new parameters, the new state of `tx`, and what `loss_fn` returned at the old parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = optax.chain(optax.sgd(1.0), hd.hiulr(None))
      >>> step = jax.jit(lambda *now: hd.take_step(tx, loss_fn, *now))
      >>> params, state, loss = step(params, tx.init(params), jnp.ones((4, 2)))
      >>> float(loss), bool(loss_fn(params, jnp.ones((4, 2))) < loss)
      (1.0, True)
    """
    _check_order(tx, loss_fn, params, state)
    take = value_and_grad or jax.value_and_grad(loss_fn, has_aux=has_aux)
    out, grad, known = evaluated(take(params, *args, **kwargs), has_aux, edit)
    value_fn = as_value_fn(loss_fn, has_aux, *args, **kwargs)
    updates, state = optax.with_extra_args_support(tx).update(
        grad, state, params, value_fn=value_fn, **known, **unless_default(refresh)
    )
    return optax.apply_updates(params, updates), state, out
