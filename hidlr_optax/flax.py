"""Flax: a linen `TrainState` that passes on what `hidlr` needs, and helpers for nnx.

Needs flax, in the extra `flax`. Import it by name: `import hidlr_optax.flax`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

try:
    import flax.traverse_util
    from flax import nnx
    from flax.training import train_state
except ModuleNotFoundError as error:
    raise ImportError(
        "hidlr_optax.flax needs flax: pip install 'hidlr-optax[flax]', or '.[flax]' from a checkout"
    ) from error

from hidlr_optax._paths import leaf_paths, listing
from hidlr_optax._remember import RememberingLoss
from hidlr_optax._take_step import as_value_fn, evaluated, unless_default
from hidlr_optax.peft._partition import trainable_labels
from hidlr_optax.peft._plan import Plan

_STATEFUL = nnx.Module, nnx.Rngs, nnx.RngStream


class TrainState(train_state.TrainState):
    """Flax's `TrainState` whose `apply_gradients` hands `tx.update` its extra arguments.

    Flax's own calls `tx.update(grads, opt_state, params)` and nothing beside, so that neither
    `hidlr` nor Optax's line searches get to see a loss.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd, hidlr_optax.flax
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch @ params["w"] - 1.0) ** 2)
      >>> tx = optax.chain(optax.sgd(1.0), hd.hiulr(loss_fn))
      >>> params = {"w": jnp.zeros(2)}
      >>> state = hidlr_optax.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> batch = jnp.ones((4, 2))
      >>> value, grads = jax.value_and_grad(loss_fn)(state.params, batch)
      >>> state = state.apply_gradients(grads=grads, batch=batch, value=value)
      >>> bool(loss_fn(state.params, batch) < value)
      True
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        batch: Any = None,
        value: Any = None,
        value_fn: Callable[..., Any] | None = None,
        grad: Any = None,
        refresh: Any = True,
        **kwargs: Any,
    ) -> "TrainState":
        """One step of the optimizer.

        Args:
          grads: gradients like params.
          batch: handed to the `loss_fn` of `hidlr`.
          value: the loss at params, of this batch.
          value_fn: params -> loss, instead of `loss_fn` and `batch`.
          grad: the raw gradient of the loss, where `grads` is not (clipped or scaled outside of
            `tx`); None: `grads`.
          refresh: as `hidlr` has it.
          **kwargs: fields of the state to replace, such as `batch_stats`.

        Returns:
          The new state.
        """
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            # `updates`, not `grads`: Flax takes the part out that it overwrites by itself (fp8).
            raw = updates if grad is None else grad
            known = {"batch": batch, "value": value, "value_fn": value_fn, "grad": raw}
            return tx.update(updates, state, params, **known, **unless_default(refresh))

        if grad is None and any(map(jax.numpy.iscomplexobj, jax.tree.leaves(grads))):
            raise ValueError(
                "with complex parameters, pass both: grads=, the conjugate of what jax.grad "
                "returned, for the optimizer to go downhill, and grad=, what it returned"
            )
        informed = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        stepped = super(TrainState, informed).apply_gradients(grads=grads, **kwargs)
        return stepped.replace(tx=self.tx)

    def take_step(
        self,
        loss_fn: Callable[..., Any],
        *args: Any,
        has_aux: bool = False,
        value_and_grad: Callable[..., Any] | None = None,
        edit: Callable[[Any], Any] | None = None,
        refresh: Any = True,
        **kwargs: Any,
    ) -> tuple["TrainState", Any]:
        """One training step, from loss and gradient to the new state: `hidlr_optax.take_step`.

        Args:
          loss_fn: (params, *args, **kwargs) -> loss, or (loss, auxiliary outputs) with `has_aux`.
            A closure over a dropout key or batch statistics will do.
          *args: handed to `loss_fn`.
          has_aux: as `jax.value_and_grad` has it.
          value_and_grad: an own gradient, instead of `jax.value_and_grad(loss_fn)`.
          edit: gradient -> gradient, before the optimizer gets it.
          refresh: as `hidlr` has it.
          **kwargs: handed to `loss_fn`.

        Returns:
          The new state, and what `loss_fn` returned at the old parameters.
        """
        take = value_and_grad or jax.value_and_grad(loss_fn, has_aux=has_aux)
        out, grad, known = evaluated(take(self.params, *args, **kwargs), has_aux, edit)
        value_fn = as_value_fn(loss_fn, has_aux, *args, **kwargs)
        new = self.apply_gradients(grads=grad, value_fn=value_fn, refresh=refresh, **known)
        return new, out


def take_step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    value_and_grad: Callable[..., Any] | None = None,
    edit: Callable[[Any], Any] | None = None,
    refresh: Any = True,
    **kwargs: Any,
) -> Any:
    """One training step of an nnx model: `hidlr_optax.take_step`, with what nnx asks for.

    Holds dropout keys and statistics for the probes before the gradient draws and writes them,
    differentiates by what the optimizer trains, and updates. Put it under `nnx.jit`.

    Args:
      model: in the mode it is trained in.
      optimizer: with `hidlr(None, labels)` in its chain.
      loss_fn: (model, *args, **kwargs) -> loss, or (loss, auxiliary outputs) with `has_aux`.
      *args: handed to `loss_fn`: the batch, an `nnx.Rngs`.
      has_aux: as `nnx.value_and_grad` has it.
      value_and_grad: an own gradient, instead of `nnx.value_and_grad(loss_fn)`, with the same
        arguments and results.
      edit: gradient -> gradient, before the optimizer gets it.
      refresh: as `hidlr` has it.
      **kwargs: handed to `loss_fn`.

    Returns:
      What `loss_fn` returned at the old parameters. The model and the optimizer are new.

    Example:
      >>> import jax.numpy as jnp, optax, hidlr_optax as hd, hidlr_optax.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax.sgd(1.0), hd.hiulr(None))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def loss_fn(model, batch):
      ...     return jnp.mean((model(batch) - 1.0) ** 2)
      >>> step = nnx.jit(lambda *now: hidlr_optax.flax.take_step(*now, loss_fn, jnp.ones((4, 2))))
      >>> bool(step(model, optimizer) > step(model, optimizer))
      True
    """
    _check_order(model, optimizer, loss_fn)
    wrt = optimizer.wrt
    value_fn = value_fn_for(model, loss_fn, *args, wrt=wrt, **kwargs)
    take = value_and_grad or nnx.value_and_grad(
        loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=has_aux
    )
    out, grad, known = evaluated(take(model, *args, **kwargs), has_aux, edit)
    optimizer.update(model, grad, value_fn=value_fn, **known, **unless_default(refresh))
    return out


def _check_order(model: Any, optimizer: Any, loss_fn: Any) -> None:
    """Raises a TypeError unless the first arguments of `take_step` are these."""
    right = isinstance(model, nnx.Module), isinstance(optimizer, nnx.Optimizer), callable(loss_fn)
    if not all(right) or isinstance(model, nnx.Optimizer):
        got = ", ".join(type(x).__name__ for x in (model, optimizer, loss_fn))
        raise TypeError(
            "take_step(model, optimizer, loss_fn, *args) takes an nnx.Module, an nnx.Optimizer and "
            f"a function, got {got}"
        )


def _held(argument: Any) -> Callable[[], Any]:
    """Makes copies of an argument as it is now; of one without state, it is itself."""
    if not isinstance(argument, _STATEFUL):
        return lambda: argument
    graph, state = nnx.split(argument)
    leaves, structure = jax.tree.flatten(state)
    return lambda: nnx.merge(graph, jax.tree.unflatten(structure, leaves))


def value_fn_for(
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *args: Any,
    wrt: Any = nnx.Param,
    **kwargs: Any,
) -> Callable[[Any], jax.Array]:
    """The loss of an nnx model as a function of its parameters alone, for `update(value_fn=…)`.

    Everything else in the model is held as it is now: dropout keys and counts, batch statistics,
    parameters that `wrt` leaves out; and so are an `nnx.Rngs` and modules among the arguments. So
    all probes of a refresh see one and the same function, and nothing that they write reaches the
    model or the arguments.

    Call it BEFORE the gradient is taken, which draws a dropout key: if `value` is passed to the
    update as well, it has to be this function's value at the parameters. Without `value`, there is
    one more evaluation, and nothing to heed. `take_step` does it all.

    Args:
      model: in the mode it is trained in.
      loss_fn: (model, *args, **kwargs) -> scalar, or (scalar, auxiliary outputs), as given to
        `nnx.value_and_grad`.
      *args: handed to `loss_fn`: the batch, an `nnx.Rngs`.
      wrt: the nnx filter of the parameters, that of `nnx.Optimizer` and of the gradient.
      **kwargs: handed to `loss_fn`.

    Returns:
      A function of the parameters as `nnx.Optimizer` hands them to `tx.update`.

    Raises:
      ValueError: `wrt` selects nothing.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd, hidlr_optax.flax
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
      >>> tx = optax.chain(optax.sgd(1.0), hd.hiulr(None))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def loss_fn(model, batch):
      ...     return jnp.mean((model(batch) - 1.0) ** 2)
      >>> value_fn = hidlr_optax.flax.value_fn_for(model, loss_fn, jnp.ones((4, 2)))
      >>> loss, grads = nnx.value_and_grad(loss_fn)(model, jnp.ones((4, 2)))
      >>> _ = optimizer.update(model, grads, value_fn=value_fn, value=loss, grad=grads)
    """
    graph, params, rest = nnx.split(model, wrt, ...)
    expected = [leaf.shape for leaf in jax.tree.leaves(params)]
    if not expected:
        raise ValueError(f"wrt={wrt!r} selects no parameter of {type(model).__name__}")
    # Flattened, and put together inside of whatever traces the probes: so the Variables there are
    # new ones, which may be written to.
    leaves, structure = jax.tree.flatten(rest)
    arguments, tree = jax.tree.flatten(
        (args, kwargs), is_leaf=lambda node: isinstance(node, _STATEFUL)
    )
    fresh = [_held(node) for node in arguments]

    def value_fn(params: Any) -> jax.Array:
        got = [leaf.shape for leaf in jax.tree.leaves(params)]
        if got != expected:
            raise ValueError(
                f"wrt={wrt!r} selects {len(expected)} parameters of the model, but the optimizer "
                f"hands over {len(got)}, or others: give value_fn_for the wrt of nnx.Optimizer"
            )
        merged = nnx.merge(graph, params, jax.tree.unflatten(structure, leaves))
        args, kwargs = jax.tree.unflatten(tree, [make() for make in fresh])
        out = loss_fn(merged, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return value_fn


def remember_batch(loss_fn: Callable[..., Any], wrt: Any = nnx.Param) -> RememberingLoss:
    """A loss of an nnx model that remembers its batch: `hidlr_optax.remember_batch` for nnx.

    For trainers that call `optimizer.update(model, grads)` and nothing beside. Dropout keys and
    statistics are held for the probes as they are when the gradient is taken, as `value_fn_for`
    does.

    Args:
      loss_fn: (model, *args, **kwargs) -> loss, or (loss, auxiliary outputs).
      wrt: the nnx filter of the parameters, that of `nnx.Optimizer` and of the gradient.

    Returns:
      A callable with the arguments and results of `loss_fn`: one for the trainer and for
      `hidlr_optax.hessian_informed`.

    Example:
      >>> import jax.numpy as jnp, optax, hidlr_optax as hd, hidlr_optax.flax
      >>> from flax import nnx
      >>> @hidlr_optax.flax.remember_batch
      ... def loss_fn(model, batch):
      ...     return jnp.mean((model(batch) - 1.0) ** 2)
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = hd.hessian_informed(optax.sgd(1.0), loss_fn, "all")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, batch):  # as the trainer has it
      ...     loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> bool(step(model, optimizer, jnp.ones((4, 2))) > step(model, optimizer, jnp.ones((4, 2))))
      True
    """
    return RememberingLoss(
        loss_fn,
        bind=lambda model, *args, **kwargs: value_fn_for(model, loss_fn, *args, wrt=wrt, **kwargs),
        differentiated=lambda model: nnx.state(model, wrt),
    )


def label_by_filter(
    model: nnx.Module,
    rules: Sequence[tuple[Any, str]] | Mapping[Any, str],
    default: str | None = None,
    wrt: Any = nnx.Param,
) -> Any:
    """Labels the parameters of an nnx model by the first filter that selects them.

    Filters are nnx's own: a type (`nnx.LoRAParam`), `nnx.PathContains("head")`, `nnx.Any`,
    `nnx.All`, `nnx.Not`, or a callable (path, variable) -> bool. They need the Variables, which an
    optimizer does not see at each step; hence a tree, and not a callable as `label_by_path` can be.

    Args:
      model: the nnx module.
      rules: (filter, label) pairs, or a dict of them, tried in order.
      default: the label of parameters that no filter selects. None: every one has to be selected.
      wrt: the filter of `nnx.Optimizer`: what is not selected by it needs no label.

    Returns:
      A nested dict of str, of the paths of the parameters.

    Raises:
      ValueError: a rule is no pair, `wrt` or a rule selects nothing, or a parameter is selected by
        no rule and there is no default.

    Example:
      >>> import hidlr_optax.flax
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
      >>> hidlr_optax.flax.label_by_filter(model, [(nnx.LoRAParam, "lora")], "rest")
      {'base_module': {'bias': 'rest', 'kernel': 'rest'}, 'lora_a': 'lora', 'lora_b': 'lora'}
    """
    rules = list(rules.items() if isinstance(rules, Mapping) else rules)
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], str)):
            raise ValueError(
                "rules must be (filter, label) pairs, such as (nnx.LoRAParam, 'lora'), or a dict "
                f"{{filter: label}}, got {rule!r} among them"
            )
    chosen = [(nnx.filterlib.to_predicate(rule), label) for rule, label in rules]
    variables = list(nnx.to_flat_state(nnx.state(model, wrt)))
    if not variables:
        raise ValueError(f"wrt={wrt!r} selects no parameter of {type(model).__name__}")
    for (rule, label), (selects, _) in zip(rules, chosen, strict=True):
        if not any(selects(path, variable) for path, variable in variables):
            raise ValueError(f"the rule ({rule!r}, {label!r}) selects no parameter of the model")
    labels, uncovered = {}, []
    for path, variable in variables:
        found = next((label for selects, label in chosen if selects(path, variable)), default)
        name = tuple(map(str, path))
        if found is None:
            uncovered.append(name)
        labels[name] = found
    if uncovered:
        raise ValueError(f"no rule selects {listing(uncovered)}; add one, or pass default='rest'")
    return flax.traverse_util.unflatten_dict(labels)


def trainable_filter(
    model: nnx.Module, labels: Any, plan: Plan, wrt: Any = nnx.Param
) -> Callable[[Any, Any], bool]:
    """The nnx filter of the parameters that a plan trains: `hidlr_optax.peft.split` for nnx.

    Use it wherever `wrt` is asked for: in `nnx.Optimizer`, in `nnx.DiffState` for the gradient, and
    in `value_fn_for`. What it leaves out has no gradients, no optimizer state and no updates.

    Args:
      model: the nnx module.
      labels: for the parameters that `wrt` selects, as `hidlr` takes them.
      plan: from `hidlr_optax.peft`, or of its kind.
      wrt: the filter of the parameters that are labelled.

    Returns:
      (path, variable) -> bool.

    Raises:
      ValueError: the labels do not match the parameters, or are not those of the plan.

    Example:
      >>> import hidlr_optax as hd, hidlr_optax.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> plan = hd.Plan(trainable={"bias"}, frozen={"rest"})
      >>> wrt = hidlr_optax.flax.trainable_filter(model, hd.label_by_role, plan)
      >>> [path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
      [('bias',)]
    """
    chosen = trainable_labels(nnx.state(model, wrt), labels, plan)
    paths = frozenset(path for path, _ in leaf_paths(chosen))

    def trains(path: Any, variable: Any) -> bool:
        del variable
        return tuple(map(str, path)) in paths

    return trains
