"""Algorithm 1 of Hi-DLR with what GeN's authors add in practice: smoothing, a clamp and a gate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SMOOTHING = 0.9
LEAST_FIT = 0.99  # R² under which a fit is thrown away
CLAMP = 10.0  # how far from the current rate the minimum of a fit may lie


class GenState(NamedTuple):
    """Steps so far and the (K,) rates."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rates: jax.Array


def gen_hidlr(
    loss_fn: Any, param_labels: Any, *, init_learning_rate: Any, update_interval: int
) -> optax.GradientTransformationExtraArgs:
    """η ← 0.9 η + 0.1 clip(b/a, η/10, 10 η) where R² > 0.99 and every a > 0 (arXiv 2407.02772)."""

    def labels_of(params: Any) -> Any:
        labels = param_labels(params) if callable(param_labels) else param_labels
        spread = jax.tree.map(
            lambda label, part: jax.tree.map(lambda _: label, part), labels, params
        )
        names = sorted(set(jax.tree.leaves(spread)))
        return jax.tree.map(names.index, spread), len(names)

    def init(params: Any) -> GenState:
        _, count = labels_of(params)
        return GenState(jnp.zeros((), jnp.int32), jnp.full(count, init_learning_rate, jnp.float32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, GenState]:
        batch, value = extra_args["batch"], extra_args["value"]
        index, count = labels_of(params)

        def moved(rates: jax.Array) -> Any:
            return jax.tree.map(lambda k, u, w: w + rates[k] * u, index, updates, params)

        def refreshed(rates: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(0), state.count)
            points = jax.random.normal(key, (4 * count, count))
            losses = jax.lax.map(lambda point: loss_fn(moved(point * rates), batch), points)
            changes = losses - value
            matrix = jnp.concatenate([-points, points**2 / 2], axis=1)
            solution = jnp.linalg.lstsq(matrix, changes)[0]
            slope, curvature = jnp.split(solution, 2)
            rest = jnp.sum((matrix @ solution - changes) ** 2)
            fit = 1 - rest / jnp.sum((changes - changes.mean()) ** 2)
            best = jnp.clip(slope / curvature, 1 / CLAMP, CLAMP) * rates
            good = jnp.all(curvature > 0) & (fit > LEAST_FIT) & jnp.all(jnp.isfinite(best))
            return jnp.where(good, SMOOTHING * rates + (1 - SMOOTHING) * best, rates)

        due = state.count % update_interval == 0
        rates = jax.lax.cond(due, refreshed, lambda rates: rates, state.rates)
        scaled = jax.tree.map(lambda k, u: rates[k] * u, index, updates)
        return scaled, GenState(state.count + 1, rates)

    return optax.GradientTransformationExtraArgs(init, update)
