"""The Optax transformations: `hidlr`, `hiulr`, and `multi_steps` around a chain of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._checks.advice import finds_rates, unjitted_watch, warn_of_peak
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
from hidlr_optax._checks.rates import (
    check_bounds,
    check_rates,
    check_schedule,
    check_whole,
    initial_rates,
    is_concrete,
    packed_bounds,
)
from hidlr_optax._groups import Groups, is_placeholder
from hidlr_optax._rule import hold
from hidlr_optax._rule.measure import Call
from hidlr_optax._state import Stored, clock, initial_state, pack, unpack
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.report import find_state


@finds_rates
def hidlr(
    loss_fn: LossFn | None,
    param_labels: Any,
    *,
    init_learning_rate: float | Mapping[str, float] | None = None,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    warmup: int = 20,
    bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Hessian-informed differential learning rates: one rate per group of parameters.

    Takes the incoming updates as the direction u and multiplies group k by η_k. They have to be
    descending and at rate one, as those of `optax.adamw(1.0)` are. Every `update_interval` steps it
    looks back along the last step with the present batch, and moves the rates: the proportions of
    the groups by what each of them costs, the joint rate by how far the step went along its
    parabola. This costs one forward pass, for K > 1 one gradient, whatever K is. The rates of the
    groups may differ by any factor. For Algorithm 1 of the paper (arXiv 2501.06954) to the letter,
    see `paper_hidlr`.

    `update(updates, state, params, *, batch, value, grad, value_fn, refresh)` takes, beside what
    every transformation takes:

    * `grad`: the raw gradient of the loss at `params`, before any preconditioning.
    * `batch`: handed to `loss_fn`.
    * `value_fn`: params -> scalar, takes the place of `loss_fn` and `batch`. Keywords of `update`
      that its signature names are handed on to it, as Optax's line searches do. Called `obj_fn` or
      `loss_fn`, it is understood as well.
    * `value`: the loss at `params`, of this `batch` and no other; or `loss`. It spares one
      evaluation at each refresh, and lets the guard see every step.
    * `refresh`: a bool, False to leave the rates alone at this call. See `multi_steps`. Python's
      own `False`, or a static argument of the jitted step, leaves the refresh out of the program.

    At the first update, `value` is compared with the loss. Where it is another's, nothing can be
    measured: the rates stay, and `explain` says so. `grad` is believed: `take_step` cannot be fed
    wrongly. Other keywords are ignored. What `optax.lbfgs` is told is enough. For loops that tell
    less, see `hessian_informed` and `remember_batch`.

    Jit the training step: un-jitted, every refresh compiles the loss again. Under `vmap`, both
    branches of the refresh are evaluated at every step. Under `shard_map`, `pmean` the loss,
    `value` and `grad`: what differs from device to device is refused. Under `pmap` and
    `check_vma=False` it is not, and replicas drift apart: use `pmean_loss`.

    Args:
      loss_fn: (params, batch) -> scalar; None if `update` is always given `value_fn`. The same
        function as that of `value` and `grad`: fix dropout keys and batch statistics. One of params
        alone, such as `functools.partial(loss_fn, batch=sample)`, needs no `batch`.
      param_labels: a pytree of str like params, a prefix of it, or a callable from params to one.
      init_learning_rate: `{label: rate}`, the proportions that groups have unless their measured
        ones are far from them. Their size is found. With `warmup=0`, the rates themselves to begin
        with, one number for all groups or `{label: rate}`. None: all alike, and found.
      update_interval: Φ ≥ 1, steps from refresh to refresh. If more than one, it becomes longer in
        long runs: twice as long after 50 intervals, and whenever the run has become twice as long.
      schedule: step -> factor, 1 at its peak; multiplies all rates. The rule knows it and does not
        undo it.
      warmup: the number of looks in which the rates are found, by a refresh at each update. Only
        looks that measure something count. 0: the rates begin as they are given.
      bounds: `{label: (lowest, highest)}`, None for no bound, before the schedule: `(None, 1e-3)`
        is a ceiling, `(1e-3, 1e-3)` holds a rate while the others are found. For given ratios of
        rates, see `scale_by_label`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `HiDLRState`.

    Raises:
      ValueError: an argument is out of range; from `init`, labels or rates do not match the
        parameters; from `update`, there are no params, no loss or no gradient.

    Warns:
      UserWarning: `schedule` stays far below one or exceeds it, or `update` is called again outside
        of jit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((batch @ params["w"] + params["b"] - 1.0) ** 2)
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
      >>> labels = {"w": "weight", "b": "bias"}
      >>> tx = optax.chain(optax.sgd(1.0), hd.hidlr(loss_fn, labels))
      >>> state = tx.init(params)
      >>> batch = jnp.ones((4, 2))
      >>> value, grad = jax.value_and_grad(loss_fn)(params, batch)
      >>> updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
      >>> sorted(optax.tree.get(state, "group_learning_rates"))
      ['bias', 'weight']
    """
    _check_arguments(loss_fn, init_learning_rate, update_interval, schedule, warmup)
    check_bounds(bounds)
    warn_of_peak(schedule)
    watch = unjitted_watch()

    def init_fn(params: Any) -> Stored:
        state = initial_state(params, param_labels, init_learning_rate)
        if not is_placeholder(params):
            packed_bounds(bounds, tuple(state.group_learning_rates))
        return state

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
        groups = _checked_groups(param_labels, params, updates, grad)
        value, value_fn = named_otherwise(value, value_fn, extra_args)
        loss = bind_loss(loss_fn, value_fn, batch, extra_args)
        coming = fitting(StepLoss(loss, params, updates, groups))
        check_scalar(coming)
        value = usable_value(value, params)
        # The rates are constants to whoever differentiates through a step.
        known = jax.lax.stop_gradient((params, updates, state.direction, grad, value))
        call = Call(coming.loss, groups, *known)
        now = clock(state.count, update_interval, warmup, schedule, refresh)
        asked = _proportions(init_learning_rate, groups)
        new, harmed = hold.update(pack(state, groups), call, now, asked)
        new = _bounded(new, packed_bounds(bounds, groups.names))
        watch((updates, params, state.count))
        step = groups.scale(updates, new.applied)
        back = groups.scale(state.direction, -state.applied)
        step = jax.tree.map(lambda u, v: jnp.where(harmed, v.astype(u.dtype), u), step, back)
        count = jnp.asarray(optax.safe_increment(state.count))
        return step, unpack(new, count, optax.tree.cast_like(updates, state.direction), groups)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_arguments(
    loss_fn: Any, init_learning_rate: Any, update_interval: Any, schedule: Any, warmup: Any
) -> None:
    check_loss_fn(loss_fn)
    check_schedule(schedule)
    check_rates(init_learning_rate)
    check_whole(warmup, "warmup", 0)
    check_whole(update_interval, "update_interval", 1)
    if init_learning_rate is None and is_concrete(warmup) and warmup == 0:
        raise ValueError("init_learning_rate=None is found during warm-up, but warmup is 0")


def _checked_groups(param_labels: Any, params: Any, updates: Any, grad: Any) -> Groups:
    """The groups of the parameters, once all that `update` was given is like these."""
    if params is None:
        raise ValueError(
            "hidlr probes the loss around params: call update(updates, state, params, ...)"
        )
    groups = Groups.of(param_labels, params)
    check_like(updates, params, "updates")
    if grad is None:
        raise ValueError(
            "hidlr needs the raw gradient of the loss: pass grad=... to update, before any "
            "clipping or preconditioning (hidlr_optax.take_step does, in linen "
            "hidlr_optax.flax.TrainState). In a loop that is not yours, put it around the "
            "optimizer, where it sees the gradient by itself: hidlr_optax.hessian_informed("
            "optax.adamw(1.0), loss_fn, labels). If grad was passed: a wrapper around the chain "
            "(optax.lookahead is one) drops keywords, and hidlr cannot work inside of it"
        )
    check_like(grad, params, "grad")
    return groups


def _bounded(state: hold.State, bounds: tuple[Any, Any] | None) -> hold.State:
    """The state with rates within their bounds, where they were found; what is applied follows."""
    if bounds is None:
        return state
    found = state.rates > 0
    rates = jnp.where(found, jnp.clip(state.rates, *bounds), state.rates)
    part = rates / jnp.where(found, state.rates, 1)
    return state._replace(rates=rates, applied=jnp.where(found, part, 1) * state.applied)


def _proportions(init_learning_rate: Any, groups: Groups) -> jax.Array:
    """The logarithms of the proportions that were asked for, (K,), their mean zero."""
    asked = 1.0 if init_learning_rate is None else init_learning_rate
    logarithms = jnp.log(groups.pack(initial_rates(asked, groups.names)))
    return logarithms - jnp.mean(logarithms)


@finds_rates
def hiulr(
    loss_fn: LossFn | None,
    *,
    init_learning_rate: float | None = None,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    warmup: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """One rate for all parameters: `hidlr` with the single group "all".

    Args:
      loss_fn: as in `hidlr`, like all that follow.
      init_learning_rate: η to begin with where `warmup` is 0.
      update_interval: Φ.
      schedule: step -> factor, 1 at its peak.
      warmup: the number of looks in which the rate is found.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `HiDLRState`.

    Raises:
      ValueError: as in `hidlr`.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> list(hd.hiulr(None).init({"w": jnp.ones(2)}).group_learning_rates)
      ['all']
    """
    return hidlr(
        loss_fn,
        "all",
        init_learning_rate=init_learning_rate,
        update_interval=update_interval,
        schedule=schedule,
        warmup=warmup,
    )


def multi_steps(
    opt: optax.GradientTransformation,
    every_k_schedule: int | Callable[[Any], Any],
    **multi_steps_kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """`optax.MultiSteps` around a chain with `hidlr`, probing only at the step that is applied.

    `optax.MultiSteps` calls the inner update at every mini-step and throws all but the last result
    away; by itself it would run the probes of one refresh `every_k_schedule` times. The batch,
    value and gradient that `hidlr` sees are those of the last mini-step; `grad` need not be passed
    where the updates that come in are the raw gradient.

    Args:
      opt: the chain, `hidlr` in it.
      every_k_schedule: mini-steps per step, or a callable of the number of steps so far.
      **multi_steps_kwargs: the other arguments of `optax.MultiSteps`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `optax.MultiStepsState`.

    Raises:
      ValueError: from `init`, the chain holds no `hidlr`, or several.

    Example:
      >>> import optax, hidlr_optax as hd
      >>> tx = hd.multi_steps(optax.chain(optax.sgd(1.0), hd.hiulr(None)), every_k_schedule=4)
    """
    watch = unjitted_watch()  # inside of MultiSteps, arrays are never concrete
    outer = optax.MultiSteps(opt, every_k_schedule, **multi_steps_kwargs)

    def init_fn(params: Any) -> optax.MultiStepsState:
        state = outer.init(params)
        try:
            find_state(state)
        except ValueError as error:
            raise ValueError(
                "multi_steps is for a chain with one hidlr, and this one holds no hidlr, or "
                "several; optax.MultiSteps is for all others"
            ) from error
        return state

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.MultiStepsState]:
        watch((updates, params, state.mini_step))
        every_k = every_k_schedule
        k = every_k(state.gradient_step) if callable(every_k) else every_k
        is_last = state.mini_step == k - 1
        # The gradient of this batch, where MultiSteps hands the mean of all on.
        extra_args = {"grad": jax.tree.map(jnp.conj, updates)} | extra_args
        return outer.update(updates, state, params, refresh=is_last, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
