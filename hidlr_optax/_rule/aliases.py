"""Named compositions of `hidlr`'s parts: the paper's two rules, and accumulation over steps."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from hidlr_optax._rule.advice import unjitted_watch
from hidlr_optax._rule.arguments import LossFn, Slope
from hidlr_optax._rule.hold import Hold, hold
from hidlr_optax._rule.transform import hidlr
from hidlr_optax.curvature import probes
from hidlr_optax.curvature._measurement import Estimator
from hidlr_optax.influence import find_state
from hidlr_optax.solvers import Solver, diagonal


def paper_hidlr(
    loss_fn: LossFn | None,
    param_labels: Any,
    *,
    init_learning_rate: float | Mapping[str, float] = 1e-3,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    per_group: int = 4,
    batch_size: int | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 1 of Hi-DLR (https://arxiv.org/abs/2501.06954), to the letter.

    Every Φ = `update_interval` steps, the first included:

    1. draw 4K joint offsets ξ_j, ξ_jk ~ N(0, η_k²), scaled by the current rates;
    2. evaluate L(w + Σ_k ξ_jk u_k), all vmapped;
    3. fit slopes b and curvatures a of the diagonal model (eq. 3.1) by least squares, 2K unknowns
       without intercept, in the scaled variables ξ/η;
    4. if every a_k > 0, set η_k = b_k/a_k (eq. 3.2); otherwise keep all rates.

    The per-parameter influence (eq. 5.1) comes from the same fit. No averaging, no bound, no
    smoothing: this is what `hidlr` is compared with. Because it leaves the coupling between groups
    out of the model but not out of the draws, most fits fail for K > 2 and its rates hardly move,
    or they move without a bound.

    Args:
      loss_fn: as in `hidlr`.
      param_labels: as in `hidlr`.
      init_learning_rate: as in `hidlr`; it sets the scale of the first draws.
      update_interval: Φ.
      schedule: as in `hidlr`.
      per_group: draws per group; 4 in the paper.
      batch_size: draws evaluated at a time; None: all.
      seed: of the draws.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `HiDLRState`.

    Raises:
      ValueError: as in `hidlr`.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(())}
      >>> tx = hd.paper_hidlr(lambda p, batch: jnp.sum(p["w"]), {"w": "weight", "b": "bias"})
      >>> sorted(tx.init(params).group_learning_rates)
      ['bias', 'weight']
    """
    return hidlr(
        loss_fn,
        param_labels,
        init_learning_rate=init_learning_rate,
        update_interval=update_interval,
        schedule=schedule,
        curvature=probes("gaussian", per_group, batch_size, seed),
        slope="probes",
        solver=diagonal(max_change=None),
        ema_decay=0.0,
        warmup=0,
    )


def hiulr(
    loss_fn: LossFn | None,
    *,
    init_learning_rate: float | None = 1e-3,
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
    """One rate for all parameters: Hi-ULR of the paper, which is GeN (arXiv 2407.02772).

    `hidlr` with the single group "all". With `slope="probes"`, `warmup=0`, `ema_decay=0.0` and
    `diagonal(max_change=None)`, it is GeN's closed form
    η* = (h/2)·(L₋ − L₊)/(L₊ − 2L₀ + L₋), where L± = L(w ± hu).

    Args:
      loss_fn: as in `hidlr`, like all that follow.
      init_learning_rate: η to begin with; with `warmup` and `grad` it is found, and the number
        hardly matters.
      update_interval: Φ.
      schedule: step -> factor.
      curvature: the estimator; not used by `hold`, which measures one group in any case.
      slope: "lagged", "gradient", "probes" or None.
      solver: from `hold`, `coupled` or `diagonal`, or a `Solver` of your own.
      ema_decay: β of the averages of slope and curvature; not with `hold`.
      max_rise: of the guard; not with `hold`.
      warmup: the number of first updates in which the rate is found.
      lagged_dtype: the dtype of the direction that "lagged" stores.

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
        curvature=curvature,
        slope=slope,
        solver=solver,
        ema_decay=ema_decay,
        max_rise=max_rise,
        warmup=warmup,
        lagged_dtype=lagged_dtype,
    )


def multi_steps(
    opt: optax.GradientTransformation,
    every_k_schedule: int | Callable[[Any], Any],
    **multi_steps_kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """`optax.MultiSteps` around a chain with `hidlr`, probing only at the step that is applied.

    `optax.MultiSteps` calls the inner update at every mini-step and throws all but the last result
    away; by itself it would run the probes of one refresh `every_k_schedule` times. The batch,
    value and gradient that `hidlr` sees are those of the last mini-step.

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
        return outer.update(updates, state, params, refresh=is_last, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
