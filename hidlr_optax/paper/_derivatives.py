"""Estimators that differentiate: `secant`, `hessian` and `gauss_newton`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax._quadratic import Quadratic
from hidlr_optax._step_loss import StepLoss
from hidlr_optax.paper._measurement import RESOLUTION, Measurement, check_batch_size, evaluate


def _linearize(fn: Callable[[jax.Array], Any], rates: jax.Array, needs: str) -> tuple[Any, Any]:
    """`jax.linearize` at no step; says what is needed where JAX cannot differentiate."""
    try:
        return jax.linearize(fn, jnp.zeros_like(rates))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{needs}; JAX says: {error}. probes() evaluates only.") from error


def _measurement(slope: jax.Array, matrix: jax.Array) -> Measurement:
    matrix = ((matrix + matrix.T) / 2).astype(jnp.float32)
    diagonal = jnp.diagonal(matrix)
    quadratic = Quadratic(slope.astype(jnp.float32), diagonal, matrix - jnp.diag(diagonal))
    return Measurement.exact(quadratic)


@dataclasses.dataclass(frozen=True)
class Hessian:
    """The estimator made by `hessian`, whose arguments it keeps."""

    batch_size: int | None
    couples = True

    def estimate(
        self,
        step_loss: StepLoss,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        **unused: Any,
    ) -> Measurement:
        """The Hessian of x ↦ L(w + Σ x_k u_k) at zero, K tangents of its gradient."""
        del unused
        gradient, product = _linearize(
            jax.grad(step_loss), rates, "hessian() needs a twice differentiable loss"
        )
        axes = jnp.eye(len(rates), dtype=jnp.float32)
        matrix = evaluate(product, axes, self.batch_size)
        return _measurement(-gradient if slope is None else slope, matrix)


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """The estimator made by `gauss_newton`, whose arguments it keeps."""

    model_fn: Callable[[Any, Any], Any]
    output_loss: Callable[[Any, Any], jax.Array]
    batch_size: int | None
    couples = True

    def estimate(
        self,
        step_loss: StepLoss,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        batch: Any = None,
        **unused: Any,
    ) -> Measurement:
        """The Hessian of x ↦ output_loss(o + Jx), outputs linear in the rates."""
        del unused
        outputs, product = _linearize(
            lambda offset: self.model_fn(step_loss.end(offset), batch),
            rates,
            "gauss_newton() needs a model_fn that is differentiable in forward mode",
        )
        found = jax.eval_shape(self.output_loss, outputs, batch)
        if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(
                "output_loss(model_fn(params, batch), batch) has to be the loss, a real scalar; "
                f"got {found}"
            )
        tangents = evaluate(product, jnp.eye(len(rates), dtype=jnp.float32), self.batch_size)

        def linearised(offset: jax.Array) -> jax.Array:
            def moved(output: jax.Array, tangent: jax.Array) -> jax.Array:
                return output + jnp.tensordot(offset.astype(tangent.dtype), tangent, axes=1)

            return self.output_loss(jax.tree.map(moved, outputs, tangents), batch)

        origin = jnp.zeros_like(rates)
        gradient = jax.grad(linearised)(origin) if slope is None else -slope
        return _measurement(-gradient, jax.hessian(linearised)(origin))

    def check(self, loss_fn: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> None:
        """Raises a ValueError where `output_loss` of the model is not the loss, to 1 in 10,000."""
        expected = float(loss_fn(params, batch))
        found = float(self.output_loss(self.model_fn(params, batch), batch))
        if not abs(found - expected) <= 1e-4 * abs(expected):
            raise ValueError(
                f"output_loss(model_fn(params, batch), batch) is {found}, but the loss is "
                f"{expected}: the curvature would be that of another function"
            )


@dataclasses.dataclass(frozen=True)
class Secant:
    """The estimator made by `secant`."""

    couples = False  # the coupling is in the row sums, but not by itself

    def estimate(
        self,
        step_loss: StepLoss,
        rates: jax.Array,
        *,
        slope: jax.Array | None = None,
        **unused: Any,
    ) -> Measurement:
        """The slope lost over the step with these rates: (Aη)_k = b_k − b_k(η)."""
        del unused
        gradient = jax.grad(step_loss)
        try:
            start = -gradient(jnp.zeros_like(rates)) if slope is None else slope
            end = -gradient(rates)
        except (TypeError, ValueError, NotImplementedError) as error:
            message = f"secant() needs a differentiable loss; JAX says: {error}."
            raise ValueError(f"{message} probes() evaluates only.") from error
        start, end = start.astype(jnp.float32), end.astype(jnp.float32)
        largest = jnp.maximum(jnp.abs(start), jnp.abs(end))
        rounding = RESOLUTION * float(jnp.finfo(jnp.float32).eps) * largest
        return Measurement(
            quadratic=Quadratic(start, (start - end) / rates),
            resolved=largest > 0,
            least_curvature=rounding / rates,
            offsets=rates[None],
            changes=jnp.zeros(0, jnp.float32),
        )


def secant() -> Secant:
    """Curvature that each group adds to the joint step, from one gradient at its end.

    Over the step with the present rates η, the slopes change by b − b(η) = Aη: all K rows at once,
    exact where the loss is quadratic. The curvature reported is (Aη)_k/η_k = a_k + Σ_l≠k A_kl
    η_l/η_k, that of group k in the company of the others. Costs one gradient of the loss, whatever
    K is, beside the one that `update` is given.

    Returns:
      An estimator, for `one_step(..., curvature=...)`.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.paper.secant()
      Secant()
    """
    return Secant()


def hessian(batch_size: int | None = None) -> Hessian:
    """The exact K×K curvature along the group steps, by K Hessian-vector products.

    A_kl = u_kᵀ H u_l, from `jax.linearize` of the gradient and K tangents; the slope comes with it.
    The loss has to be twice differentiable, and the memory is that of its backward pass.

    Args:
      batch_size: how many products run at a time; None: all.

    Returns:
      An estimator, for `one_step(..., curvature=...)`. `coupled` uses all of A, `diagonal` the a_k
      alone.

    Raises:
      ValueError: `batch_size` < 1.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.paper.hessian(batch_size=4)
      Hessian(batch_size=4)
    """
    check_batch_size(batch_size)
    return Hessian(batch_size)


def gauss_newton(
    model_fn: Callable[[Any, Any], Any],
    output_loss: Callable[[Any, Any], jax.Array],
    batch_size: int | None = None,
) -> GaussNewton:
    """The K×K Gauss–Newton curvature along the group steps, forward mode alone.

    A = Jᵀ H_out J, with J the K forward-mode products of the model's outputs along the group steps
    and H_out the Hessian of the loss in the outputs. Positive semi-definite where the loss is
    convex in the outputs, as cross-entropy and squared error are.

    Args:
      model_fn: (params, batch) -> outputs, a pytree of arrays.
      output_loss: (outputs, batch) -> scalar, so that `output_loss(model_fn(params, batch), batch)`
        is the loss; `.check(loss_fn, params, batch)` on the estimator compares them. `update` has
        to be given `batch`, also beside `value_fn`.
      batch_size: how many products run at a time; None: all. They hold K copies of the outputs.

    Returns:
      An estimator, for `one_step(..., curvature=...)`. `coupled` uses all of A, `diagonal` the a_k
      alone.

    Raises:
      ValueError: `batch_size` < 1, or an argument is not callable.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd
      >>> estimator = hd.paper.gauss_newton(lambda p, x: x @ p, lambda out, x: jnp.mean(out**2))
      >>> estimator.check(lambda p, x: jnp.mean((x @ p) ** 2), jnp.ones(3), jnp.ones((2, 3)))
    """
    for name, fn in (("model_fn", model_fn), ("output_loss", output_loss)):
        if not callable(fn):
            raise ValueError(f"{name} must be callable, got {fn!r}")
    check_batch_size(batch_size)
    return GaussNewton(model_fn, output_loss, batch_size)
