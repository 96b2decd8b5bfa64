"""Runs in which whatever `update` is given can be at fault, at any step.

Faults are arrays in the batch, so that one compiled run serves them all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NAN, INF = math.nan, math.inf
_f32 = jnp.float32
STEPS = 14
WARMUP = 4
BAD = [NAN, INF, -INF]
HUGE = 1e30
_LABELS = {"w": "body", "empty": "body", "s": "scalar"}


def _start():
    return {"w": jnp.linspace(-1.0, 1.0, 4), "empty": jnp.zeros((0, 2)), "s": _f32(0.5)}


def _outputs(params, batch):
    out = batch["x"] @ params["w"] + jnp.sum(params["empty"])
    return out + batch["uses_scalar"] * params["s"]


def _loss_of_outputs(outputs, batch):
    error = jnp.mean((outputs - batch["y"]) ** 2)
    return batch["factor"] * error + batch["constant"]


def _wall(params, batch):
    """The fault where the parameters have left the place at which the step was begun."""
    ahead = batch["side"] * (params["w"][0] - batch["place"]) > 0
    return jnp.where(ahead | (batch["side"] == 0), batch["fault"], 1.0)


def _model(params, batch):
    return _outputs(params, batch) * _wall(params, batch)


class _Kind(NamedTuple):
    """A way to keep the parameters of the same model.

    Attributes:
      start: flat, name -> leaf.
      labels: name -> label.
      poisoned: name -> the faults that reach the leaf, "body" or "scalar".
      plain: to the parameters of `_outputs`.
      dtype: of the loss.
    """

    start: dict[str, Any]
    labels: Any
    poisoned: dict[str, str]
    plain: Callable[[Any], Any] = lambda params: params
    dtype: Any = jnp.float32

    def model(self, params, batch):
        return _model(self.plain(params), batch)

    def loss_of_outputs(self, outputs, batch):
        return _loss_of_outputs(outputs, batch).astype(self.dtype)

    def loss(self, params, batch):
        return self.loss_of_outputs(self.model(params, batch), batch)

    def place(self, params):
        """What tells on which side of a wall the parameters are."""
        return self.plain(params)["w"][0]


PLAIN = _Kind(_start(), _LABELS, _LABELS)


def _many_as_one(params):
    """Scalars: the first is that of the model, all others add up to its weights."""
    leaves = [params[name] for name in sorted(params)]
    padded = jnp.stack([*leaves[1:], leaves[0] * 0]).reshape(4, -1)
    w = padded.sum(1) / math.sqrt(padded.shape[1])  # so that a step in all of them is one in w
    return {"w": w, "empty": jnp.zeros((0, 2)), "s": leaves[0]}


def _many(count):
    """A group for each of so many scalars, a multiple of four."""
    start = {f"{n:03d}": _f32(0.01 * (n % 7 - 3)) for n in range(count)}
    poisoned = dict.fromkeys(start, "body") | {"000": "scalar"}
    return _Kind(start, {name: name for name in start}, poisoned, _many_as_one)


def _complex_as_real(params):
    w = jnp.concatenate([params["z"].real, params["z"].imag])
    return params | {"w": w}


KINDS = {
    "one group": PLAIN._replace(labels="all"),
    "a loss in float16": PLAIN._replace(dtype=jnp.float16),
    "an integer leaf": PLAIN._replace(
        start=_start() | {"n": jnp.int32(3)},
        labels=_LABELS | {"n": "body"},
        poisoned=_LABELS | {"n": "body"},
    ),
    "complex parameters": _Kind(
        {"z": jnp.array([-1 - 0.5j, 0.5 + 1j], jnp.complex64), "empty": jnp.zeros((0, 2))}
        | {"s": _f32(0.5)},
        {"z": "body", "empty": "body", "s": "scalar"},
        {"z": "body", "empty": "body", "s": "scalar"},
        _complex_as_real,
    ),
    "forty groups": _many(40),
    "five hundred groups": _many(500),
}


CLEAN = {
    "value": 1.0,
    "grad/body": 1.0,
    "grad/scalar": 1.0,
    "update/body": 1.0,
    "update/scalar": 1.0,
    "param/body": 1.0,
    "param/scalar": 1.0,
    "side": 1.0,
    "fault": 1.0,  # beyond the wall: everywhere if `side` is zero
    "factor": 1.0,
    "constant": 0.0,
    "uses_scalar": 1.0,
}


def _times(tree, faults, name, poisoned):
    """Every leaf but whole numbers times its fault."""

    def times(leaf, key):
        if leaf.dtype == jnp.int32:
            return leaf
        return leaf * faults[f"{name}/{poisoned[key]}"].astype(leaf.dtype)

    return {key: times(leaf, key) for key, leaf in tree.items()}


def run_of(tx, kind):
    """(faults by step) -> what was found at each step, of a loop that drops mad steps."""
    times = functools.partial(_times, poisoned=kind.poisoned)

    def gradients(params, batch):
        value, grad = jax.value_and_grad(kind.loss, allow_int=True)(params, batch)
        none = functools.partial(jnp.zeros_like, dtype=jnp.int32)
        whole = {key: none(params[key]) for key in params if params[key].dtype == jnp.int32}
        return value, grad | whole

    def step(carry, now):
        params, state = carry
        n, faults = now
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), n), (16, 4))
        y = x @ jnp.arange(4.0) + 0.1 * x[:, 0] ** 2
        given = times(params, faults, "param")
        batch = faults | {"x": x, "y": y, "place": kind.place(given)}
        value, grad = gradients(given, batch)
        direction = times(jax.tree.map(lambda g: -jnp.conj(g), grad), faults, "update")
        updates, state = tx.update(
            direction,
            state,
            given,
            batch=batch,
            value=value * faults["value"].astype(value.dtype),
            grad=times(grad, faults, "grad"),
        )

        def applied(param, update):
            mad = ~(jnp.abs(update) < 100)  # or NaN
            return param + jnp.where(mad, jnp.zeros_like(update), update)

        params = jax.tree.map(applied, params, updates)
        clean = kind.loss(params, CLEAN | {"x": x, "y": y, "place": 0.0})
        return (params, state), (state._replace(direction=()), clean)

    @jax.jit
    def run(faults):
        steps = jnp.arange(STEPS)
        return jax.lax.scan(step, (kind.start, tx.init(kind.start)), (steps, faults))[1]

    return run


def faults_at(*at):
    """Faults by step, given by (step, names and values)."""
    faults = {name: np.full(STEPS, value, np.float32) for name, value in CLEAN.items()}
    for step, changed in at:
        for name, value in changed.items():
            faults[name][step] = value
    return faults


def statuses(states):
    return np.stack(list(states.diagnostics.kept.values()))
