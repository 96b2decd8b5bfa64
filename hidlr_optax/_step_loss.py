"""ℓ(η) = L(w + Σ_k η_k u_k): the loss along the K group steps of one direction.

This is the function that a `Quadratic` models. Estimators evaluate and differentiate it, the guard
looks at it before a step is taken; nothing else in the package calls the loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hidlr_optax._groups import Groups


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: JAX may trace it as a function
class StepLoss:
    """The loss as a function of K learning rates: call it with (K,) rates, get a scalar.

    Attributes:
      loss: L, params -> scalar; called with parameters in float32 or wider.
      params: w.
      direction: u, like params: params + u is one step at learning rates of one.
      groups: the K groups.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hidlr_optax._groups import Groups
      >>> params = {"x": jnp.asarray(3.0), "y": jnp.asarray(1.0)}
      >>> direction = {"x": jnp.asarray(-3.0), "y": jnp.asarray(-1.0)}
      >>> groups = Groups.of({"x": "x", "y": "y"}, params)
      >>> step_loss = StepLoss(lambda p: p["x"] ** 2 + p["y"] ** 2, params, direction, groups)
      >>> float(step_loss(jnp.array([1.0, 0.0])))  # the whole step in x, none in y
      1.0
      >>> jax.grad(step_loss)(jnp.zeros(2)).tolist()  # minus the slopes
      [-18.0, -2.0]
    """

    loss: Callable[[Any], jax.Array]
    params: Any
    direction: Any
    groups: Groups

    def __len__(self) -> int:
        """K."""
        return len(self.groups)

    def __call__(self, rates: jax.Array) -> jax.Array:
        """ℓ(η), in the type that the loss has."""
        return self.loss(self.end(rates))

    def end(self, rates: jax.Array) -> Any:
        """Parameters after the step, w + Σ_k η_k u_k, in float32 or wider."""
        return self.groups.step(self.params, self.direction, rates)

    def start(self) -> jax.Array:
        """ℓ(0), the loss at the parameters, evaluated as it is along the step."""
        return self(jnp.zeros(len(self), jnp.float32))

    def narrow(self) -> "StepLoss":
        """The same with parameters in their own types, for losses that wider ones do not fit."""

        def loss(params: Any) -> jax.Array:
            def cast(leaf: Any, own: Any) -> jax.Array:
                return jnp.asarray(leaf).astype(jnp.result_type(own))

            return self.loss(jax.tree.map(cast, params, self.params))

        return dataclasses.replace(self, loss=loss)

    def slope(self, gradient: Any) -> jax.Array:
        """b_k = −⟨∇L_k, u_k⟩, (K,), from the gradient of the loss at the parameters."""
        return -self.groups.inner(gradient, self.direction)

    def along(self, direction: Any) -> "StepLoss":
        """The same loss, from the same parameters, along another direction."""
        return dataclasses.replace(self, direction=direction)
