"""What several test files need: names that moved between jax versions, and lenient promotion."""

import jax
import optax

try:
    from jax import enable_x64, shard_map
except ImportError:  # the oldest jax that we support
    from jax.experimental import enable_x64
    from jax.experimental.shard_map import shard_map

__all__ = ["counted", "enable_x64", "promoting", "shard_map"]


def promoting(mode, tx):
    """`tx` under a promotion rule of its own: some of Optax's parts are not written strictly."""
    if not isinstance(tx, optax.MultiSteps):  # takes keywords, but is no GradientTransformation
        tx = optax.with_extra_args_support(tx)

    def init(params):
        with jax.numpy_dtype_promotion(mode):
            return tx.init(params)

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion(mode):
            return tx.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(init, update)


def counted(loss_fn):
    """The loss, and a list that grows by one whenever it is evaluated at run time."""
    calls = []

    def counting(params, batch):
        value = loss_fn(params, batch)
        jax.debug.callback(lambda value: calls.append(value), value)
        return value

    return counting, calls
