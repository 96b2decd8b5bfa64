"""Learning rates in one shot, outside training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._checks.loss import bind_loss, check_like, check_loss_fn, check_scalar, fitting
from hidlr_optax._checks.rates import check_rates, check_whole, initial_rates
from hidlr_optax._diagnostics import Kept
from hidlr_optax._groups import Groups
from hidlr_optax._quadratic import Quadratic
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.paper._measurement import Estimator, Measurement, measure
from hidlr_optax.paper._one_step import check_estimator
from hidlr_optax.paper._probes import probes
from hidlr_optax.paper._solvers import parabola_minima

_ROUND_CHANGE = 100.0


class Suggestion(NamedTuple):
    """Rates found by `suggest`. Arrays are ordered like `labels`.

    Attributes:
      labels: the K group names, sorted.
      learning_rates: label -> rate the quadratic asks for, negative where the direction ascends;
        where `kept` is not 0, the scale at which the group was last probed.
      kept: label -> `Kept`: 0, or why there is no rate.
      quadratic: slope and curvature, (K,) each, in learning rates of one.
      offsets: (n, K), the learning rates of the last round's probes.
      changes: (n,), loss at the offsets minus loss at the parameters.
      joint_change: the change of the loss when all groups move at once, each at its own rate. Each
        rate is best while the other groups stand still; where groups pull the same way, together
        they go too far, and this is positive.
    """

    labels: tuple[str, ...]
    learning_rates: dict[str, float]
    kept: dict[str, Kept]
    quadratic: Quadratic
    offsets: jax.Array
    changes: jax.Array
    joint_change: float


def _trust(measured: Measurement) -> jax.Array:
    """(K,) of `Kept`. A search can go on where slope or curvature are lost in rounding."""
    kept = measured.statuses()
    lost = (kept == Kept.NO_SLOPE) | (
        jnp.abs(measured.quadratic.curvature) < measured.least_curvature
    )
    return jnp.where(lost & (kept != Kept.NON_FINITE), Kept.UNRESOLVED, kept)


def _next_scale(rates: jax.Array, found: jax.Array, kept: jax.Array) -> jax.Array:
    """(K,) rates to probe at in the next round, at most a hundred times away."""
    scale = jnp.where(kept == Kept.UPDATED, jnp.abs(found), rates)
    scale = jnp.where(kept == Kept.UNRESOLVED, rates * _ROUND_CHANGE, scale)
    scale = jnp.where(kept == Kept.NON_FINITE, rates / _ROUND_CHANGE, scale)
    return jnp.clip(scale, rates / _ROUND_CHANGE, rates * _ROUND_CHANGE)


def suggest(
    loss_fn: Any,
    params: Any,
    param_labels: Any,
    direction: Any,
    batch: Any = None,
    *,
    init_learning_rate: float | Mapping[str, float] = 1e-3,
    curvature: Estimator = probes(per_group=4),
    rounds: int = 4,
) -> Suggestion:
    """The K learning rates that the loss asks for along one direction: lr_find, per group.

    Probes every group along the direction, fits its parabola and takes the minimum; then probes
    again at the scale found, since a parabola fitted far from its minimum says little where the
    loss is not quadratic. Groups that cannot be resolved are probed a hundred times further out in
    the next round.

    Args:
      loss_fn: (params, batch) -> scalar.
      params: w.
      param_labels: as in `one_step`.
      direction: u, like params, signed like Optax updates: params + u is one step at rate 1. For
        SGD, the negative gradient; for others, the first updates of the optimizer at rate 1.
      batch: handed to `loss_fn`.
      init_learning_rate: the scale of the first round, one for all or `{label: rate}`.
      curvature: the estimator. Those without probes look at derivatives alone: one round is enough.
      rounds: how often to probe. Each costs 4K + 1 evaluations of the loss.

    Returns:
      A `Suggestion`; `plot.fit` draws it. Look at its `joint_change` before using all rates
      together.

    Raises:
      ValueError: as in `one_step`, or `rounds` < 1.

    Example:
      >>> import jax, jax.numpy as jnp, hidlr_optax as hd
      >>> loss_fn = lambda p, batch: 0.5 * p["x"] ** 2 + 50.0 * p["y"] ** 2
      >>> params = {"x": jnp.asarray(50.0), "y": jnp.asarray(1.0)}
      >>> direction = jax.tree.map(jnp.negative, jax.grad(loss_fn)(params, None))
      >>> found = hd.paper.suggest(loss_fn, params, {"x": "x", "y": "y"}, direction)
      >>> {name: round(rate, 4) for name, rate in found.learning_rates.items()}
      {'x': 1.0, 'y': 0.01}
    """
    check_loss_fn(loss_fn)
    check_rates(init_learning_rate)
    check_estimator(curvature, "probes")
    check_whole(rounds, "rounds", 1)
    groups = Groups.of(param_labels, params)
    check_like(direction, params, "direction")
    step_loss = fitting(StepLoss(bind_loss(loss_fn, None, batch, {}), params, direction, groups))
    check_scalar(step_loss)
    rates = groups.pack(initial_rates(init_learning_rate, groups.names))

    @jax.jit
    def one_round(rates: jax.Array) -> tuple[Measurement, jax.Array, jax.Array]:
        measured = measure(curvature, step_loss, rates, batch=batch)
        return measured, *parabola_minima(measured.quadratic, _trust(measured))

    measured, found, kept = one_round(rates)
    for _ in range(rounds - 1):
        rates = _next_scale(rates, found, kept)
        measured, found, kept = one_round(rates)
    rates = jnp.where(kept == Kept.UPDATED, found, rates)
    joint = jax.jit(step_loss)
    return Suggestion(
        labels=groups.names,
        learning_rates=dict(zip(groups.names, map(float, rates), strict=True)),
        kept=dict(zip(groups.names, map(Kept, map(int, kept)), strict=True)),
        quadratic=measured.quadratic,
        offsets=measured.offsets,
        changes=measured.changes,
        joint_change=float(joint(rates)) - float(joint(jnp.zeros_like(rates))),
    )
