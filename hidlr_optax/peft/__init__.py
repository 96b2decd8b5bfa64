"""Parameter-efficient training by influence: choose groups, freeze the rest, at no cost for these.

Section 5 of Hi-DLR (arXiv 2501.06954) and the knapsack of AdaPEFT (arXiv 2505.12579). Measure with
`hidlr_optax.influence` during a short run, on a smaller model if there is one; then

    plan = hd.peft.select(found, psi=10.0, rules="role")      # or pareto(found), within(found, n)
    labels = plan.label(params)                               # of this model or a larger one
    trainable, frozen = hd.peft.split(params, labels, plan)
    tx = optax.chain(
        optax.adamw(1.0), hd.hidlr(None, hd.peft.trainable_labels(params, labels, plan))
    )
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, frozen, state, batch):
        def loss_of(trainable):
            return loss_fn(hd.peft.merge(trainable, frozen), batch)

        value, grad = jax.value_and_grad(loss_of)(trainable)
        updates, state = tx.update(
            grad, state, trainable, value_fn=loss_of, value=value, grad=grad
        )
        return optax.apply_updates(trainable, updates), state, value
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hidlr_optax.influence._report import GroupInfluence, Influence
from hidlr_optax.peft._knapsack import Subset, best_subsets
from hidlr_optax.peft._partition import Absent, merge, split, trainable_labels
from hidlr_optax.peft._plan import Plan, Rules, Value, check_value

__all__ = [
    "Absent",
    "Plan",
    "Rules",
    "Value",
    "merge",
    "pareto",
    "select",
    "split",
    "trainable_labels",
    "within",
]

_MOST_PLANS = 10**5

Scores = Influence | Mapping[str, float]


def select(
    influence: Scores,
    psi: float,
    *,
    sizes: Mapping[str, int] | None = None,
    rules: Rules = None,
    default: str | None = None,
) -> Plan:
    """Freezes the groups whose influence per parameter is less than ψ times the least one.

    The rule of arXiv 2501.06954, section 5: group k is frozen if PPI_k < ψ · min_j PPI_j, the
    minimum over groups with a number. ψ = 1 trains everything. Groups without a number cannot be
    compared: one with negative curvature trains, because along it the loss falls faster than any
    parabola says; one that is unresolved is frozen as soon as ψ > 1, because steps along it change
    the loss by less than can be told from none.

    Args:
      influence: from `hidlr_optax.influence.summarise`; or what each group is worth by another
        score, `{label: number}`, together with `sizes`.
      psi: ψ ≥ 1.
      sizes: the number of parameters of each group, for scores of your own alone.
      rules: kept in the plan, for `Plan.label`.
      default: likewise.

    Returns:
      The plan.

    Raises:
      ValueError: ψ is less than 1, not finite, or so large that no group would train, or no group
        has a number, or a score is not positive.

    Example:
      >>> from hidlr_optax import peft
      >>> from hidlr_optax.influence import GroupInfluence, Influence
      >>> head = GroupInfluence(size=10, refreshes=9, total=0.5, total_error=0.01)
      >>> rest = GroupInfluence(size=1000, refreshes=9, total=0.7, total_error=0.02)
      >>> found = Influence({"head": head, "rest": rest}, steps=90)
      >>> print(peft.select(found, psi=10.0))
      ψ = 10, steps = 90: 1 of 2 groups trains, 10 of 1010 parameters (0.99 %)
      group  parameters             PPI
      head           10    0.05 ± 0.001  trains
      rest         1000  0.0007 ± 2e-05  frozen
    """
    if sizes is not None and isinstance(influence, Influence):
        raise ValueError("an Influence knows its sizes: leave sizes out")
    influence = _influence(influence, sizes)
    psi = float(psi)
    if not 1 <= psi < math.inf:
        raise ValueError(f"psi must be finite and >= 1 (1 trains everything), got {psi}")
    worthless = [
        name
        for name, group in influence.groups.items()
        if group.total is not None and group.total <= 0
    ]
    if worthless:
        raise ValueError(
            f"select compares scores with the least one, which has to be positive; of {worthless} "
            "it is not: leave these groups out, or choose by a number of parameters, within("
            "scores, budget, sizes=sizes)"
        )
    ppis = {
        label: group.per_parameter
        for label, group in influence.groups.items()
        if group.per_parameter is not None
    }
    if not ppis:
        raise ValueError(f"no group has a number to go by:\n{influence}")
    least = min(ppis.values())
    frozen = {label for label, ppi in ppis.items() if ppi < psi * least}
    if psi > 1:
        statuses = {label: group.status for label, group in influence.groups.items()}
        frozen |= {label for label, status in statuses.items() if status == "unresolved"}
    if len(frozen) == len(influence.groups):
        raise ValueError(
            f"psi={psi} would freeze every group. Choose by a number of parameters, within(front, "
            f"budget), or take a lower psi; the largest that leaves a group is "
            f"{_largest_psi(least, max(ppis.values()))!r}"
        )
    return _plan(influence, frozen, psi=psi, rules=rules, default=default)


def _influence(scores: Any, sizes: Mapping[str, int] | None) -> Influence:
    """The influence, made of scores where those are given."""
    if isinstance(scores, Influence):
        return scores
    if not isinstance(scores, Mapping):
        raise ValueError(
            f"expected an Influence, as hidlr_optax.influence.summarise(running) returns it, or "
            f"{{label: number}} with sizes={{label: parameters}}, got {type(scores).__name__}"
        )
    if sizes is None or set(sizes) != set(scores):
        raise ValueError(
            f"scores of your own need the number of parameters of each group: pass sizes with the "
            f"labels {sorted(scores)}, got {None if sizes is None else sorted(sizes)}"
        )
    groups = {}
    for label, score in scores.items():
        size, score = int(sizes[label]), float(score)
        if not math.isfinite(score) or size < 1:
            raise ValueError(
                f"scores must be finite and sizes at least 1, got {score} and {size} for {label!r}"
            )
        groups[label] = GroupInfluence(size, refreshes=1, total=score, marginal=score)
    return Influence(groups, steps=0)


def _largest_psi(least: float, most: float) -> float:
    psi = most / least
    while most < psi * least:  # the quotient was rounded upwards
        psi = math.nextafter(psi, 0.0)
    return psi


def _plan(influence: Influence, frozen: Iterable[str], **fields) -> Plan:
    frozen = frozenset(frozen)
    trainable = frozenset(influence.groups) - frozen
    return Plan(trainable, frozen, influence=influence, steps=influence.steps, **fields)


def _candidates(
    influence: Influence, sizes: Mapping[str, int] | None, value: Value
) -> tuple[list[str], list[tuple[int, float]]]:
    """Labels of the groups that are worth something, and (parameters, value) of each."""
    check_value(value)
    if sizes is not None and set(sizes) != set(influence.groups):
        raise ValueError(
            f"sizes must have the labels {sorted(influence.groups)}, got {sorted(sizes)}"
        )
    found = {}
    for label, group in sorted(influence.groups.items()):
        worth = getattr(group, value)
        if worth is not None and worth > 0:
            found[label] = (group.size if sizes is None else int(sizes[label]), worth)
    if not found:
        raise ValueError(f"no group has a {value} influence above zero:\n{influence}")
    return list(found), list(found.values())


def pareto(
    influence: Scores,
    sizes: Mapping[str, int] | None = None,
    *,
    value: Value = "total",
    rules: Rules = None,
    default: str | None = None,
) -> list[Plan]:
    """For every budget of parameters, the groups with the most influence together.

    The 0–1 knapsack of AdaPEFT (arXiv 2505.12579), solved exactly: all subsets such that none with
    as few parameters is worth more. Groups without a number, or worth nothing, are frozen in all of
    them. Totals and shares of different groups are added up, as if there were no coupling.

    A model of 40 groups has some thousand such plans if their sizes repeat from layer to layer. In
    the worst case, as with 40 sizes spread over decades and equal influence per parameter, every
    subset is one: more than 100,000 plans are refused.

    Args:
      influence: from `hidlr_optax.influence.summarise`; or what each group is worth by another
        score, `{label: number}`, together with `sizes`.
      sizes: what each group costs, where that is not its size: the sizes of a larger model. The
        influences are taken as they were measured.
      value: "total", b²/a, or "marginal", the share in the joint step.
      rules: kept in the plans, for `Plan.label`.
      default: likewise.

    Returns:
      The plans, from the fewest parameters to the most.

    Raises:
      ValueError: no group is worth anything, there are too many plans, or an argument is not of
        the expected kind.

    Example:
      >>> from hidlr_optax import peft
      >>> from hidlr_optax.influence import GroupInfluence, Influence
      >>> groups = {
      ...     name: GroupInfluence(size, refreshes=9, total=total)
      ...     for name, size, total in [("head", 10, 0.5), ("norm", 20, 0.1), ("rest", 900, 0.7)]
      ... }
      >>> front = peft.pareto(Influence(groups, steps=90))
      >>> [(sorted(plan.trainable), plan.parameters) for plan in front[:3]]
      [(['head'], 10), (['head', 'norm'], 30), (['rest'], 900)]
    """
    influence = _influence(influence, sizes)
    labels, items = _candidates(influence, sizes, value)
    subsets = [subset for subset in best_subsets(items, math.inf) if subset[2]]
    if len(subsets) > _MOST_PLANS:
        raise ValueError(
            f"{len(subsets)} plans are best for some budget, more than {_MOST_PLANS}: use fewer "
            "groups, or within(influence, budget) for a single plan"
        )
    fields = {"sizes": sizes, "rules": rules, "default": default}
    return [_of_subset(influence, labels, subset, **fields) for subset in subsets]


def _of_subset(influence: Influence, labels: list[str], subset: Subset, **fields) -> Plan:
    trainable = {label for bit, label in enumerate(labels) if subset[2] >> bit & 1}
    return _plan(influence, set(influence.groups) - trainable, **fields)


def within(
    front: Sequence[Plan] | Scores, budget: int, sizes: Mapping[str, int] | None = None
) -> Plan:
    """The best plan with at most `budget` trainable parameters.

    Args:
      front: from `pareto`; or an `Influence`, by whose totals and sizes the plan is chosen; or
        other scores, `{label: number}`, together with `sizes`.
      budget: number of parameters.
      sizes: the number of parameters of each group, for scores of your own alone.

    Returns:
      The plan, with its `budget`.

    Raises:
      ValueError: the budget is smaller than any plan, or there are no plans.

    Example:
      >>> from hidlr_optax import peft
      >>> from hidlr_optax.influence import GroupInfluence, Influence
      >>> groups = {
      ...     name: GroupInfluence(size, refreshes=9, total=total)
      ...     for name, size, total in [("head", 10, 0.5), ("norm", 20, 0.1), ("rest", 900, 0.7)]
      ... }
      >>> sorted(peft.within(Influence(groups, steps=90), budget=500).trainable)
      ['head', 'norm']
    """
    if sizes is not None and not isinstance(front, Mapping):
        raise ValueError("sizes go with scores of your own, {label: number}, or into pareto")
    if isinstance(front, Mapping):
        front = _influence(front, sizes)
    if isinstance(front, Influence):
        labels, items = _candidates(front, None, "total")
        cheapest, name = min((size, label) for label, (size, _) in zip(labels, items, strict=True))
        best = best_subsets(items, budget)[-1]
        plan = _of_subset(front, labels, best) if best[2] else None
    else:
        if isinstance(front, Plan):
            raise ValueError("expected the plans of pareto(influence), or an Influence, got a Plan")
        plans = sorted(front, key=lambda plan: plan.parameters or 0)
        if not plans:
            raise ValueError("there is no plan to choose from: pass pareto(influence)")
        cheapest, name = plans[0].parameters or 0, ", ".join(sorted(plans[0].trainable))
        affordable = [plan for plan in plans if (plan.parameters or 0) <= budget]
        plan = affordable[-1] if affordable else None
    if plan is None:
        raise ValueError(
            f"a budget of {budget} parameters is too small: the smallest group is {name!r} with "
            f"{cheapest}"
        )
    return dataclasses.replace(plan, budget=budget)
