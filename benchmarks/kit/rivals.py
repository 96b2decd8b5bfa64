"""What `hidlr` is compared with: Algorithm 1 as practised, and what needs no learning rate.

`gen_hidlr` is Algorithm 1 of Hi-DLR with what GeN's authors add in practice: smoothing, a clamp and
a gate. `OTHERS` bring a step of their own, set as their authors recommend.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import Method, averaging

SMOOTHING = 0.9
LEAST_FIT = 0.99  # R² under which a fit is thrown away
CLAMP = 10.0  # how far from the current rate the minimum of a fit may lie
_DRAWS = hd.paper.probes("gaussian", per_group=4, batch_size=1)


@dataclasses.dataclass(frozen=True)
class FittingWell:
    """An estimator: the paper's joint draws, of which a fit with R² ≤ 0.99 is thrown away."""

    couples = False

    def estimate(self, step_loss: Any, rates: jax.Array, **known: Any) -> hd.paper.Measurement:
        """Draws, fits, and says that nothing is resolved where the fit is bad."""
        measured = _DRAWS.estimate(step_loss, rates, **known)
        slope, curvature, _ = measured.quadratic
        fitted = measured.offsets**2 @ curvature / 2 - measured.offsets @ slope
        changes = measured.changes
        spread = jnp.sum((changes - changes.mean()) ** 2)
        fit = 1 - jnp.sum((fitted - changes) ** 2) / spread
        return measured._replace(resolved=jnp.full(len(rates), fit > LEAST_FIT))


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """A solver: Algorithm 1's, clamped, and a tenth of the way there."""

    def solve(
        self, quadratic: hd.Quadratic, rates: jax.Array, kept: jax.Array, least_curvature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """η ← 0.9 η + 0.1 clip(b/a, η/10, 10 η), all of them or none."""
        solver = hd.paper.diagonal(max_change=None)
        best, kept = solver.solve(quadratic, rates, kept, least_curvature)
        best = jnp.clip(best, rates / CLAMP, CLAMP * rates)
        return rates + (1 - SMOOTHING) * (best - rates), kept


def gen_hidlr(loss_fn: Any, param_labels: Any, **settings: Any) -> Any:
    """η ← 0.9 η + 0.1 clip(b/a, η/10, 10 η) where R² > 0.99 and every a > 0 (arXiv 2407.02772)."""
    return hd.paper.one_step(
        loss_fn,
        param_labels,
        curvature=FittingWell(),
        slope="probes",
        solver=Smoothing(),
        ema_decay=0.0,
        max_rise=math.inf,
        warmup=0,
        **settings,
    )


def line_search() -> optax.GradientTransformationExtraArgs:
    """Gradient descent with Optax's backtracking line search, for losses without noise.

    It takes the place of the updates that it is given.
    """
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=40, decrease_factor=0.5)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del updates
        known = {name: extra[name] for name in ("value", "grad", "value_fn")}
        return search.update(jax.tree.map(jnp.negative, extra["grad"]), state, params, **known)

    return optax.GradientTransformationExtraArgs(search.init, update)


def _cosine(steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(1.0, steps)


# Steps of the run -> the optimizer.
OTHERS: dict[str, Callable[[int], Method]] = {
    # lr 1 for all networks: the README of konstmish/prodigy.
    "Prodigy": lambda steps: Method(optax.contrib.prodigy(1.0)),
    # "We also recommend using cosine annealing"; the safeguard is for warm-ups: same README.
    "Prodigy, cosine": lambda steps: Method(optax.contrib.prodigy(_cosine(steps))),
    # "Set the LR parameter to 1.0": the README of facebookresearch/dadaptation.
    "D-Adaptation": lambda steps: Method(optax.contrib.dadapt_adamw(1.0)),
    # "Use the same learning rate scheduler you would normally use on the problem": same README.
    "D-Adaptation, cosine": lambda steps: Method(optax.contrib.dadapt_adamw(_cosine(steps))),
    # reps_rel 1e-6, "must be combined with iterate averaging", γ = 8: formll/dog, README and code.
    "DoG": lambda steps: averaging(Method(optax.contrib.dog(1.0, init_step=("heuristic", 1e-6)))),
    # lr 0.0025 is the default of facebookresearch/schedule_free, whose README recommends a warm-up.
    "schedule-free AdamW": lambda steps: Method(
        optax.contrib.schedule_free_adamw(2.5e-3, warmup_steps=max(1, steps // 20)),
        optax.contrib.schedule_free_eval_params,
    ),
    # A schedule of peak 1 inside, λ = 0.01: google-research/mechanic, the code of arXiv 2306.00144.
    "Mechanic, cosine": lambda steps: Method(
        optax.contrib.mechanize(optax.adamw(_cosine(steps)), weight_decay=1e-2)
    ),
    # "For MomoAdam lr=1e-2 should work well", constant: the README of fabian-sp/MoMo.
    "MoMo-Adam": lambda steps: Method(optax.contrib.momo_adam(1e-2)),
}
