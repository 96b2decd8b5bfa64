"""The two rules of the paper, to the letter: Hi-DLR, and Hi-ULR, which is GeN."""

from collections.abc import Mapping
from typing import Any, Literal

import optax

from hidlr_optax._checks.loss import LossFn
from hidlr_optax.paper._measurement import Estimator
from hidlr_optax.paper._one_step import one_step
from hidlr_optax.paper._probes import probes
from hidlr_optax.paper._solvers import diagonal


def _closed_form(loss_fn: Any, labels: Any, estimator: Estimator, **settings: Any) -> Any:
    """η = b/a of the newest fit alone: no average, no bound, no guard, no warm-up."""
    return one_step(
        loss_fn,
        labels,
        curvature=estimator,
        slope="probes",
        solver=diagonal(max_change=None),
        ema_decay=0.0,
        warmup=0,
        **settings,
    )


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
    scale: Literal["rate", "root"] = "rate",
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 1 of Hi-DLR (https://arxiv.org/abs/2501.06954).

    Every Φ = `update_interval` steps, the first included:

    1. draw 4K joint offsets ξ_j, by the current rates (line 7);
    2. evaluate L(w + Σ_k ξ_jk u_k), all vmapped;
    3. fit slopes b and curvatures a of the diagonal model (eq. 3.1) by least squares, 2K unknowns
       without intercept, in offsets counted in units of their standard deviations;
    4. if every a_k > 0, set η_k = b_k/a_k (eq. 3.2); otherwise keep all rates.

    The per-parameter influence (eq. 5.1) comes from the same fit. No averaging, no bound, no
    smoothing. Because it leaves the coupling between groups out of the model but not out of the
    draws, most fits fail for K > 2 and its rates hardly move, or they move without a bound.

    Line 7 writes ξ_j ~ N(0, diag(η)), a covariance. So by the letter the standard deviation of ξ_jk
    is √η_k: `scale="root"`. The code of GeN, on which the paper builds, has η_k: `scale="rate"`.

    Args:
      loss_fn: as in `one_step`.
      param_labels: as in `one_step`.
      init_learning_rate: as in `one_step`; it sets the scale of the first draws.
      update_interval: Φ.
      schedule: as in `one_step`.
      per_group: draws per group; 4 in the paper.
      batch_size: draws evaluated at a time; None: all.
      seed: of the draws.
      scale: of the draws: "rate", ξ_jk ~ N(0, η_k²), or "root", ξ_jk ~ N(0, η_k).

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `OneStepState`.

    Raises:
      ValueError: as in `one_step`.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(())}
      >>> labels = {"w": "weight", "b": "bias"}
      >>> tx = hd.paper.paper_hidlr(lambda p, batch: jnp.sum(p["w"]), labels)
      >>> sorted(tx.init(params).group_learning_rates)
      ['bias', 'weight']
    """
    return _closed_form(
        loss_fn,
        param_labels,
        probes("gaussian", per_group, batch_size, seed, scale=scale),
        init_learning_rate=init_learning_rate,
        update_interval=update_interval,
        schedule=schedule,
    )


def paper_hiulr(
    loss_fn: LossFn | None,
    *,
    init_learning_rate: float = 1e-3,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One rate for all parameters: Hi-ULR of the paper, which is GeN (arXiv 2407.02772).

    At every refresh GeN's closed form η* = (η/2)·(L₋ − L₊)/(L₊ − 2L₀ + L₋), L± = L(w ± ηu), where
    its curvature is positive. For other estimators, `one_step(loss_fn, "all", ...)`.

    Args:
      loss_fn: as in `one_step`, like all that follow.
      init_learning_rate: η to begin with.
      update_interval: Φ.
      schedule: step -> factor.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `OneStepState`.

    Raises:
      ValueError: as in `one_step`.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> list(hd.paper.paper_hiulr(None).init({"w": jnp.ones(2)}).group_learning_rates)
      ['all']
    """
    return _closed_form(
        loss_fn,
        "all",
        probes(scale="rate"),
        init_learning_rate=init_learning_rate,
        update_interval=update_interval,
        schedule=schedule,
    )
