"""The mean of a loss over devices, with a gradient that is the mean as well."""

from collections.abc import Callable
from typing import Any

import jax


def pmean_loss(loss_fn: Callable[..., Any], axis_name: Any) -> Callable[..., Any]:
    """The mean over devices of a loss and of its gradient, for `pmap`.

    `jax.lax.pmean` of a loss is not enough: its gradient under `pmap` is that of the device's own
    part, so learning rates, and then parameters, would come to differ from device to device. With
    this loss in `take_step`, or in `hidlr` and `hessian_informed`, everything is alike everywhere.
    The same holds for `shard_map(check_vma=False)`. With its default, `jax.lax.pmean` is enough.

    Args:
      loss_fn: (params, *args, **kwargs) -> loss, or (loss, auxiliary outputs), of one device's
        data. Auxiliary outputs are averaged as well.
      axis_name: of `pmap`.

    Returns:
      A function with the arguments and results of `loss_fn`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
      >>> tx = optax.chain(optax.sgd(1.0), hd.hiulr(None))
      >>> def step(params, state, batch):
      ...     return hd.take_step(tx, hd.pmean_loss(loss_fn, "d"), params, state, batch)
      >>> params = {"w": jnp.zeros(2)}
      >>> one = jax.tree.map(lambda leaf: leaf[None], (params, tx.init(params), jnp.ones((4, 2))))
      >>> params, state, loss = jax.pmap(step, "d")(*one)
      >>> loss.tolist()
      [1.0]
    """

    def mean(values: Any) -> Any:
        return jax.lax.pmean(values, axis_name)

    def shared(leaf: Any) -> Any:
        """The leaf itself, whose cotangents of all devices are averaged."""
        if not jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.numpy.inexact):
            return leaf
        return jax.custom_derivatives.linear_call(
            lambda _, x: x, lambda _, cotangent: mean(cotangent), (), leaf
        )

    def mean_loss(params: Any, *args: Any, **kwargs: Any) -> Any:
        return mean(loss_fn(jax.tree.map(shared, params), *args, **kwargs))

    return mean_loss
