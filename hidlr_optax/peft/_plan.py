"""Plans: the groups that train and those that are frozen, why, and labels for other models."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

from hidlr_optax._groups import check_not_module, label_names
from hidlr_optax._text import aligned
from hidlr_optax.influence._report import Influence, with_error
from hidlr_optax.labels import label_by_path, label_by_role
from hidlr_optax.peft._plan_json import read, write

Rules = Sequence[tuple[str, str]] | Literal["role"] | None
Value = Literal["total", "marginal"]


def check_value(value: str) -> None:
    """Raises a ValueError unless this names an influence of a group."""
    if value not in ("total", "marginal"):
        raise ValueError(f"value must be 'total' or 'marginal', got {value!r}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A choice of groups to train and groups to freeze, and the numbers that it rests on.

    Plans come from `select`, `pareto` and `within`; `dataclasses.replace` adds what they leave
    open, such as `rules`. A plan may also be written by hand: all but the labels is optional.

    Attributes:
      trainable: labels of the groups that train, at least one; kept as a frozenset.
      frozen: labels of the others; likewise.
      psi: ψ of the rule that chose it.
      budget: the number of parameters that it was not to exceed.
      influence: what was measured.
      sizes: number of parameters of each group; None: those of `influence`.
      steps: how many steps the measuring run took; 0 where scores came from elsewhere.
      rules: how the groups were labelled, so that `label` can do it again: (regular expression,
        label) pairs for `label_by_path`, or "role" for `label_by_role`.
      default: the label of what no rule covers, as in `label_by_path`.

    Raises:
      ValueError: no group trains, a label is on both sides, or `influence` or `sizes` do not fit
        the labels. Rules are tried when `label` is called.

    Example:
      >>> import hidlr_optax as hd
      >>> plan = hd.Plan({"head"}, {"rest"}, psi=10.0, sizes={"head": 10, "rest": 990})
      >>> print(plan)
      ψ = 10: 1 of 2 groups trains, 10 of 1000 parameters (1 %)
      group  parameters  PPI
      head           10    –  trains
      rest          990    –  frozen
      >>> hd.Plan.from_json(plan.to_json()) == plan
      True
    """

    trainable: Set[str]
    frozen: Set[str]
    psi: float | None = None
    budget: int | None = None
    influence: Influence | None = None
    sizes: Mapping[str, int] | None = None
    steps: int | None = None
    rules: Rules = None
    default: str | None = None

    def __post_init__(self):
        def assign(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        assign("trainable", frozenset(self.trainable))
        assign("frozen", frozenset(self.frozen))
        if self.sizes is None and self.influence is not None:
            assign("sizes", {name: group.size for name, group in self.influence.groups.items()})
        if self.rules is not None and self.rules != "role":
            assign("rules", tuple((pattern, label) for pattern, label in self.rules))
        self._check()

    def _check(self) -> None:
        if not self.trainable:
            raise ValueError("a plan has to leave one group trainable, got none")
        both = self.trainable & self.frozen
        if both:
            raise ValueError(f"groups cannot both train and be frozen, got {sorted(both)} twice")
        covered = {"sizes": self.sizes, "influence": self.influence and self.influence.groups}
        for field, labels in covered.items():
            if labels is not None and set(labels) != self.labels:
                raise ValueError(
                    f"{field} must have the plan's labels, {sorted(self.labels)}, got "
                    f"{sorted(labels)}"
                )
        if self.default is not None and (self.rules is None or self.rules == "role"):
            raise ValueError(f"default={self.default!r} belongs to rules that are pairs")

    @property
    def labels(self) -> frozenset[str]:
        """All of the plan's labels."""
        return frozenset(self.trainable | self.frozen)

    @property
    def parameters(self) -> int | None:
        """The number of parameters that train; None where sizes are not known."""
        return None if self.sizes is None else sum(self.sizes[name] for name in self.trainable)

    def worth(self, value: Value = "total") -> float:
        """The influences of the trainable groups added up, loss; 0 for those without a number.

        Args:
          value: "total", b²/a, or "marginal".

        Returns:
          The sum, loss.

        Raises:
          ValueError: the plan rests on no influence, or `value` is neither of the two.
        """
        check_value(value)
        if self.influence is None:
            raise ValueError("the plan rests on no influence, so there is nothing to add up")
        groups = self.influence.groups
        return sum(getattr(groups[name], value) or 0.0 for name in sorted(self.trainable))

    def label(self, params: Any) -> Any:
        """Labels another model's parameters by the plan's rules.

        Args:
          params: any pytree, such as the parameters of a larger model of the same family.

        Returns:
          A pytree of str with the structure of `params`.

        Raises:
          ValueError: the plan has no rules, a rule finds no parameter, a parameter no rule, a label
            of the plan has no parameters, or there are parameters with a label that the plan does
            not know.

        Example:
          >>> import hidlr_optax as hd
          >>> plan = hd.Plan({"head"}, {"rest"}, rules=[("head/.*", "head")], default="rest")
          >>> plan.label({"head": {"kernel": 0.0}, "body": [0.0, 0.0]})
          {'body': ['rest', 'rest'], 'head': {'kernel': 'head'}}
        """
        if self.rules is None:
            raise ValueError(
                "the plan has no rules to label parameters by: dataclasses.replace(plan, "
                "rules=[(regex, label), ...], default=...), or rules='role'"
            )
        check_not_module(params)
        if self.rules == "role":
            labels = label_by_role(params)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                try:
                    labels = label_by_path(params, self.rules, self.default)
                except UserWarning as warning:
                    raise ValueError(str(warning)) from None
        self.check_labels(label_names(labels))
        return labels

    def check_labels(self, names: tuple[str, ...]) -> None:
        """Raises a ValueError unless `names` are the plan's labels."""
        missing, unknown = sorted(self.labels - set(names)), sorted(set(names) - self.labels)
        if missing or unknown:
            raise ValueError(
                f"the plan is for the groups {sorted(self.labels)}; without parameters are "
                f"{missing}, and the plan does not know {unknown}"
            )

    def to_json(self) -> str:
        """Writes the plan as JSON for `from_json`, every finite number exact.

        Raises:
          ValueError: a number is not finite.
        """
        fields = dataclasses.asdict(self)
        return write(fields | {"trainable": sorted(self.trainable), "frozen": sorted(self.frozen)})

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads the plan that `to_json` wrote.

        Raises:
          ValueError: `text` is not JSON, or of another version, or not a plan.
        """
        return Plan(**read(text))

    def _reason(self) -> str:
        reasons = {"ψ": self.psi, "budget": self.budget, "steps": self.steps or None}
        named = [
            f"{name} = {number:.12g}" for name, number in reasons.items() if number is not None
        ]
        return f"{', '.join(named)}: " if named else ""

    def __str__(self) -> str:
        count = len(self.trainable)
        line = f"{self._reason()}{count} of {len(self.labels)} groups train{'s' * (count == 1)}"
        if self.sizes is not None:
            whole, part = sum(self.sizes.values()), self.parameters or 0
            line += f", {part} of {whole} parameters ({100 * part / max(whole, 1):.3g} %)"
        order = sorted(self.labels) if self.influence is None else self.influence.ranking()
        rows = [("group", "parameters", "PPI", "")]
        for label in sorted(order, key=lambda label: label in self.frozen):  # stable
            rows.append((label, *self._evidence(label), self._status(label)))
        notes = [] if self.influence is None else self.influence.footnote()
        return "\n".join([line, *(text.rstrip() for text in aligned(rows)), *notes])

    def _evidence(self, label: str) -> tuple[str, str]:
        size = "–" if self.sizes is None else str(self.sizes[label])
        if self.influence is None:
            return size, "–"
        group = self.influence.groups[label]
        if group.status != "resolved":
            return size, group.status
        mark = " *" * self.influence.exceeds_loss(group)
        return size, with_error(group.per_parameter, group.per_parameter_error) + mark

    def _status(self, label: str) -> str:
        return "trains" if label in self.trainable else "frozen"
