"""What a refresh leaves for a person: statuses, measurements, and slips of the caller."""

from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax._diagnostics import Diagnostics, Kept, Slip
from hidlr_optax._groups import wide
from hidlr_optax._quadratic import Quadratic, influence_per_parameter
from hidlr_optax._rule.measure import Call, Look, Products
from hidlr_optax._rule.rate import HOLD, average, newest


def distrusts(diagnostics: Diagnostics[Any]) -> jax.Array:
    """Whether `value` was not the loss: then no look can be trusted."""
    return (diagnostics.slips & Slip.VALUE.value) != 0


def recorded(
    diagnostics: Diagnostics[jax.Array],
    call: Call,
    products: Products,
    seen: Look,
    resolved: jax.Array,
    finite: jax.Array,
    is_along: jax.Array,
    alone: jax.Array,
    harmed: jax.Array,
    follows: jax.Array,
) -> Diagnostics[jax.Array]:
    """The diagnostics after a refresh.

    Args:
      diagnostics: before it.
      call: what `update` was told.
      products: of this call.
      seen: the look.
      resolved: whether it measured anything.
      finite: whether all numbers are.
      is_along: whether it was at the last step as it was, so that it gives slopes.
      alone: whether it gives the curvature of each group alone.
      harmed: whether the last step did harm.
      follows: whether the parameters moved as they were told.
    """
    slope = seen.slope + seen.rows
    curvature = seen.rows / jnp.where(seen.rates == 0, 1, seen.rates)
    has_slope = resolved & is_along & (seen.rates != 0)
    has_curvature = resolved & alone & (seen.rates != 0)

    weight = newest(diagnostics.measured, HOLD)

    def mean(old: jax.Array, new: jax.Array, use: jax.Array) -> jax.Array:
        return jnp.where(use, average(old, new, weight), old)

    quadratic = Quadratic(
        mean(diagnostics.slope, slope, has_slope),
        mean(diagnostics.curvature, curvature, has_curvature),
    )
    ppi = influence_per_parameter(quadratic, jnp.asarray(call.groups.sizes, jnp.float32))
    has_influence = (quadratic.curvature > 0) & jnp.isfinite(ppi)
    slips = jnp.where(seen.wrong_value, Slip.VALUE.value, 0) | jnp.where(
        follows, 0, Slip.STEP.value
    )
    return Diagnostics(
        refreshes=diagnostics.refreshes + 1,
        measured=diagnostics.measured + (resolved & alone).astype(jnp.int32),
        cuts=diagnostics.cuts + harmed.astype(jnp.int32),
        slips=diagnostics.slips | slips.astype(jnp.int32),
        kept=_statuses(diagnostics.kept, products, seen, finite, resolved, distrusts(diagnostics)),
        slope=quadratic.slope,
        curvature=quadratic.curvature,
        measured_slope=jnp.where(has_slope, slope, diagnostics.measured_slope),
        measured_curvature=jnp.where(has_curvature, curvature, diagnostics.measured_curvature),
        influence=jnp.where(has_influence, ppi, diagnostics.influence),
    )


def _statuses(
    before: jax.Array,
    products: Products,
    seen: Look,
    finite: jax.Array,
    resolved: jax.Array,
    distrusted: jax.Array,
) -> jax.Array:
    """(K,) int32 of `Kept`; as before where no step had been taken that could be looked at."""
    uphill = products.ug @ jnp.abs(seen.rates) >= 0
    status = jnp.where(uphill, Kept.ASCENDS, Kept.UPDATED)
    status = jnp.where(resolved, status, Kept.UNRESOLVED)
    status = jnp.where(distrusted, Kept.DISTRUSTED, status)
    statuses = jnp.where((products.ug == 0), Kept.NO_SLOPE, status)
    statuses = jnp.where(finite, statuses, Kept.NON_FINITE)
    recovers = finite & (before == Kept.NON_FINITE)
    before = jnp.where(recovers, Kept.UPDATED, before)
    return jnp.where(jnp.any(seen.rates != 0), statuses, before).astype(jnp.int32)


def follows(call: Call, products: Products, applied: jax.Array, position: jax.Array) -> jax.Array:
    """Whether the parameters moved along the last direction by about as much as they were told.

    Of parameters or directions narrower than float32, rounding takes a part of each step. They say
    nothing.

    Args:
      call: what `update` was told.
      products: of this call.
      applied: the rates of the last step, (K,).
      position: ⟨w, u⟩ before it; 0 where that is not known.
    """
    leaves = jax.tree.leaves((call.params, call.last))
    if any(wide(leaf.dtype) != leaf.dtype for leaf in map(jnp.asarray, leaves)):
        return jnp.ones((), bool)
    told, moved = applied @ products.vv, jnp.sum(products.wv) - position
    whole = products.whole()
    rounding = 1e-5 * jnp.sqrt(whole.ww * whole.vv)
    ratio = moved / jnp.where(told == 0, 1, told)
    known = (jnp.abs(told) > rounding) & jnp.isfinite(ratio) & (position != 0)
    return ~known | ((ratio > 0.5) & (ratio < 2))
