"""What several test files need: names that moved between jax versions, and lenient promotion."""

import jax
import optax

import hidlr_optax as hd

try:
    from jax import enable_x64, shard_map
except ImportError:  # the oldest jax that we support
    from jax.experimental import enable_x64
    from jax.experimental.shard_map import shard_map

__all__ = [
    "bare",
    "bare_ulr",
    "counted",
    "coupled_hidlr",
    "coupled_ulr",
    "enable_x64",
    "promoting",
    "shard_map",
]

_BARE = {
    "slope": None,
    "solver": hd.diagonal(),
    "curvature": hd.probes(per_group=4),
    "warmup": 0,
}


def bare(loss_fn, param_labels, **kwargs):
    """`hidlr` with one parabola per group and nothing around it: what is easy to predict."""
    return hd.hidlr(loss_fn, param_labels, **_BARE | kwargs)


def bare_ulr(loss_fn, **kwargs):
    """`hiulr` likewise."""
    return hd.hiulr(loss_fn, **_BARE | kwargs)


def coupled_hidlr(
    loss_fn,
    param_labels,
    *,
    init_learning_rate=1e-3,
    update_interval=10,
    schedule=None,
    curvature=hd.probes(),
    slope="lagged",
    solver=hd.coupled(),
    ema_decay=None,
    max_rise=None,
    warmup=20,
    lagged_dtype=None,
):
    """`hidlr` with the rule that was its default before `hold`.

    Its arguments are spelt out, so that `inject_hyperparams` takes it as it takes `hidlr`.
    """
    return hd.hidlr(
        loss_fn,
        param_labels,
        init_learning_rate=init_learning_rate,
        update_interval=update_interval,
        schedule=schedule,
        curvature=curvature,
        slope=slope,
        solver=solver,
        ema_decay=ema_decay,
        max_rise=max_rise,
        warmup=warmup,
        lagged_dtype=lagged_dtype,
    )


def coupled_ulr(loss_fn, **kwargs):
    """`hiulr` likewise."""
    return hd.hiulr(loss_fn, **{"solver": hd.coupled()} | kwargs)


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
