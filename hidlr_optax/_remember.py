"""A loss that remembers its batch, for loops that hand nothing but gradients to the optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

WAYS = (
    "Put remember_batch around jax.checkpoint, and around everything else that the loss is inside "
    "of; or pass batch=... or value_fn=... to update; or bind a sample when the optimizer is made, "
    "loss_fn=functools.partial(loss_fn, batch=sample)"
)


def _trace(leaf: Any) -> Any:
    return getattr(leaf, "_trace", None)  # arrays that are no tracers have none


def _is_inside(inner: Any, outer: Any) -> bool:
    """Whether one trace is another, or inside of it; True where this version of JAX cannot say."""
    while inner is not None and inner is not outer:
        if not hasattr(inner, "parent_trace"):
            return type(inner).__name__ == "DynamicJaxprTrace"  # of older versions
        inner = inner.parent_trace
    return inner is outer


class RememberingLoss:
    """What `remember_batch` returns: the loss, and what it was last differentiated with.

    Args:
      loss_fn: (params, *args, **kwargs) -> loss, or (loss, auxiliary outputs).
      bind: makes a function of the parameters alone from what `loss_fn` was called with.
      differentiated: the parameters in the first argument of `loss_fn`.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        bind: Callable[..., Any],
        differentiated: Callable[[Any], Any] = lambda params: params,
    ):
        functools.update_wrapper(self, loss_fn)
        self.loss_fn, self._bind, self._differentiated = loss_fn, bind, differentiated
        self._last: tuple[Any, Any] | None = None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the loss. Where the parameters are being differentiated, remembers the rest."""
        here = jnp.zeros(())  # belongs to the trace of jit, of a scan, or to none
        leaves = jax.tree.leaves(self._differentiated(params))
        traces = [_trace(leaf) for leaf in leaves if isinstance(leaf, Tracer)]
        if any(trace is not _trace(here) for trace in traces):
            self._last = here, self._bind(params, *args, **kwargs)
        return self.loss_fn(params, *args, **kwargs)

    def value_fn(self) -> Callable[[Any], Any]:
        """The loss of the parameters on the batch of the last gradient of this trace.

        Raises:
          ValueError: there was none, or its trace is over.
        """
        if self._last is None:
            raise ValueError(
                "remember_batch has nothing to remember: in this jitted step, jax.grad has not "
                "differentiated the loss that it returned. The loop and hidlr need the same one: "
                f"loss_fn = hd.remember_batch(loss_fn), once, for both. {WAYS}"
            )
        there, value_fn = self._last
        if not _is_inside(_trace(jnp.zeros(())), _trace(there)):
            raise ValueError(
                "remember_batch holds the batch of another trace than that of this update: the "
                "gradient was taken in a jit of its own, in a scan over mini-batches, or in no jit "
                f"at all. {WAYS}"
            )

        def checked(params: Any) -> Any:
            try:
                return value_fn(params)
            except jax.errors.UnexpectedTracerError as error:
                raise ValueError(
                    "remember_batch holds the batch of a trace that is over, such as jax.vmap over "
                    f"examples. {WAYS}"
                ) from error

        return checked


def remember_batch(loss_fn: Callable[..., Any]) -> RememberingLoss:
    """A loss that remembers its batch, for loops that call `tx.update(grads, state, params)`.

    Give the loop this loss, and `hessian_informed` the same one. While a training step is traced,
    the loop differentiates the loss, which remembers what it was called with beside the parameters;
    when `update` is given neither `batch` nor `value_fn`, `hidlr` evaluates the loss with that.
    Nothing is remembered from step to step.

    Gradient and update have to be in one trace: in one `jax.jit` or body of a scan, or both in
    none. Where they are not (a scan over mini-batches, a jit around the gradient alone), or where
    this loss is inside of `jax.checkpoint` or a `jax.vmap` over examples, `update` raises an error
    that says what to do. Of several gradients in one step, the last counts.

    Parameters that are None in `update` (a filtered Equinox model, what is frozen) are taken from
    the call. For losses of nnx models, see `hidlr_optax.flax.remember_batch`.

    Args:
      loss_fn: (params, *args, **kwargs) -> loss, or (loss, auxiliary outputs).

    Returns:
      A callable with the arguments and results of `loss_fn`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> @hd.remember_batch
      ... def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
      >>> tx = hd.hessian_informed(optax.sgd(1.0), loss_fn, "all")
      >>> @jax.jit
      ... def step(params, state, batch):  # as the libraries have it
      ...     loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     params, state, loss = step(params, state, jnp.ones((4, 2)))
      >>> bool(loss < 1.0), int(hd.metrics(state)["refreshes"])
      (True, 3)
    """

    def bind(whole: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        def value_fn(params: Any) -> Any:
            out = loss_fn(_filled(params, whole), *args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        return value_fn

    return RememberingLoss(loss_fn, bind)


def _filled(params: Any, whole: Any) -> Any:
    """The parameters, with what the loop had called the loss with where they are None."""

    def is_none(leaf: Any) -> bool:
        return leaf is None

    if not any(map(is_none, jax.tree.leaves(params, is_leaf=is_none))):
        return params
    return jax.tree.map(lambda p, w: w if p is None else p, params, whole, is_leaf=is_none)
