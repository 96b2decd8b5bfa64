"""The Optax transformation: checks what comes, asks the rule for rates, scales the step.

A refresh is in `_hold_refresh`, of `coupled` and `diagonal` in `_one_step`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from hidlr_optax._groups import Groups
from hidlr_optax._rule.advice import unjitted_watch, warn_of_low_peak
from hidlr_optax._rule.arguments import (
    LossFn,
    Slope,
    bind_loss,
    check_arguments,
    check_gradient,
    check_like,
    check_scalar,
    check_solver,
    fitting,
    usable_value,
)
from hidlr_optax._rule.hold import Hold, hold
from hidlr_optax._rule.hold_refresh import HoldRule
from hidlr_optax._rule.one_step import OneStepRule
from hidlr_optax._state import HiDLRState, Stored, clock, initial_state, pack, unpack
from hidlr_optax._step_loss import SLOPE_SOURCES, Evidence, StepLoss
from hidlr_optax.curvature import probes, secant
from hidlr_optax.curvature._measurement import Estimator
from hidlr_optax.solvers import Solver


def _is_stand_in(params: Any) -> bool:
    """Whether this is optax.tree.map_params, which initialises with an object without leaves."""
    return type(params).__name__ == "_ParamsPlaceholder"


def hidlr(
    loss_fn: LossFn | None,
    param_labels: Any,
    *,
    init_learning_rate: float | Mapping[str, float] | None = 1e-3,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    curvature: Estimator | None = None,
    slope: Slope | None = "lagged",
    solver: Solver | Hold = hold(),
    ema_decay: float | None = None,
    max_rise: float | None = None,
    warmup: int = 20,
    lagged_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Hessian-informed differential learning rates: one rate per group of parameters.

    Takes the incoming updates as the direction u and multiplies group k by η_k. They have to be
    descending and at rate one, as those of `optax.adamw(1.0)` are. Every `update_interval` steps,
    it models the loss along the group steps, L(w + Σ η_k u_k) − L(w) ≈ −bᵀη + ½ ηᵀAη (arXiv
    2501.06954, eq. 2.3), and moves the rates. By default (`hold`) that costs one forward pass, and
    for K > 1 one gradient at every fourth refresh, whatever K is. For Algorithm 1 of the paper to
    the letter, see `paper_hidlr`.

    `update(updates, state, params, *, batch, value, grad, value_fn)` takes, beside what every
    transformation takes:

    * `batch`: handed to `loss_fn`.
    * `value_fn`: params -> scalar, takes the place of `loss_fn` and `batch`. Keywords of `update`
      that its signature names are handed on to it, as Optax's line searches do.
    * `value`: the probed loss at `params`, of this `batch` and no other; spares one evaluation, and
      lets the guard see every step.
    * `grad`: the raw gradient of that loss, before any preconditioning; gives the slope.
    * `refresh`: a bool, False to leave the rates alone at this call. See `multi_steps`. Python's
      own `False`, or a static argument of the jitted step, leaves the refresh out of the program.

    At the first three refreshes, `value` and `grad` are compared with the loss that is probed;
    where they belong to another, the measured ones take their place, and `metrics` and `explain`
    say so.

    Other keywords are ignored. Jit the training step: un-jitted, every refresh compiles the probes
    anew. Under `vmap`, both branches of the refresh are evaluated at every step. Under `pmap` or
    `shard_map`, `pmean` the loss, `value` and `grad`: `shard_map` refuses what differs from device
    to device, but `pmap` and `check_vma=False` let replicas drift apart.

    Args:
      loss_fn: (params, batch) -> scalar; None if `update` is always given `value_fn`. It has to be
        the same function at all probes of a refresh: fix dropout keys and batch statistics.
      param_labels: a pytree of str like params, a prefix of it, or a callable from params to one.
      init_learning_rate: η to begin with, one number for all groups or `{label: rate}`. With `hold`
        it gives their proportions alone: at the first update their size is set so that the step, by
        its slope, changes the loss by three hundredths. With other solvers it is brought within a
        factor of ten of where that is one hundredth. With `warmup=0`, or without `grad`, the rates
        begin as they are given; with `warmup=0`, those of Adam and Lion only fall from there. None:
        all alike, and found.
      update_interval: Φ ≥ 1, steps from refresh to refresh. Of more than one, `hold` takes it as
        that of the first hundred refreshes, and doubles it whenever the run has become twice as
        long: see its `widen_after`.
      schedule: step -> factor, 1 at its peak; multiplies all rates. `hold` knows it and does not
        undo it; put no other scaling after `hidlr`.
      curvature: the estimator, from `secant`, `parabola`, `probes`, `hessian` or `gauss_newton`, or
        an `Estimator` of your own. With `hold` it measures the single groups, every few refreshes;
        `parabola` leaves their proportions alone. None: `secant()` with `hold`, `probes()` with the
        other solvers.
      slope: where b comes from. "lagged": slope and curvature along the previous step, which the
        present batch has not made, b_k = −⟨∇L_k, u_k⟩ + (Aη)_k at its start. "gradient":
        b_k = −⟨∇L_k, u_k⟩ along the coming step, on the batch that made u_k: for full batches; on
        mini-batches it is too steep. "probes": fitted together with the curvature, on whatever
        `batch` is passed, such as the next or a held-out one. None: "gradient" at calls with
        `grad`, "probes" at others.
      solver: from `hold`, `coupled` or `diagonal`, or a `Solver` of your own.
      ema_decay: β in [0, 1), of the moving averages of slope and curvature over refreshes, which
        the solver is given; 0: those of the newest refresh alone. None: 0.9. Not with `hold`.
      max_rise: of the guard, ≥ 0. After every refresh the loss is evaluated once more, where the
        coming step would lead; if it rises by more than this part of itself, all rates are cut, by
        two to ten. `math.inf`: no guard. None: 0.2, and no guard for `diagonal`. Not with `hold`,
        which has averages and a guard of its own.
      warmup: the number of first updates in which the rates are found, by a refresh at each.
        Solvers other than `hold` also raise the rates linearly over them. 0: none of this.
      lagged_dtype: the dtype in which "lagged" stores the direction, such as bfloat16; None: its
        own.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `HiDLRState`.

    Raises:
      ValueError: an argument is out of range, or has no effect with this solver; from `init`,
        labels or rates do not match the parameters; from `update`, there are no params, no loss, or
        no gradient where one is needed.

    Warns:
      UserWarning: `schedule` stays far below one, or `update` is called again outside of jit.

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
    default = secant if isinstance(solver, Hold) else probes
    estimator = default() if curvature is None else curvature
    check_arguments(
        loss_fn, init_learning_rate, update_interval, schedule, estimator, slope, warmup
    )
    check_solver(solver, ema_decay, max_rise)
    warn_of_low_peak(schedule)
    watch = unjitted_watch()
    source = SLOPE_SOURCES[slope]
    if isinstance(solver, Hold):
        rule = HoldRule(solver, estimator, source, init_learning_rate)
    else:
        rule = OneStepRule.of(solver, estimator, source, ema_decay, max_rise)

    def init_fn(params: Any) -> Stored:
        if _is_stand_in(params):
            # Which fields are like params is all that is asked for: a prefix of the state says it.
            fields: dict[str, Any] = dict.fromkeys(HiDLRState._fields, jnp.zeros(()))
            fields["coupling"] = jnp.zeros(()) if rule.couples else None
            fields["progress"] = rule.begin()
            fields["direction"] = params if source.looks_back else ()
            return HiDLRState(**fields)
        names = Groups.of(param_labels, params).names
        direction = optax.tree.zeros_like(params, lagged_dtype) if source.looks_back else ()
        return initial_state(names, init_learning_rate, rule.couples, rule.begin(), direction)

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
        check_gradient(source, estimator, init_learning_rate, grad, params)
        loss = bind_loss(loss_fn, value_fn, batch, extra_args)
        coming = fitting(StepLoss(loss, params, updates, groups))
        has_forward_mode = check_scalar(coming, no_batch=batch is None and value_fn is None)

        previous = state.direction if source.looks_back else None
        evidence = Evidence(
            coming,
            previous,
            usable_value(value, params),
            grad,
            batch,
            factor=state.gradient_factor,
            compares_slope=source.uses_gradient and has_forward_mode,
        )
        now = clock(state.count, update_interval, warmup, schedule, refresh, rule.widen_after)
        # The stored direction stays out of the branches: it is replaced below at every step, and
        # a copy as large as the parameters need not be carried through them.
        new, factor = rule.update(pack(state._replace(direction=()), groups), evidence, now)
        watch((updates, params, state.count))
        direction = optax.tree.cast(updates, lagged_dtype) if source.looks_back else ()
        new = new._replace(
            count=optax.safe_increment(new.count), schedule_factor=factor, direction=direction
        )
        return groups.scale(updates, new.group_learning_rates * factor), unpack(new, groups)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
