"""Report of the influences of a run: plain numbers on the host, errors beside them."""

import dataclasses
import itertools
import math
from typing import Literal

from hidlr_optax._text import aligned

Status = Literal["resolved", "negative", "unresolved"]


@dataclasses.dataclass(frozen=True)
class GroupInfluence:
    """Influence of one group, averaged over refreshes.

    Errors are standard errors of the mean, sd/√n over refreshes. They take refreshes for
    independent samples of one thing; a run whose influences drift makes them wide, averages that
    carry over from refresh to refresh (those behind `marginal`) make them narrow. None: there is
    no number, or for an error, fewer than two of them.

    Attributes:
      size: d_k, the number of parameters.
      refreshes: how many were counted, with or without a number.
      negative: refreshes at which the curvature was negative, so that b²/a has no meaning.
      unresolved: refreshes at which slope or curvature was lost in rounding, or not finite.
      total: the influence b_k²/a_k, loss, twice what the group's own best step is worth: the mean
        over refreshes, None unless at least half of them gave a number.
      total_error: of `total`.
      marginal: what the best joint step would lose without the group, loss; see `accumulate`.
      marginal_error: of `marginal`.
    """

    size: int
    refreshes: int
    negative: int = 0
    unresolved: int = 0
    total: float | None = None
    total_error: float | None = None
    marginal: float | None = None
    marginal_error: float | None = None

    @property
    def status(self) -> Status:
        """The reason why there are no numbers: what most refreshes lacked; or "resolved"."""
        if self.total is not None:
            return "resolved"
        return "negative" if self.negative > self.unresolved else "unresolved"

    @property
    def per_parameter(self) -> float | None:
        """PPI_k = b_k²/(a_k d_k), the influence per parameter (arXiv 2501.06954, eq. 5.1)."""
        return None if self.total is None else self.total / self.size

    @property
    def per_parameter_error(self) -> float | None:
        """Of `per_parameter`."""
        return None if self.total_error is None else self.total_error / self.size


def with_error(value: float | None, error: float | None) -> str:
    """A number and its error, for tables."""
    if value is None:
        return "–"
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {float(f'{error:.1g}'):g}"


@dataclasses.dataclass(frozen=True)
class Influence:
    """Influences of the groups of a run, from `hidlr_optax.influence.summarise`.

    Attributes:
      groups: a `GroupInfluence` for each label.
      steps: updates of the optimizer up to the last one that was seen.
      joint: likewise for each set of groups that `start` was asked to count together.
      loss: the mean of the running loss at these refreshes; None: not known.

    Example:
      >>> from hidlr_optax.influence import GroupInfluence, Influence
      >>> head = GroupInfluence(size=10, refreshes=9, total=0.5, total_error=0.01)
      >>> rest = GroupInfluence(size=1000, refreshes=9, total=0.7, total_error=0.02)
      >>> found = Influence({"rest": rest, "head": head}, steps=90)
      >>> found.ranking(), found.differs("head", "rest")
      (['head', 'rest'], True)
      >>> print(found)
      group  parameters             PPI   influence  marginal  refreshes
      head           10    0.05 ± 0.001  0.5 ± 0.01         –          9
      rest         1000  0.0007 ± 2e-05  0.7 ± 0.02         –          9
      head > rest
    """

    groups: dict[str, GroupInfluence]
    steps: int
    joint: dict[str, GroupInfluence] = dataclasses.field(default_factory=dict)
    loss: float | None = None

    def exceeds_loss(self, group: GroupInfluence) -> bool:
        """Whether an influence is more than twice the loss, which a step cannot win.

        Slope and curvature are both next to nothing then, and so their quotient is any number.
        """
        return self.loss is not None and 0 < 2 * self.loss < (group.total or 0.0)

    def footnote(self) -> list[str]:
        """What the mark in tables says, a line, where a group has it."""
        if not any(map(self.exceeds_loss, [*self.groups.values(), *self.joint.values()])):
            return []
        return [
            f"* more than twice the loss, {self.loss:.3g}, so no influence: neither slope nor "
            "curvature can be told from none"
        ]

    def ranking(self) -> list[str]:
        """Labels by influence per parameter (PPI), the highest first; without a number, last."""

        def place(label: str) -> tuple[float, str]:
            ppi = self.groups[label].per_parameter
            return (math.inf if ppi is None else -ppi), label

        return sorted(self.groups, key=place)

    def differs(self, one: str, other: str, z: float = 2.0) -> bool:
        """Tells whether the PPIs of two groups lie further apart than their errors explain.

        Args:
          one: a label.
          other: a label.
          z: how many standard errors of the difference it has to exceed.

        Returns:
          True if the difference exceeds them. False otherwise, and where one of the two has no
          number or no error: nothing is known to differ then.

        Raises:
          ValueError: a label is none of the groups'.
        """
        unknown = [label for label in (one, other) if label not in self.groups]
        if unknown:
            raise ValueError(f"no group is called {unknown[0]!r}; there are {sorted(self.groups)}")
        a, b = self.groups[one], self.groups[other]
        if a.per_parameter is None or b.per_parameter is None:
            return False
        if a.per_parameter_error is None or b.per_parameter_error is None:
            return False
        error = math.hypot(a.per_parameter_error, b.per_parameter_error)
        return abs(a.per_parameter - b.per_parameter) > z * error

    def _row(self, label: str, group: GroupInfluence) -> tuple[str, ...]:
        counts = {"negative": group.negative, "unresolved": group.unresolved}
        without = [f"{count} {why}" for why, count in counts.items() if count]
        refreshes = f"{group.refreshes}" + (f" ({', '.join(without)})" if without else "")
        return (
            label,
            str(group.size),
            with_error(group.per_parameter, group.per_parameter_error),
            with_error(group.total, group.total_error) + " *" * self.exceeds_loss(group),
            with_error(group.marginal, group.marginal_error),
            refreshes,
        )

    def _order(self) -> str:
        """`head > norm ≈ rest`, ≈ where two neighbours are not known to differ."""
        ranking = self.ranking()
        ranked = [label for label in ranking if self.groups[label].status == "resolved"]
        words = ranked[:1]
        for before, label in itertools.pairwise(ranked):
            words += [">" if self.differs(before, label) else "≈", label]
        lacking = [f"{label} ({self.groups[label].status})" for label in ranking[len(ranked) :]]
        parts = [" ".join(words), f"no number: {', '.join(lacking)}" if lacking else ""]
        return "; ".join(part for part in parts if part)

    def __str__(self) -> str:
        head = ("group", "parameters", "PPI", "influence", "marginal", "refreshes")
        ranked = {label: self.groups[label] for label in self.ranking()} | self.joint
        rows = [head, *(self._row(label, group) for label, group in ranked.items())]
        return "\n".join([*aligned(rows), self._order(), *self.footnote()])
