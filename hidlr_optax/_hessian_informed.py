"""`hidlr` around a base optimizer, instead of behind it in a chain."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hidlr_optax._checks.advice import finds_rates, warn_of_schedule
from hidlr_optax._checks.loss import LossFn
from hidlr_optax._hidlr import hidlr
from hidlr_optax._paths import nodes
from hidlr_optax.report._find import is_state


@finds_rates
def hessian_informed(
    base: optax.GradientTransformation,
    loss_fn: LossFn | None,
    param_labels: Any,
    *,
    init_learning_rate: float | Mapping[str, float] | None = None,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    warmup: int = 20,
    bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A base optimizer at unit learning rate, whose rates are those that `hidlr` finds.

    The same as `optax.chain(base, hidlr(loss_fn, param_labels, ...))`, to the last bit and with the
    same state, but `update` needs no `grad`: the gradient that comes in is the raw one. So whatever
    edits it stands inside of `base`, such as clipping, `optax.partition` or `optax.masked`.
    `update(grads, state, params, *, batch, value, value_fn, refresh)` is that of `hidlr`. Of
    complex parameters, the gradient comes in conjugated, as Optax has it.

    Where the gradient was edited before it comes in, pass the raw one as `grad=...`.

    Args:
      base: descending, at rate one, such as `optax.adamw(1.0)`. Accumulation goes around, not in
        here: see `multi_steps`.
      loss_fn: as in `hidlr`, like all that follow.
      param_labels: a pytree of str like params, a prefix of it, or a callable from params to one.
      init_learning_rate: the proportions of the groups, or with `warmup=0` the rates.
      update_interval: Φ.
      schedule: step -> factor, 1 at its peak.
      warmup: the number of looks in which the rates are found.
      bounds: `{label: (lowest, highest)}`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is that of the chain.

    Raises:
      ValueError: as in `hidlr`; `base` is no transformation; from `init`, `base` accumulates, has
        a `hidlr` of its own, or is schedule-free.

    Warns:
      UserWarning: as in `hidlr`; from `init`, `base` has a schedule of its own.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["w"] + params["b"] - 1.0) ** 2)
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
      >>> base = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
      >>> tx = hd.hessian_informed(base, loss_fn, {"w": "weight", "b": "bias"})
      >>> state = tx.init(params)
      >>> batch = jnp.ones((4, 2))
      >>> grads = jax.grad(loss_fn)(params, batch)
      >>> updates, state = tx.update(grads, state, params, batch=batch)
      >>> sorted(optax.tree.get(state, "group_learning_rates"))
      ['bias', 'weight']
    """
    _check_base(base)
    chain = optax.chain(
        base,
        hidlr(
            loss_fn,
            param_labels,
            init_learning_rate=init_learning_rate,
            update_interval=update_interval,
            schedule=schedule,
            warmup=warmup,
            bounds=bounds,
        ),
    )

    def init_fn(params: Any) -> Any:
        state: Any = chain.init(params)
        _check_base_state(state[0])
        warn_of_schedule(state[0])
        return state

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, grad: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        raw = jax.tree.map(jnp.conj, updates) if grad is None else grad
        return chain.update(updates, state, params, grad=raw, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_base(base: Any) -> None:
    """Raises a ValueError unless this is a transformation."""
    if isinstance(base, optax.GradientTransformation):
        return
    if isinstance(base, optax.MultiSteps):
        raise ValueError(_ACCUMULATES)
    got = f"the function {base.__name__}" if hasattr(base, "__name__") else type(base).__name__
    raise ValueError(
        "hessian_informed(base, loss_fn, param_labels) takes the optimizer first, a transformation "
        f"such as optax.adamw(1.0); got {got}"
    )


_ACCUMULATES = (
    "base accumulates gradients (optax.MultiSteps), and between its steps there is nothing to "
    "measure: put accumulation around, hd.multi_steps(hd.hessian_informed(base, ...), k)"
)


def _check_base_state(state: Any) -> None:
    """Raises a ValueError where the base has what cannot stand inside of it."""

    def is_part(node: Any) -> bool:
        kinds = optax.MultiStepsState, optax.contrib.ScheduleFreeState
        return isinstance(node, kinds) or is_state(node)

    parts = nodes(state, is_part)
    if any(isinstance(part, optax.MultiStepsState) for part in parts):
        raise ValueError(_ACCUMULATES)
    if any(isinstance(part, optax.contrib.ScheduleFreeState) for part in parts):
        raise ValueError(
            "optax.contrib.schedule_free keeps parameters of its own, which would move at rate one "
            "while those that are trained move at the rates that are found: give hessian_informed "
            "the optimizer alone, such as optax.adamw(1.0), and evaluate the average of the "
            "parameters, hidlr_optax.averaging"
        )
    if any(map(is_state, parts)):
        raise ValueError(
            "base has a hidlr of its own, and rates cannot be found twice: give hessian_informed "
            "the optimizer alone, such as optax.adamw(1.0)"
        )
