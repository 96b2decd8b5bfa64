"""The front door of the family that moves the rates to the minimum of the next loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._branch import where_due
from hidlr_optax._checks.advice import unjitted_watch, warn_of_peak
from hidlr_optax._checks.loss import (
    LossFn,
    bind_loss,
    check_like,
    check_loss_fn,
    check_scalar,
    fitting,
    named_otherwise,
    usable_value,
)
from hidlr_optax._checks.rates import check_rates, check_schedule, check_whole, is_concrete
from hidlr_optax._groups import Groups
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.paper._measurement import Estimator, fits_slope
from hidlr_optax.paper._probes import probes
from hidlr_optax.paper._refresh import Known, Rule, Slope
from hidlr_optax.paper._solvers import Diagonal, Solver, coupled
from hidlr_optax.paper._state import Stored, initial_state, pack, unpack

_MAX_RISE = 0.2  # of the loss, that the guard lets pass


def one_step(
    loss_fn: LossFn | None,
    param_labels: Any,
    *,
    init_learning_rate: float | Mapping[str, float] | None = 1e-3,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    curvature: Estimator = probes(),
    slope: Slope | None = "lagged",
    solver: Solver = coupled(),
    ema_decay: float = 0.9,
    max_rise: float | None = None,
    warmup: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """The rates at the minimum of the next loss: the family of rules that the paper belongs to.

    Takes the incoming updates as the direction u and multiplies group k by η_k. They have to be
    descending and at rate one, as those of `optax.adamw(1.0)` are. Every `update_interval` steps,
    an estimator measures L(w + Σ η_k u_k) − L(w) ≈ −bᵀη + ½ ηᵀAη (arXiv 2501.06954, eq. 2.3), b
    and A are averaged over refreshes, and a solver moves the rates to the minimum. `paper_hidlr` is
    the paper's own choice of the three.

    `update(updates, state, params, *, batch, value, grad, value_fn, refresh)` is that of `hidlr`,
    but **what it is told is believed**: `value` has to be the probed loss at `params`, of the same
    batch and dropout key, and `grad` its raw gradient. Nothing compares them with the loss.
    `take_step` cannot be fed wrongly. Without `value`, the loss is evaluated.

    Args:
      loss_fn: (params, batch) -> scalar; None if `update` is always given `value_fn`. It has to be
        the same function at all probes of a refresh: fix dropout keys and batch statistics.
      param_labels: a pytree of str like params, a prefix of it, or a callable from params to one.
      init_learning_rate: η to begin with, one number for all groups or `{label: rate}`. With
        `warmup` and `grad`, it is brought within a factor of ten of where the first step, by its
        slope, changes the loss by a hundredth; None: it is set to that.
      update_interval: Φ ≥ 1, steps from refresh to refresh.
      schedule: step -> factor, 1 at its peak; multiplies all rates.
      curvature: the estimator, from `probes`, `secant`, `hessian` or `gauss_newton`, or an
        `Estimator` of your own.
      slope: where b comes from. "lagged": slope and curvature along the previous step, which the
        present batch has not made, b_k = −⟨∇L_k, u_k⟩ + (Aη)_k at its start. "gradient":
        b_k = −⟨∇L_k, u_k⟩ along the coming step, on the batch that made u_k: for full batches; on
        mini-batches it is too steep. "probes": fitted together with the curvature, on whatever
        `batch` is passed, such as the next or a held-out one. None: "gradient" at calls with
        `grad`, "probes" at others.
      solver: from `coupled` or `diagonal`, or a `Solver` of your own.
      ema_decay: β in [0, 1), of the moving averages of slope and curvature over refreshes, which
        the solver is given; 0: those of the newest refresh alone.
      max_rise: of the guard, ≥ 0. After every refresh the loss is evaluated once more, where the
        coming step would lead. If it rises by more than this part of itself, all rates are cut to
        the minimum of a parabola along the step, by two to ten. `math.inf`: no guard. None: no
        guard with `diagonal`, 0.2 with other solvers.
      warmup: the number of first updates with a refresh at each. 0: none of this.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `OneStepState`.

    Raises:
      ValueError: an argument is out of range; from `init`, labels or rates do not match the
        parameters; from `update`, there are no params, no loss, or no gradient where one is needed.

    Warns:
      UserWarning: `schedule` stays far below one or exceeds it, or `update` is called again outside
        of jit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> loss_fn = lambda params, batch: 0.5 * params["x"] ** 2 + 50.0 * params["y"] ** 2
      >>> params = {"x": jnp.asarray(50.0), "y": jnp.asarray(1.0)}
      >>> rule = hd.paper.one_step(
      ...     loss_fn, {"x": "x", "y": "y"}, curvature=hd.paper.hessian(), slope="gradient",
      ...     solver=hd.paper.diagonal(max_change=None))
      >>> tx = optax.chain(optax.sgd(1.0), rule)
      >>> value, grad = jax.value_and_grad(loss_fn)(params, None)
      >>> updates, state = tx.update(grad, tx.init(params), params, value=value, grad=grad)
      >>> rates = optax.tree.get(state, "group_learning_rates")
      >>> {name: round(float(rate), 4) for name, rate in rates.items()}
      {'x': 1.0, 'y': 0.01}
    """
    _check_arguments(loss_fn, schedule, curvature, slope, solver)
    _check_numbers(init_learning_rate, update_interval, warmup, ema_decay, max_rise)
    warn_of_peak(schedule)
    watch = unjitted_watch()
    rule = Rule(solver, curvature, slope, ema_decay, _rise(max_rise, solver), warmup > 0)

    def init_fn(params: Any) -> Stored:
        return initial_state(
            params, param_labels, init_learning_rate, curvature.couples, rule.looks_back
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        batch: Any = None,
        value: Any = None,
        grad: Any = None,
        value_fn: Callable[..., Any] | None = None,
        refresh: Any = True,
        **extra_args: Any,
    ) -> tuple[Any, Stored]:
        if params is None:
            raise ValueError(
                "hidlr probes the loss around params: call update(updates, state, params, ...)"
            )
        groups = Groups.of(param_labels, params)
        check_like(updates, params, "updates")
        _check_gradient(rule, init_learning_rate, grad, params)
        value, value_fn = named_otherwise(value, value_fn, extra_args)
        loss = bind_loss(loss_fn, value_fn, batch, extra_args)
        coming = fitting(StepLoss(loss, params, updates, groups))
        check_scalar(coming)
        known = Known(coming, state.direction, usable_value(value, params), grad, batch)
        new = pack(state, groups)
        if refresh is not False:  # not even a branch is left in the program then
            due = _is_due(state.count, update_interval, warmup) & jnp.asarray(refresh)
            new = where_due(due, lambda: rule.refresh(pack(state, groups), known), new)
        watch((updates, params, state.count))
        factor = jnp.asarray(1.0 if schedule is None else schedule(state.count), jnp.float32)
        new = new._replace(
            count=optax.safe_increment(state.count),
            applied=new.group_learning_rates * factor,
            direction=optax.tree.cast_like(updates, state.direction) if rule.looks_back else (),
        )
        return groups.scale(updates, new.group_learning_rates * factor), unpack(new, groups)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rise(max_rise: Any, solver: Solver) -> Any:
    """The rise that the guard lets pass; None where there is no guard."""
    if max_rise is None:
        return None if isinstance(solver, Diagonal) else _MAX_RISE  # the paper's closed form
    is_off = not isinstance(max_rise, jax.Array) and math.isinf(max_rise)
    return None if is_off else max_rise


def _is_due(count: jax.Array, update_interval: Any, warmup: Any) -> jax.Array:
    interval, first = (jnp.asarray(x).astype(jnp.int32) for x in (update_interval, warmup))
    return (count % interval == 0) | (count < first)


def _check_part(part: Any, members: tuple[str, ...], argument: str, examples: str) -> None:
    """By protocol: what has these members can be used."""
    missing = [name for name in members if not hasattr(part, name)]
    if isinstance(part, type) or missing:
        lacks = "a class, not a value" if isinstance(part, type) else f"without {missing}"
        raise ValueError(
            f"{argument} must be {examples}, or a value of your own with {list(members)}; got "
            f"{part!r}, {lacks}"
        )


def check_estimator(curvature: Any, slope: Any) -> None:
    """Raises a ValueError unless this is an estimator, and slopes come from where they can."""
    _check_part(curvature, ("estimate", "couples"), "curvature", "an estimator such as probes()")
    if slope not in ("gradient", "lagged", "probes", None):
        raise ValueError(f"slope must be 'gradient', 'lagged', 'probes' or None, got {slope!r}")
    if slope == "probes" and not fits_slope(curvature):
        raise ValueError(
            f"slope='probes' fits two unknowns per group, and probes() needs per_group >= 2, got "
            f"{curvature!r}; with slope='gradient' one probe per group is enough"
        )


def _check_arguments(loss_fn: Any, schedule: Any, curvature: Any, slope: Any, solver: Any) -> None:
    check_loss_fn(loss_fn)
    check_schedule(schedule)
    check_estimator(curvature, slope)
    _check_part(solver, ("solve",), "solver", "a solver such as coupled() or diagonal()")


def _check_numbers(
    initial: Any, update_interval: Any, warmup: Any, ema_decay: Any, max_rise: Any
) -> None:
    check_rates(initial)
    check_whole(warmup, "warmup", 0)
    check_whole(update_interval, "update_interval", 1)
    if initial is None and is_concrete(warmup) and warmup == 0:
        raise ValueError("init_learning_rate=None is found during warm-up, but warmup is 0")
    if is_concrete(ema_decay) and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}; 0 is no averaging")
    if max_rise is not None and is_concrete(max_rise) and not max_rise >= 0:
        raise ValueError(f"max_rise must be >= 0, got {max_rise}; math.inf is no guard")


def _check_gradient(rule: Rule, init_learning_rate: Any, grad: Any, params: Any) -> None:
    """Raises a ValueError where there is no gradient and one is needed, or it is none of params."""
    if grad is not None:
        check_like(grad, params, "grad")
    elif init_learning_rate is None:
        raise ValueError(
            "init_learning_rate=None is found from the gradient: pass grad=... to update, or a "
            "number to one_step"
        )
    elif rule.slope in ("lagged", "gradient"):
        raise ValueError(
            f"slope={rule.slope!r} needs the raw gradient of the loss: pass grad=... to update, "
            "before any clipping or preconditioning (in linen, hidlr_optax.flax.TrainState does). "
            "If it was passed: a wrapper around the chain (optax.lookahead is one) drops keywords, "
            "and hidlr cannot work inside of it"
        )
    elif not fits_slope(rule.estimator):
        raise ValueError(
            f"{rule.estimator!r} cannot fit the slope as well: pass grad=... to update, or use "
            "probes() with per_group >= 2"
        )
