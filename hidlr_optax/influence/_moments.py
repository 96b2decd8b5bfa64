"""Moments of influence: mean and spread over refreshes, as arrays inside jit."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._groups import Groups
from hidlr_optax._quadratic import Kept, Quadratic, influence, marginal
from hidlr_optax._state import HiDLRState

LIMB = 2**30  # sizes are stored in two int32: groups of large models outgrow one


class Moments(NamedTuple):
    """Mean and spread of a number over refreshes, per group (Welford 1962).

    Attributes:
      count: () int32 each, refreshes that gave a number.
      mean: () float32 each.
      squares: () float32 each, the sum of squared deviations from the mean.
    """

    count: Any
    mean: Any
    squares: Any


class Running(NamedTuple):
    """Counts and moments that `accumulate` has made so far: O(K) scalars in dicts keyed by label.

    Attributes:
      refreshes: () int32, those of the state at the last call.
      steps: () int32, updates of the optimizer at the last refresh counted.
      counted: () int32, refreshes counted.
      sizes: d_k, (2,) int32 each, d_k = 2³⁰·first + second.
      negative: () int32 each, refreshes with negative curvature.
      unresolved: () int32 each, refreshes without a number for any other reason.
      total: `Moments` of b²/a.
      marginal: `Moments` of the marginal share.
    """

    refreshes: jax.Array
    steps: jax.Array
    counted: jax.Array
    sizes: dict[str, jax.Array]
    negative: dict[str, jax.Array]
    unresolved: dict[str, jax.Array]
    total: Moments
    marginal: Moments


def start(labels: Any, params: Any) -> Running:
    """Starts to count, at nothing.

    Args:
      labels: as `hidlr` takes them.
      params: the parameters that `hidlr` is initialised with; only their shapes are read.

    Returns:
      A pytree for `accumulate`.

    Raises:
      ValueError: the labels do not match the parameters.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> running = hd.influence.start({"w": "weight", "b": "bias"}, {"w": jnp.ones(3), "b": 0.0})
      >>> sorted(running.sizes)
      ['bias', 'weight']
    """
    groups = Groups.of(labels, params)

    def zeros(dtype: Any) -> dict[str, jax.Array]:
        return {name: jnp.zeros((), dtype) for name in groups.names}

    def moments() -> Moments:
        return Moments(zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32))

    sizes = {
        name: jnp.array(divmod(size, LIMB), jnp.int32)
        for name, size in zip(groups.names, groups.sizes, strict=True)
    }
    return Running(
        refreshes=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        counted=jnp.zeros((), jnp.int32),
        sizes=sizes,
        negative=zeros(jnp.int32),
        unresolved=zeros(jnp.int32),
        total=moments(),
        marginal=moments(),
    )


def _add(moments: Moments, values: jax.Array, present: jax.Array) -> Moments:
    """Counts `values`, (K,), where `present`."""
    count = moments.count + present.astype(jnp.int32)
    difference = jnp.where(present, values - moments.mean, 0)
    mean = moments.mean + difference / jnp.maximum(count, 1).astype(jnp.float32)
    squares = moments.squares + difference * (values - mean)
    return Moments(count, mean, jnp.where(present, squares, moments.squares))


def count(running: Running, state: HiDLRState) -> Running:
    """Counts the last refresh of the state, whether or not it has been counted before."""
    names = sorted(running.sizes)

    def pack(group: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.stack([group[name] for name in names])

    def unpack(values: jax.Array) -> dict[str, jax.Array]:
        return {name: values[k] for k, name in enumerate(names)}

    def added(moments: Moments, values: jax.Array, present: jax.Array) -> Moments:
        return Moments(*map(unpack, _add(Moments(*map(pack, moments)), values, present)))

    kept = pack(state.kept)
    seen = (kept == Kept.UPDATED) | (kept == Kept.NOT_CONVEX)
    curvature = pack(state.measured_curvature)
    convex = seen & (curvature > 0)
    alone = Quadratic(pack(state.measured_slope), jnp.where(convex, curvature, 1))
    total = influence(alone)
    convex &= jnp.isfinite(total)
    negative = seen & (curvature < 0)
    unresolved = ~(convex | negative)

    averaged = Quadratic(pack(state.slope), pack(state.curvature), state.coupling)
    share = marginal(averaged)
    return Running(
        refreshes=state.refreshes,
        steps=state.count,
        counted=running.counted + 1,
        sizes=running.sizes,
        negative=unpack(pack(running.negative) + negative.astype(jnp.int32)),
        unresolved=unpack(pack(running.unresolved) + unresolved.astype(jnp.int32)),
        total=added(running.total, total, convex),
        marginal=added(
            running.marginal, share, convex & (averaged.curvature > 0) & jnp.isfinite(share)
        ),
    )
