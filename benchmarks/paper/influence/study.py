"""All measurements and runs of one problem, each computed once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hidlr_optax as hd
from benchmarks.kit.store import Values
from benchmarks.kit.training import Task
from benchmarks.paper.influence import cost as costs
from benchmarks.paper.influence.runs import make_trainer, measure, pretrained, scores


class Problem(NamedTuple):
    """What plans are made for.

    Attributes:
      name: unique.
      task: trains all of its parameters.
      small: its smaller versions, by name, on which plans are made to be transferred.
    """

    name: str
    task: Task
    small: Mapping[str, Task] = {}


class Study:
    """All measurements and runs of one problem."""

    def __init__(self, problem: Problem, results: Values, steps: int, seeds: int):
        self.problem, self.steps, self.seeds = problem, steps, range(seeds)
        self._results = results
        self._trainers: dict[Any, Callable[[int], dict[str, Any]]] = {}

    def measured(self, seed: int, small: str | None = None) -> dict[str, Any]:
        """From `measure`, on the problem or a smaller version."""
        task = self.problem.task if small is None else self.problem.small[small]
        key = self.problem.name, self.steps, "measure", small, seed
        short = min(max(self.steps // 10, 15), self.steps)  # fewer say little
        return self._results.get(key, lambda: measure(task, seed, short, self.steps))

    def influence(self, seed: int, small: str | None = None) -> hd.Influence:
        """What the groups are worth."""
        found = hd.Plan.from_json(self.measured(seed, small)["plan"]).influence
        assert found is not None
        return found

    def select(self, psi: float, seed: int, small: str | None = None) -> hd.Plan | None:
        """The plan for ψ; None where it would freeze everything."""
        try:
            return hd.peft.select(self.influence(seed, small), psi, rules="role")
        except ValueError:
            return None

    def trained(self, plan: hd.Plan, seed: int) -> dict[str, Any]:
        """From `make_trainer`."""

        def train() -> dict[str, Any]:
            if plan.trainable not in self._trainers:
                self._trainers.clear()  # with all that they compiled
                self._trainers[plan.trainable] = make_trainer(self.problem.task, plan, self.steps)
            return self._trainers[plan.trainable](seed)

        key = self.problem.name, self.steps, "train", *sorted(plan.trainable), seed
        return self._results.get(key, train)

    def cost(self, plan: hd.Plan) -> dict[str, float]:
        """From `costs.cost`."""
        key = self.problem.name, "cost", *sorted(plan.trainable)
        return self._results.get(key, lambda: costs.cost(self.problem.task, plan))

    def ways_to_freeze(self) -> dict[str, dict[str, float]]:
        """From `costs.ways_to_freeze`."""
        key = self.problem.name, "ways to freeze"
        return self._results.get(key, lambda: costs.ways_to_freeze(self.problem.task))

    def untrained(self, seed: int) -> dict[str, float]:
        """Test scores before the first step."""
        key = self.problem.name, "untrained", seed
        return self._results.get(
            key, lambda: scores(self.problem.task, *pretrained(self.problem.task, seed))
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of parameters of each group, in the whole model."""
        return {label: group.size for label, group in self.influence(0).groups.items()}

    def alone(self, label: str) -> hd.Plan:
        """The plan that trains one group."""
        return hd.Plan({label}, set(self.sizes) - {label}, sizes=self.sizes)
