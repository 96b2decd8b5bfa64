"""The Optax transformation: estimate -> average -> minimise -> guard -> scale."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hidlr_optax._checks import (
    LossFn,
    Slope,
    bind_loss,
    check_arguments,
    check_like,
    check_scalar,
    check_slope,
    refresh_if,
    usable_value,
)
from hidlr_optax._groups import Groups, wide
from hidlr_optax._hold import Hold, begin, hold
from hidlr_optax._look import Call, Rule, held
from hidlr_optax._quadratic import Kept, Quadratic, average, influence
from hidlr_optax._safety import afloat, cut, first_rates
from hidlr_optax._solvers import Solver
from hidlr_optax._state import HiDLRState, initial_rates, initial_state
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.curvature import Estimator, Measurement, probes, secant


def _is_stand_in(params: Any) -> bool:
    """Whether this is optax.tree.map_params, which initialises with an object without leaves."""
    return type(params).__name__ == "_ParamsPlaceholder"


def trust(measured: Measurement) -> jax.Array:
    """(K,) of `Kept`: which groups' measurements can be used at all.

    One loss that is not finite keeps every group: it says that some probe left the region in which
    the model means anything, and which one is not known to the others.
    """
    slope, curvature, coupling = measured.quadratic
    finite = jnp.isfinite(slope) & jnp.isfinite(curvature)
    if coupling is not None:
        finite &= jnp.all(jnp.isfinite(coupling), axis=1)
    kept = jnp.where(slope == 0, Kept.NO_SLOPE, Kept.UNRESOLVED)
    kept = jnp.where(measured.resolved, Kept.NO, kept)
    return jnp.where(jnp.all(finite), kept, jnp.where(finite, Kept.OTHER_GROUP, Kept.NON_FINITE))


def _alone(measured: Measurement) -> tuple[jax.Array, jax.Array]:
    """Slope and curvature of one refresh, zero where there is no number to be had."""
    slope, curvature, _ = measured.quadratic
    seen = jnp.isfinite(curvature) & (jnp.abs(curvature) > measured.floor)
    return jnp.where(jnp.isfinite(slope), slope, 0), jnp.where(seen, curvature, 0)


def _refresh(
    state: HiDLRState, rates: jax.Array, measured: Measurement, groups: Groups, solver: Solver
) -> HiDLRState:
    """Averages what was measured into the state and solves for the rates, starting from `rates`."""
    kept = trust(measured)
    usable = kept == Kept.NO
    measurements = groups.pack(state.measurements) + usable.astype(jnp.int32)

    def averaged(mean: jax.Array, new: jax.Array) -> jax.Array:
        use, counts = usable, measurements
        if new.ndim == 2:  # a pair of groups counts where both do
            use, counts = use[:, None] & use, jnp.minimum(counts[:, None], counts)
        return jnp.where(use, average(mean, new, solver.averaging, counts), mean)

    means = Quadratic(groups.pack(state.slope), groups.pack(state.curvature), state.coupling)
    quadratic = jax.tree.map(averaged, means, measured.quadratic)
    rates, kept = solver.solve(quadratic, rates, kept, measured.floor)
    sizes = jnp.asarray(groups.sizes, jnp.float32)
    convex = (kept == Kept.NO) & (quadratic.curvature > measured.floor)
    ppi = jnp.where(convex, influence(quadratic, sizes), groups.pack(state.influence))
    measured_slope, measured_curvature = _alone(measured)
    return state._replace(
        refreshes=optax.safe_increment(state.refreshes),
        group_learning_rates=groups.unpack(rates),
        slope=groups.unpack(quadratic.slope),
        curvature=groups.unpack(quadratic.curvature),
        influence=groups.unpack(ppi),
        measured_slope=groups.unpack(measured_slope),
        measured_curvature=groups.unpack(measured_curvature),
        coupling=quadratic.coupling,
        measurements=groups.unpack(measurements),
        kept=groups.unpack(kept),
    )


def _previous(state: HiDLRState, updates: Any) -> Any:
    """The direction of the step that led to params; the coming one at the first update."""
    return jax.tree.map(
        lambda old, new: jnp.where(state.count == 0, new, old.astype(new.dtype)),
        state.direction,
        updates,
    )


def _at_start(measured: Measurement, travelled: jax.Array) -> Measurement:
    """Moves the slope from the end of a step to its start, b + Aη, η the rates it took.

    So the slope at the start belongs to a batch that the direction has not seen, and where the
    measured slope at the end is zero, the minimum lies at the rates taken, whatever the curvature.
    """
    quadratic = measured.quadratic
    return measured._replace(quadratic=quadratic._replace(slope=quadratic.slope_at(-travelled)))


def _guarded(
    refreshed: HiDLRState,
    rates: jax.Array,
    step_loss: StepLoss,
    value: jax.Array,
    slope: jax.Array | None,
    max_rise: float,
) -> HiDLRState:
    """The refreshed state, its rates neither lost nor such that the coming step does harm.

    The step is judged at full rates, as it will be after warm-up.
    """
    groups, updates = step_loss.groups, step_loss.direction
    quadratic = Quadratic(groups.pack(refreshed.slope), groups.pack(refreshed.curvature))
    rates = afloat(groups.pack(refreshed.group_learning_rates), rates, quadratic, value)
    after = step_loss(rates)
    dtype = wide(after.dtype)
    change = (after.astype(dtype) - value.astype(dtype)).astype(jnp.float32)
    factor = cut(rates, change, value.astype(jnp.float32), slope, max_rise)
    # A step that is not finite at any rate says nothing about the rates.
    judged = jnp.isfinite(value) & jnp.all(jnp.isfinite(groups.inner(updates, updates)))
    factor = jnp.where(judged, factor, 1.0)
    return refreshed._replace(
        group_learning_rates=groups.unpack(rates * factor),
        cuts=refreshed.cuts + (factor < 1).astype(jnp.int32),
    )


def hidlr(
    loss_fn: LossFn | None,
    param_labels: Any,
    *,
    init_learning_rate: float | Mapping[str, float] | None = 1e-3,
    update_interval: int = 10,
    schedule: optax.Schedule | None = None,
    curvature: Estimator | None = None,
    slope: Slope | None = "lagged",
    solver: Solver | Hold = hold(),
    warmup: int = 20,
    lagged_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Hessian-informed differential learning rates: one rate per group of parameters.

    Takes the incoming updates as the direction u and multiplies group k by η_k. They have to be
    descending and at rate one, as those of `optax.adamw(1.0)` are. Every `update_interval` steps,
    it models the loss along the group steps, L(w + Σ η_k u_k) − L(w) ≈ −bᵀη + ½ ηᵀAη (arXiv
    2501.06954, eq. 2.3), and moves the rates. By default (`hold`) that costs one forward pass, and
    for K > 1 one gradient at every fourth refresh, whatever K is. For Algorithm 1 of the paper to
    the letter, see `paper_hidlr`.

    `update(updates, state, params, *, batch, value, grad, value_fn)` takes, beside what every
    transformation takes:

    * `batch`: handed to `loss_fn`.
    * `value_fn`: params -> scalar, takes the place of `loss_fn` and `batch`. Keywords of `update`
      that its signature names are handed on to it, as Optax's line searches do.
    * `value`: the probed loss at `params`, of this `batch` and no other; spares one evaluation, and
      lets the guard see every step.
    * `grad`: the raw gradient of that loss, before any preconditioning; gives the slope.
    * `refresh`: a bool, False to leave the rates alone at this call. See `multi_steps`.

    Other keywords are ignored. Jit the training step: un-jitted, every call compiles the probes
    anew. Under `vmap`, both branches of the refresh are evaluated at every step. Under `pmap` or
    `shard_map`, `pmean` the loss, `value` and `grad`: `shard_map` refuses what differs from device
    to device, but `pmap` and `check_vma=False` let replicas drift apart.

    Args:
      loss_fn: (params, batch) -> scalar; None if `update` is always given `value_fn`. It has to be
        the same function at all probes of a refresh: fix dropout keys and batch statistics.
      param_labels: a pytree of str like params, a prefix of it, or a callable from params to one.
      init_learning_rate: the proportions of the rates to begin with, one number for all groups or
        `{label: rate}`. Their size is found at the first update: the first step changes the loss by
        a hundredth, three with `hold`. With `warmup=0`, or without `grad`, the rates begin as they
        are given. None: all alike.
      update_interval: Φ, steps from refresh to refresh.
      schedule: step -> factor, 1 at its peak; multiplies all rates. `hold` knows it and does not
        undo it; put no other scaling after `hidlr`.
      curvature: the estimator, from `secant`, `parabola`, `probes`, `hessian` or `gauss_newton`.
        With `hold` it measures the single groups, every few refreshes; `parabola` leaves their
        proportions alone. None: `secant()` with `hold`, `probes()` with the other solvers.
      slope: where b comes from. "lagged": slope and curvature along the previous step, which the
        present batch has not made, b_k = −⟨∇L_k, u_k⟩ + (Aη)_k at its start. "gradient":
        b_k = −⟨∇L_k, u_k⟩ along the coming step, on the batch that made u_k: for full batches; on
        mini-batches it is too steep. "probes": fitted together with the curvature, on whatever
        `batch` is passed, such as the next or a held-out one. None: "gradient" at calls with
        `grad`, "probes" at others.
      solver: from `hold`, `coupled` or `diagonal`.
      warmup: the number of first updates during which there is a refresh at each and the rates are
        found. `coupled` and `diagonal` also raise the rates linearly over them. 0: none of this.
      lagged_dtype: the dtype in which "lagged" stores the direction, such as bfloat16; None: its
        own.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `HiDLRState`.

    Raises:
      ValueError: an argument is out of range; from `init`, labels or rates do not match the
        parameters; from `update`, there are no params, no loss, or no gradient where one is needed.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> def loss_fn(params, batch):
      ...     return jnp.sum((batch @ params["w"] + params["b"] - 1.0) ** 2)
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
      >>> labels = {"w": "weight", "b": "bias"}
      >>> tx = optax.chain(optax.sgd(1.0), hd.hidlr(loss_fn, labels))
      >>> state = tx.init(params)
      >>> batch = jnp.ones((4, 2))
      >>> value, grad = jax.value_and_grad(loss_fn)(params, batch)
      >>> updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
      >>> sorted(optax.tree.get(state, "group_learning_rates"))
      ['bias', 'weight']
    """
    holds = isinstance(solver, Hold)
    if curvature is None:
        curvature = secant() if holds else probes()
    check_arguments(
        loss_fn, init_learning_rate, update_interval, schedule, curvature, slope, solver, warmup
    )

    def init_fn(params: Any) -> HiDLRState:
        direction = optax.tree.zeros_like(params, lagged_dtype) if slope == "lagged" else ()
        if _is_stand_in(params):
            # Which fields are like params is all that is asked for: a prefix of the state says it.
            fields: dict[str, Any] = {field: jnp.zeros(()) for field in HiDLRState._fields}
            if holds or not curvature.couples:
                fields["coupling"] = None
            fields["progress"] = jax.tree.map(lambda _: jnp.zeros(()), begin()) if holds else ()
            fields["direction"] = params if slope == "lagged" else ()
            return HiDLRState(**fields)
        groups = Groups.of(param_labels, params)
        progress = begin() if holds else ()
        couples = curvature.couples and not holds
        return initial_state(groups.names, init_learning_rate, couples, progress, direction)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        batch: Any = None,
        value: Any = None,
        grad: Any = None,
        value_fn: Callable[..., Any] | None = None,
        refresh: Any = True,
        **extra_args: Any,
    ) -> tuple[Any, HiDLRState]:
        if params is None:
            raise ValueError(
                "hidlr probes the loss around params: call update(updates, state, params, ...)"
            )
        groups = Groups.of(param_labels, params)
        check_like(updates, params, "updates")
        check_slope(slope, curvature, init_learning_rate, grad, params)
        loss = bind_loss(loss_fn, value_fn, batch, extra_args)
        no_batch = batch is None and value_fn is None
        step_loss = StepLoss(loss, params, updates, groups)
        check_scalar(step_loss, no_batch)
        value = usable_value(value, params)

        interval = jnp.asarray(update_interval).astype(jnp.int32)
        length = jnp.asarray(warmup).astype(jnp.int32)
        # The stored direction stays out of the branches: it is replaced below at every step, and
        # a copy as large as the parameters need not be carried through them.
        scalars = state._replace(direction=())

        def refreshed(solver: Solver) -> HiDLRState:
            at = value
            if at is None:
                at = step_loss.start()
            present = None if grad is None else step_loss.slope(grad)
            taken = rates = groups.pack(state.group_learning_rates)
            if present is not None:
                begins = (state.refreshes == 0) & (length > 0)
                rates = jnp.where(begins, first_rates(rates, at, present), rates)
            along = step_loss
            if slope == "lagged":
                along = step_loss.along(_previous(state, updates))
            known = None if grad is None or slope == "probes" else along.slope(grad)
            measured = curvature.estimate(
                along,
                rates,
                value=at,
                slope=known,
                expected=Quadratic(groups.pack(state.slope), groups.pack(state.curvature)),
                batch=batch,
                step=state.count,
            )
            if slope == "lagged":
                travelled = jnp.where(state.count == 0, 0.0, taken * state.schedule_factor)
                measured = _at_start(measured, travelled)
            new = _refresh(scalars, rates, measured, groups, solver)
            if solver.max_rise is None:
                return new
            return _guarded(new, rates, step_loss, at, present, solver.max_rise)

        finding = state.count < length
        due = ((state.count % interval == 0) | finding) & jnp.asarray(refresh)
        factor = jnp.asarray(1.0 if schedule is None else schedule(state.count), jnp.float32)
        if isinstance(solver, Hold):
            asked = 1e-3 if init_learning_rate is None else init_learning_rate
            rule = Rule(
                solver,
                curvature,
                finding=finding,
                due=due,
                allowed=jnp.asarray(refresh),
                watching=finding,
                factor=factor,
                initial=groups.pack(initial_rates(asked, groups.names)),
            )
            previous = state.direction if slope == "lagged" else None
            gradient = None if slope == "probes" else grad
            call = Call(step_loss, previous, batch, value, gradient)
            new = held(scalars, call, rule)
        else:
            new = refresh_if(due, functools.partial(refreshed, solver), scalars)
            ramp = (new.count + 1) / jnp.maximum(length, 1)
            factor *= jnp.minimum(ramp, 1.0).astype(jnp.float32)
        rates = groups.pack(new.group_learning_rates) * factor
        direction = optax.tree.cast(updates, lagged_dtype) if slope == "lagged" else ()
        return groups.scale(updates, rates), new._replace(
            count=optax.safe_increment(new.count), schedule_factor=factor, direction=direction
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
