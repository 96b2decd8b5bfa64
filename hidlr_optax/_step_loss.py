"""ℓ(η) = L(w + Σ_k η_k u_k): the loss along the K group steps of one direction.

This is the function that a `Quadratic` models. Estimators evaluate and differentiate it, the guard
looks at it before a step is taken; nothing else in the package calls the loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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


@dataclasses.dataclass(frozen=True)
class SlopeSource:
    """The meaning of a value of `slope=`.

    Attributes:
      name: the value.
      looks_back: slopes are taken along the previous step, whose direction the state keeps.
      uses_gradient: slopes come from the gradient where one is given; else they are fitted.
      needs_gradient: `update` has to be given the gradient.
    """

    name: str | None
    looks_back: bool
    uses_gradient: bool
    needs_gradient: bool


_SLOPE_SOURCES = (
    SlopeSource("lagged", looks_back=True, uses_gradient=True, needs_gradient=True),
    SlopeSource("gradient", looks_back=False, uses_gradient=True, needs_gradient=True),
    SlopeSource("probes", looks_back=False, uses_gradient=False, needs_gradient=False),
    SlopeSource(None, looks_back=False, uses_gradient=True, needs_gradient=False),
)
SLOPE_SOURCES = {source.name: source for source in _SLOPE_SOURCES}


class Products(NamedTuple):
    """Inner products by group, each (K,): of the coming direction u, the last one u′, g and w.

    With what is not known they are zero.

    Attributes:
      direction: ‖u‖².
      previous: ‖u′‖².
      gradient: ‖g‖².
      params: ‖w‖².
      position: ⟨w, u⟩.
      moved_to: ⟨w, u′⟩.
      ahead: ⟨u, u′⟩.
      down: ⟨u, g⟩, nothing conjugated.
      across: ⟨u′, g⟩, likewise.
    """

    direction: jax.Array
    previous: jax.Array
    gradient: jax.Array
    params: jax.Array
    position: jax.Array
    moved_to: jax.Array
    ahead: jax.Array
    down: jax.Array
    across: jax.Array

    def whole(self) -> "Products":
        """Of all groups together: () float32 each."""
        return Products(*(jnp.sum(product).astype(jnp.float32) for product in self))


class Evidence(NamedTuple):
    """Everything that one call of `update` says about the loss.

    Attributes:
      coming: the loss along the coming step.
      previous: the direction of the last step as the state keeps it; None where it does not.
      value: the loss at the parameters; None where it is not known (yet).
      grad: its gradient, or None.
      batch: of the loss.
      factor: what slopes by `grad` are multiplied by, 1 for the gradient of the loss.
      compares_slope: whether the first of these are compared with the loss in forward mode.
      taken: the inner products, None until they are taken.
    """

    coming: StepLoss
    previous: Any
    value: Any
    grad: Any
    batch: Any
    factor: Any = 1.0
    compares_slope: bool = False
    taken: Products | None = None

    def last(self) -> StepLoss:
        """The loss along the direction of the last step, from where that step has led."""
        kept, new = self.previous, self.coming.direction
        return self.coming.along(jax.tree.map(lambda old, u: old.astype(u.dtype), kept, new))

    def valued(self) -> "Evidence":
        """The same with the loss at the parameters, evaluated where it was not given."""
        return self._replace(value=self.coming.start()) if self.value is None else self

    @property
    def products(self) -> Products:
        """The inner products, of evidence `with_products`."""
        assert self.taken is not None
        return self.taken

    def with_products(self) -> "Evidence":
        """The same with all inner products, by one pass over what is given."""
        groups, u, w = self.coming.groups, self.coming.direction, self.coming.params
        trees, places = [u, w], {"u": 0, "w": 1}
        if self.previous is not None:
            places["u′"] = len(trees)
            trees.append(self.previous)
        if self.grad is not None:
            places["g"] = len(trees)
            trees.append(jax.tree.map(jnp.conj, self.grad))
        wanted = {
            "direction": ("u", "u"),
            "previous": ("u′", "u′"),
            "gradient": ("g", "g"),
            "params": ("w", "w"),
            "position": ("w", "u"),
            "moved_to": ("w", "u′"),
            "ahead": ("u", "u′"),
            "down": ("u", "g"),
            "across": ("u′", "g"),
        }
        pairs = {
            name: (places[x], places[y])
            for name, (x, y) in wanted.items()
            if x in places and y in places
        }
        found = dict.fromkeys(wanted, jnp.zeros(len(groups), jnp.float32))
        found |= zip(pairs, groups.products(trees, list(pairs.values())), strict=True)
        return self._replace(taken=Products(**found))

    def slope(self) -> jax.Array | None:
        """The slopes along the coming step at the parameters, (K,); None without a gradient."""
        if self.grad is None:
            return None
        taken = self.taken
        return self._scaled(self.coming.slope(self.grad) if taken is None else -taken.down)

    def last_slope(self) -> jax.Array | None:
        """The same along the last step, of evidence `with_products`."""
        return None if self.grad is None else self._scaled(-self.products.across)

    def _scaled(self, slope: jax.Array) -> jax.Array:
        return slope * jnp.asarray(self.factor).astype(slope.dtype)
