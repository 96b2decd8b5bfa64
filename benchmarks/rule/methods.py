"""The rules and rivals of the suite, and their runs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hidlr_optax as hd
from benchmarks.kit.costs import FINDING, STEP, Looks, looks, probe_looks
from benchmarks.kit.loop import SCHEDULES, Method, Problem, averaging, job, plain, train
from benchmarks.kit.rivals import OTHERS, gen_hidlr
from benchmarks.kit.store import Job, Row
from benchmarks.problems.small import PROBLEMS
from benchmarks.rule.cases import OPTIMIZERS, USUAL, Case, grid

CHECKS = 20  # how often a run is evaluated
OF_AVERAGE = "averaged "  # prefix of the losses of averaged parameters, in a row beside the others


def decay(name: str | None, steps: int) -> optax.Schedule:
    """From one to zero over a run."""
    if name == "linear":
        return optax.linear_schedule(1.0, 0.0, steps)
    return SCHEDULES[name or "constant"](steps)


# (problem, labels, rate, interval, schedule) -> transformation
Factory = Callable[[Problem, Any, Any, int, Any], Any]


class Rule(NamedTuple):
    """A rule for the rates of a case's optimizer.

    Attributes:
      make: the rule.
      schedule: that it is given.
      looks: (groups, interval, steps) -> at the loss, by which its steps are weighed.
    """

    make: Factory
    schedule: str | None = None
    looks: Callable[[int, int, int], Looks] = looks


def _behind(rule: Callable[..., Any], one: bool = False, **settings: Any) -> Factory:
    def make(problem: Problem, labels: Any, rate: Any, interval: int, schedule: Any) -> Any:
        return rule(
            problem.loss,
            "all" if one else labels,
            init_learning_rate=rate,
            update_interval=interval,
            schedule=schedule,
            **settings,
        )

    return make


_DEFAULT, _ONE = _behind(hd.hidlr), _behind(hd.hidlr, one=True)
# Slopes from the next batch, two probes of each group, a box around the minimum.
_FIRST = _behind(hd.paper.one_step, curvature=hd.paper.probes(batch_size=1))
_FIRST_LOOKS = functools.partial(probe_looks, hd.paper.probes(), FINDING)
_PAPER_LOOKS = functools.partial(probe_looks, hd.paper.probes("gaussian", per_group=4), 0)

# Every rule that takes the direction of the case's optimizer and its other settings.
RULES: dict[str, Rule] = {
    "hidlr, cosine": Rule(_DEFAULT, "cosine"),
    "hidlr": Rule(_DEFAULT),
    "Hi-ULR, cosine": Rule(_ONE, "cosine"),
    "Hi-ULR": Rule(_ONE),
    "first version, cosine": Rule(_FIRST, "cosine", _FIRST_LOOKS),
    "first version": Rule(_FIRST, None, _FIRST_LOOKS),
    "Algorithm 1": Rule(_behind(hd.paper_hidlr, batch_size=1), None, _PAPER_LOOKS),
    "Algorithm 1, smoothed": Rule(_behind(gen_hidlr), None, _PAPER_LOOKS),
}


@functools.cache
def load(name: str, steps: int | None) -> Problem:
    """A problem, its runs cut to `steps` where that is a number."""
    problem = PROBLEMS[name]()
    return problem if steps is None else problem._replace(steps=steps)


def grid_job(name: str, optimizer: str, schedule: str, steps: int | None) -> Job:
    """The seven rates of one schedule, vmapped."""
    rates = grid(name, optimizer)

    @functools.cache
    def compiled() -> Any:
        problem = load(name, steps)
        shape = decay(schedule, problem.steps)

        def run(rate: jax.Array, key: jax.Array) -> Any:
            parts = OPTIMIZERS[optimizer](), optax.scale_by_schedule(shape), optax.scale(rate)  # pyright: ignore[reportArgumentType]
            return train(problem, Method(optax.chain(*parts)), key, CHECKS)[0]

        return jax.jit(jax.vmap(run, in_axes=(0, None)))

    def execute(seed: int) -> list[Row]:
        losses = compiled()(jnp.asarray(rates, jnp.float32), jax.random.key(seed))
        per_rate = [{k: v[i] for k, v in losses.items()} for i in range(len(rates))]
        return [plain(x) | {"rate": float(r)} for x, r in zip(per_rate, rates, strict=True)]

    key = {"method": "grid", "workload": name, "optimizer": optimizer, "schedule": schedule}
    return Job(key, execute)


@functools.lru_cache(maxsize=2)  # those of a whole suite do not fit into the memory of a process
def case_runner(make: Factory, case: Case, steps: int | None) -> Callable[..., Any]:
    """(rate, the schedule's factors, key) -> losses, and the last metrics.

    The schedule is an argument, so that all of them share one compilation.
    """
    problem = load(case.workload, steps)
    groupings = list(problem.groupings.values())
    labels = groupings[case.grouping % len(groupings)]

    def run(rate: jax.Array, curve: jax.Array, key: jax.Array) -> Any:
        rule = make(problem, labels, rate, case.interval, lambda step: curve[step])
        # The average is kept beside, and judged apart from the last parameters.
        tx = averaging(Method(optax.chain(OPTIMIZERS[case.optimizer](), rule))).tx
        losses, (state, average) = train(problem, Method(tx), key, CHECKS)
        for name, batch in problem.splits.items():
            losses[OF_AVERAGE + name] = problem.loss(average.params, batch)
        rates = optax.tree.get(state, "group_learning_rates", {"all": jnp.zeros(())})
        peak = jnp.exp(jnp.mean(jnp.log(jnp.stack(list(rates.values())))))
        return losses | {"rate": peak}, hd.metrics(state)

    return jax.jit(run)


def case_job(name: str, case: Case, steps: int | None) -> Job:
    """A rule on a case."""
    rule = RULES[name]

    def execute(seed: int) -> list[Row]:
        length = load(case.workload, steps).steps
        shape = decay(rule.schedule, length)
        curve = jnp.stack([jnp.float32(shape(step)) for step in range(length)])
        rate = jnp.float32(USUAL[case.optimizer] * case.scale)
        runner = case_runner(rule.make, case, steps)
        losses, metrics = runner(rate, curve, jax.random.key(seed))
        groups = sum(name.startswith("learning_rate/") for name in metrics)
        looked = rule.looks(groups, case.interval, length)
        forwards = STEP + looked.forward_passes / length
        # Of each group: rate, slope, curvature, influence, and what became of its last refresh.
        return [plain(losses) | {"metrics": plain(metrics), "forwards a step": forwards}]

    return Job({"method": name} | case._asdict(), execute)


def other_job(method: str, name: str, steps: int | None) -> Job:
    """An optimizer without a learning rate on a problem."""

    def run(key: jax.Array) -> Any:
        problem = load(name, steps)
        return train(problem, OTHERS[method](problem.steps), key, CHECKS)[0]

    return job({"method": method, "workload": name}, run, plain)
