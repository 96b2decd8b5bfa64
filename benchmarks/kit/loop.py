"""A problem, an optimizer, and the one loop that trains the first by the second."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hidlr_optax as hd
from benchmarks.kit.store import Job, Row

AVERAGED = ", averaged parameters"  # after the name of what is judged by them

SCHEDULES: dict[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, steps),
    "warm-up": lambda steps: optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(steps // 10, 1), steps
    ),
}


class Problem(NamedTuple):
    """What is trained: plain arrays and a loss, so that a whole run fits into one `lax.scan`.

    Attributes:
      init: key -> params.
      loss: (params, batch) -> scalar, the training loss.
      steps: of one run.
      splits: "train", "validation", "test" -> a batch that holds the whole split. The three never
        share an example.
      batch_size: examples per step, drawn with replacement from "train". 0: all of them.
      sample: key -> batch, instead of the two above.
      score: (params, batch) -> scalar, higher is better: what users judge by, if not the loss.
      evaluate: params -> scalar, lower is better. None: the loss on "train".
      groupings: name -> labels, as `hidlr` takes them.
      direction: learning rate -> the optimizer that the rates belong to.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    steps: int
    splits: Mapping[str, Any] = {}
    batch_size: int = 0
    sample: Callable[[jax.Array], Any] | None = None
    score: Callable[[Any, Any], jax.Array] | None = None
    evaluate: Callable[[Any], jax.Array] | None = None
    groupings: Mapping[str, Any] = {}
    direction: Callable[[Any], optax.GradientTransformation] = optax.adam

    @property
    def deterministic(self) -> bool:
        """Whether all batches are the same."""
        return self.sample is None and self.batch_size == 0

    @property
    def everything(self) -> Any:
        """All training data; zero where there is none."""
        return self.splits.get("train", jnp.zeros(()))

    @property
    def labels(self) -> Any:
        """The first of the groupings."""
        return next(iter(self.groupings.values()))

    def batch(self, key: jax.Array) -> Any:
        """One training batch."""
        if self.sample is not None:
            return self.sample(key)
        if self.batch_size == 0:
            return self.everything
        size = len(jax.tree.leaves(self.everything)[0])
        rows = jax.random.randint(key, (self.batch_size,), 0, size)
        return jax.tree.map(lambda x: x[rows], self.everything)

    def judged(self, params: Any) -> jax.Array:
        """What a run is judged by at its end, lower is better."""
        if self.evaluate is not None:
            return self.evaluate(params)
        return self.loss(params, self.everything)


def last(state: Any, params: Any) -> Any:
    """The parameters of the last step, which all but averaging optimizers are judged by."""
    del state
    return params


def _no_rates(step: int) -> Mapping[str, float]:
    del step
    return {}


class Method(NamedTuple):
    """An optimizer.

    Attributes:
      tx: finds its own rates, or takes `rates` as an argument of its update.
      evaluated: (state of tx, parameters) -> the parameters to judge by.
      name: unique in a comparison.
      family: of the methods that share it, only the best on validation data goes through all seeds.
      rates: step -> `{label: rate}` for `tx`.
    """

    tx: Any
    evaluated: Callable[[Any, Any], Any] = last
    name: str = ""
    family: str = ""
    rates: Callable[[int], Mapping[str, float]] = _no_rates


def averaging(method: Method) -> Method:
    """The same, judged by the running average of its parameters."""
    tx, name = optax.with_extra_args_support(method.tx), method.name + AVERAGED

    def init(params: Any) -> Any:
        return tx.init(params), hd.averaging.start(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        inner, average = state
        updates, inner = tx.update(updates, inner, params, **extra)
        after = optax.apply_updates(params, updates)
        return updates, (inner, hd.averaging.accumulate(average, after))

    def averaged(state: Any, params: Any) -> Any:
        del params
        return state[-1].params

    return Method(
        optax.GradientTransformationExtraArgs(init, update), averaged, name, name, method.rates
    )


def stepper(loss: Callable[[Any, Any], jax.Array], tx: Any, **static: Any) -> Callable[..., Any]:
    """A training step: (params, state, batch) -> (params, state, loss); `static` goes to `tx`."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grad = jax.value_and_grad(loss)(params, batch)
        known = {"batch": batch, "value": value, "grad": grad} | static
        value_fn = functools.partial(_at, loss, batch)
        updates, state = tx.update(grad, state, params, value_fn=value_fn, **known)
        return optax.apply_updates(params, updates), state, value

    return step


def _at(loss: Callable[[Any, Any], jax.Array], batch: Any, params: Any) -> jax.Array:
    return loss(params, batch)


Run = tuple[Any, Any]  # parameters, and the state of the optimizer


def descend(problem: Problem, tx: Any, run: Run, keys: jax.Array) -> tuple[Run, jax.Array]:
    """As many steps as there are keys -> where they end, and the loss before each."""
    step = stepper(problem.loss, tx)

    def body(run: Run, key: jax.Array) -> tuple[Run, jax.Array]:
        params, state, value = step(*run, problem.batch(key))
        return (params, state), value

    return jax.lax.scan(body, run, keys)


def run(problem: Problem, tx: Any, key: jax.Array) -> Run:
    """A whole run, to be jitted."""
    init_key, batch_key = jax.random.split(key)
    params = problem.init(init_key)
    keys = jax.random.split(batch_key, problem.steps)
    return descend(problem, tx, (params, tx.init(params)), keys)[0]


def watched(
    problem: Problem,
    tx: Any,
    key: jax.Array,
    checks: int,
    look: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]],
    start: Callable[[Any], Any] = lambda params: None,
) -> tuple[Run, Any, Any]:
    """A whole run that is looked at, evenly spaced and at its end for the last time.

    Args:
      problem: its number of steps is a multiple of `checks`.
      tx: the optimizer.
      key: of the parameters and the batches.
      checks: how often.
      look: (what it carries along, params, state, the losses since the last look) -> (the same,
        what it has seen).
      start: params -> what `look` carries along at first.

    Returns:
      Where the run ends, what `look` carries at the end, and what it has seen, stacked.
    """
    init_key, batch_key = jax.random.split(key)
    params = problem.init(init_key)
    keys = jax.random.split(batch_key, problem.steps).reshape(checks, -1)

    def part(carry: Any, keys: jax.Array) -> Any:
        before, kept = carry
        after, losses = descend(problem, tx, before, keys)
        kept, seen = look(kept, *after, losses)
        return (after, kept), seen

    begin = (params, tx.init(params)), start(params)
    (end, kept), seen = jax.lax.scan(part, begin, keys)
    return end, kept, seen


def train(
    problem: Problem,
    method: Method,
    key: jax.Array,
    checks: int = 10,
    ends: tuple[str, ...] = ("train", "validation", "test"),
) -> tuple[dict[str, jax.Array], Any]:
    """One run, to be jitted, that is validated on its way.

    Args:
      problem: its number of steps is a multiple of `checks`.
      method: the optimizer.
      key: of the parameters and the batches.
      checks: how often the validation split is looked at. The parameters of the best time (of all
        scores the highest, or of equal ones that of the least loss) are kept, as early stopping
        would.
      ends: the splits to evaluate when it is over.

    Returns:
      Numbers by name, and the optimizer state. Of the last step, the loss on each of the `ends`, by
      its name, and if there is a score, "test score" and so on. Of the best time the same of
      "best validation" and "best test", and "best step". Beside them "batch loss", the mean since
      the last but one check, "finite", whether the last parameters are, and "curve", the validation
      losses.
    """

    def measured(params: Any, split: str) -> dict[str, jax.Array]:
        found = {split: problem.loss(params, problem.splits[split])}
        if problem.score is not None:
            found[f"{split} score"] = problem.score(params, problem.splits[split])
        return found

    def look(carry: Any, params: Any, state: Any, losses: jax.Array) -> Any:
        best, count = carry
        count += len(losses)
        seen = method.evaluated(state, params)
        now = measured(seen, "validation"), count, seen
        better = _quality(now[0]) > _quality(best[0])
        same = _quality(now[0]) == _quality(best[0])
        better |= same & (now[0]["validation"] < best[0]["validation"])
        better &= jnp.isfinite(now[0]["validation"])
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        return (best, count), (losses.mean(), now[0]["validation"])

    def start(params: Any) -> Any:
        nothing = {"validation": jnp.float32(jnp.inf)}
        if problem.score is not None:
            nothing["validation score"] = jnp.float32(-jnp.inf)
        zero = jnp.zeros((), jnp.int32)
        return (nothing, zero, params), zero

    end, kept, (losses, curve) = watched(problem, method.tx, key, checks, look, start)
    (params, state), ((validated, best_step, best), _) = end, kept
    seen = method.evaluated(state, params)
    found = {k: v for split in ends for k, v in measured(seen, split).items()}
    found |= {f"best {k}": v for k, v in (validated | measured(best, "test")).items()}
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
    found |= {"best step": best_step, "batch loss": losses[-1], "finite": finite}
    return found | {"curve": curve}, state


def job(key: Row, run: Callable[[jax.Array], Any], told: Callable[[Any], Row]) -> Job:
    """A run for each seed, compiled once: key -> results, which are told as a row."""
    compiled = functools.cache(lambda: jax.jit(run))
    return Job(key, lambda seed: [told(compiled()(jax.random.key(seed)))])


def given(rates: Mapping[str, Any]) -> optax.GradientTransformation:
    """Multiplies the update of each top-level entry of the parameters by its rate."""

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return {n: jax.tree.map(lambda u, n=n: rates[n] * u, updates[n]) for n in updates}

    return optax.stateless(scaled)


def _quality(found: dict[str, jax.Array]) -> jax.Array:
    """The score, or the negative loss where there is none."""
    return found.get("validation score", -found["validation"])


def plain(found: Mapping[str, jax.Array]) -> dict[str, Any]:
    """As Python numbers, and lists of numbers of four digits."""

    def told(x: Any) -> Any:
        return [float(f"{y:.4g}") for y in np.asarray(x)] if x.ndim else x.item()

    return {name: told(x) for name, x in found.items()}
