"""What `hidlr` costs: looks at the loss by counting, and steps timed beside each other."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.loop import Problem, stepper

FINDING = 20  # steps with a refresh at each
WARM = FINDING + 1  # steps before the clock starts: every branch has run
STEP = 3  # forward passes that a step is worth: one, and twice as much work backward


class Looks(NamedTuple):
    """How often a run looks at the loss beside its steps.

    Attributes:
      forwards: evaluations.
      gradients: evaluations with a gradient.
    """

    forwards: int
    gradients: int = 0

    @property
    def forward_passes(self) -> int:
        """In evaluations: a gradient is worth as many as a step."""
        return self.forwards + STEP * self.gradients


def refreshes(interval: int, steps: int) -> int:
    """Of `hidlr` in a run that finds its rates in the 20 first looks, at half the steps allowed."""
    return sum(hd.is_due(step, interval, warmup=10) for step in range(steps))


def fixed_refreshes(interval: int, steps: int, warmup: int) -> int:
    """Of `paper.one_step` in a run, whose interval does not widen."""
    return sum(step < warmup or step % interval == 0 for step in range(steps))


def looks(groups: int, interval: int, steps: int) -> Looks:
    """Of `hidlr`, the default rule: one a refresh, two at the first.

    Looks that a jump of the loss calls for come on top.
    """
    count = refreshes(interval, steps) + 1
    return Looks(0, count) if groups > 1 else Looks(count)


def probe_looks(probes: Any, warmup: int, groups: int, interval: int, steps: int) -> Looks:
    """Of `paper.one_step` with the estimator `probes`, and slopes that cost nothing."""
    return Looks(probes.forward_passes(groups) * fixed_refreshes(interval, steps, warmup))


def nth(problem: Problem, n: int) -> Any:
    """The n-th of the stacked batches of a problem, over and over."""
    return jax.tree.map(lambda leaf: leaf[n % len(leaf)], problem.everything)


class Program(NamedTuple):
    """A compiled training step, the state that it begins with, and the seconds of compiling it."""

    step: Any
    state: Any
    seconds: float

    @property
    def temporaries(self) -> float:
        """By XLA's memory analysis, MiB."""
        return self.step.memory_analysis().temp_size_in_bytes / 2**20


def bare() -> optax.GradientTransformationExtraArgs:
    """The base optimizer."""
    return optax.with_extra_args_support(optax.adamw(1e-4))


def behind_adamw(rule: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW's direction with a rule after it."""
    return optax.chain(optax.adamw(1.0), rule)


def program(tx: optax.GradientTransformationExtraArgs, problem: Problem, **static: Any) -> Program:
    """Traces and compiles a step; `static` keywords are handed to `update`."""
    step, params = stepper(problem.loss, tx, **static), problem.init(jax.random.key(0))
    state = tx.init(params)
    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, nth(problem, 0)).compile()
    return Program(compiled, state, time.perf_counter() - start)


def milliseconds(
    compiled: Program,
    problem: Problem,
    repeats: int,
    cycle: int,
    between: Program | None = None,
    interval: int = 1,
) -> list[float]:
    """Of a step, the mean over each of `repeats` cycles of steps after the warm-up.

    Args:
      compiled: the step.
      problem: what it trains.
      repeats: cycles.
      cycle: steps of one.
      between: takes its place between refreshes; None: nothing does.
      interval: from refresh to refresh.
    """
    # Copies, since both are donated.
    params, state = jax.tree.map(jnp.copy, (problem.init(jax.random.key(0)), compiled.state))
    batches = [nth(problem, n) for n in range(max(cycle, WARM))]  # slicing is no part of a step
    found, value, count = [], jnp.zeros(()), 0
    for steps in (WARM, *[cycle] * repeats):
        jax.block_until_ready((params, state))
        start = time.perf_counter()
        for n in range(steps):
            if between is None or count < FINDING or count % interval == 0:
                taken = compiled
            else:
                taken = between
            params, state, value = taken.step(params, state, batches[n])
            count += 1
        jax.block_until_ready((params, state))
        found.append(1e3 * (time.perf_counter() - start) / steps)
        assert np.isfinite(value)
    return found[1:]


class Beside(NamedTuple):
    """Milliseconds of a step, and of the base optimizer's before and after it."""

    own: list[float]
    base: list[float]

    @property
    def relative_speed(self) -> float:
        """The base optimizer's time over its own."""
        return statistics.median(self.base) / statistics.median(self.own)


def beside(base: Program, own: Program, problem: Problem, repeats: int, cycle: int) -> Beside:
    """Times a program between two runs of the base optimizer's."""
    before = milliseconds(base, problem, repeats, cycle)
    times = milliseconds(own, problem, repeats, cycle)
    return Beside(times, before + milliseconds(base, problem, repeats, cycle))
