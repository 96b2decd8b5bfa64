"""Moments of influence: mean and spread over refreshes, as arrays inside jit."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._diagnostics import Diagnostics, Kept
from hidlr_optax._groups import Groups
from hidlr_optax._quadratic import Quadratic, influence, marginal

LIMB = 2**30  # sizes are stored in two int32: groups of large models outgrow one


class State(NamedTuple):
    """What is counted of the state of an optimizer.

    Attributes:
      count: updates.
      group_learning_rates: η by label.
      coupling: the curvature between groups, (K, K), or None.
      diagnostics: of the last refresh.
      loss: the running loss; zero where the state has none.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    group_learning_rates: dict[str, jax.Array]
    coupling: Any
    diagnostics: Diagnostics[Any]
    loss: jax.Array


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
      steps: () int32, updates of the optimizer at the last call.
      counted: () int32, refreshes counted.
      loss: () float32, mean of the running loss at these.
      sizes: d_k, (2,) int32 each, d_k = 2³⁰·first + second.
      negative: () int32 each, refreshes with negative curvature.
      unresolved: () int32 each, refreshes without a number for any other reason.
      total: `Moments` of b²/a.
      marginal: `Moments` of the marginal share.
      members: of each named set of groups, 1 for its members and 0 for the others, () float32 each.
        Sets are counted beside the groups under their names, without a marginal share.
    """

    refreshes: jax.Array
    steps: jax.Array
    counted: jax.Array
    loss: jax.Array
    sizes: dict[str, jax.Array]
    negative: dict[str, jax.Array]
    unresolved: dict[str, jax.Array]
    total: Moments
    marginal: Moments
    members: dict[str, dict[str, jax.Array]]


def start(labels: Any, params: Any, joint: Mapping[str, Collection[str]] | None = None) -> Running:
    """Starts to count, at nothing.

    Args:
      labels: as `hidlr` takes them.
      params: the parameters that `hidlr` is initialised with; only their shapes are read.
      joint: name -> labels of groups whose influence is to be measured together, too, as that of
        one group that moves by their present steps: `{"lora": ("lora_A", "lora_B")}`. Alone, lora_A
        has no slope while lora_B is zero. With `probes`, no curvature between them is known.

    Returns:
      A pytree for `accumulate`.

    Raises:
      ValueError: the labels do not match the parameters; or a set of `joint` has the name of a
        group, or fewer than two members, or one that is no group.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> running = hd.influence.start({"w": "weight", "b": "bias"}, {"w": jnp.ones(3), "b": 0.0})
      >>> sorted(running.sizes)
      ['bias', 'weight']
    """
    groups = Groups.of(labels, params)
    joint = {} if joint is None else joint
    _check_joint(joint, groups.names)
    sizes = dict(zip(groups.names, groups.sizes, strict=True))
    sizes |= {name: sum(sizes[label] for label in joint[name]) for name in joint}

    def zeros(names: Iterable[str], dtype: Any) -> dict[str, jax.Array]:
        return {name: jnp.zeros((), dtype) for name in names}

    def moments(names: Iterable[str]) -> Moments:
        counts, mean, squares = (zeros(names, kind) for kind in (jnp.int32, *[jnp.float32] * 2))
        return Moments(counts, mean, squares)

    return Running(
        refreshes=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        counted=jnp.zeros((), jnp.int32),
        loss=jnp.zeros((), jnp.float32),
        sizes={name: jnp.array(divmod(d, LIMB), jnp.int32) for name, d in sizes.items()},
        negative=zeros(sizes, jnp.int32),
        unresolved=zeros(sizes, jnp.int32),
        total=moments(sizes),
        marginal=moments(groups.names),
        members={
            name: {label: jnp.float32(label in joint[name]) for label in groups.names}
            for name in joint
        },
    )


def _check_joint(joint: Mapping[str, Collection[str]], names: tuple[str, ...]) -> None:
    for name, labels in joint.items():
        unknown = [label for label in labels if label not in names]
        if name in names or unknown or isinstance(labels, str) or len(set(labels)) < 2:
            raise ValueError(
                f"joint must map a new name to two labels or more of {list(names)}, such as "
                f'{{"pair": {list(names)[:2]}}}; got {name!r}: {labels!r}'
            )


def _add(moments: Moments, values: jax.Array, present: jax.Array) -> Moments:
    """Counts `values`, (K,), where `present`."""
    count = moments.count + present.astype(jnp.int32)
    difference = jnp.where(present, values - moments.mean, 0)
    mean = moments.mean + difference / jnp.maximum(count, 1).astype(jnp.float32)
    squares = moments.squares + difference * (values - mean)
    return Moments(count, mean, jnp.where(present, squares, moments.squares))


class _Seen(NamedTuple):
    """What one refresh says of a row of groups or sets, (n,) each."""

    total: jax.Array
    is_convex: jax.Array
    is_negative: jax.Array


def _seen(slope: jax.Array, curvature: jax.Array, known: jax.Array) -> _Seen:
    convex = known & (curvature > 0)
    total = influence(Quadratic(slope, jnp.where(convex, curvature, 1)))
    return _Seen(total, convex & jnp.isfinite(total), known & (curvature < 0))


def _seen_together(state: State, members: jax.Array, rates: jax.Array) -> _Seen:
    """Of sets, one row of (n, K) `members` each: slope and curvature along their groups' steps.

    A group without a slope adds nothing, and takes nothing away. The curvature between members is
    in it where it is measured: in the rows (Aη)_k of `hold`, or as the state's coupling.
    """
    kept, slope = state.diagnostics.kept, state.diagnostics.measured_slope
    known = (kept == Kept.UPDATED) | (kept == Kept.NOT_CONVEX) | (kept == Kept.NO_SLOPE)
    is_known = jnp.all(known | (members == 0), axis=1) & jnp.any(members * slope != 0, axis=1)
    steps = members * rates
    curvature = steps**2 @ state.diagnostics.measured_curvature
    if state.coupling is not None:
        curvature += jnp.sum((steps @ state.coupling) * steps, axis=1)
    return _seen(steps @ slope, curvature, is_known)


def count(running: Running, state: State) -> Running:
    """Counts the last refresh of the state, whether or not it has been counted before."""
    names, sets = sorted(state.group_learning_rates), sorted(running.members)

    def pack(group: Mapping[str, jax.Array], names: list[str] = names) -> jax.Array:
        return jnp.stack([group[name] for name in names])

    def added(moments: Moments, names: list[str], values: jax.Array, present: jax.Array) -> Moments:
        before = Moments(*(pack(field, names) for field in moments))
        after = _add(before, values, present)
        return Moments(*({name: row[k] for k, name in enumerate(names)} for row in after))

    fields = "kept", "measured_slope", "measured_curvature", "slope", "curvature"
    found = state.diagnostics
    found = found._replace(**{field: pack(getattr(found, field)) for field in fields})
    packed = state._replace(diagnostics=found)
    known = (found.kept == Kept.UPDATED) | (found.kept == Kept.NOT_CONVEX)
    alone = seen = _seen(found.measured_slope, found.measured_curvature, known)
    if sets:
        members = jnp.stack([pack(running.members[name]) for name in sets])
        rates = pack(state.group_learning_rates)
        together = _seen_together(packed, members, rates)
        seen = _Seen(*map(jnp.concatenate, zip(alone, together, strict=True)))

    averaged = Quadratic(found.slope, found.curvature, state.coupling)
    share = marginal(averaged)
    has_share = alone.is_convex & (averaged.curvature > 0) & jnp.isfinite(share)
    unresolved = ~(seen.is_convex | seen.is_negative)
    rows = [*names, *sets]
    counted = running.counted + 1
    loss = running.loss + (state.loss - running.loss) / counted.astype(jnp.float32)
    return running._replace(
        refreshes=found.measured,
        counted=counted,
        loss=jnp.where(jnp.isfinite(loss), loss, running.loss),
        negative=_plus(running.negative, rows, seen.is_negative),
        unresolved=_plus(running.unresolved, rows, unresolved),
        total=added(running.total, rows, seen.total, seen.is_convex),
        marginal=added(running.marginal, names, share, has_share),
    )


def _plus(counts: dict[str, jax.Array], names: list[str], more: jax.Array) -> dict[str, jax.Array]:
    return {name: counts[name] + more[k].astype(jnp.int32) for k, name in enumerate(names)}
