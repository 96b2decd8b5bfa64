"""Look back along the last step: the loss where it began, on a batch that it has not seen.

One evaluation at the start of the last step, w − Σ_k η_k v_k, gives the loss L₀ there, and for
K > 1 its gradient g₀. The loss L and the gradient g at its end w are known anyway. With the slope
at the end, E_k = −⟨g_k, v_k⟩, and the loss that the step has won, G = L₀ − L, the parabola has

    C = 2 (G − Eᵀη)                the curvature along the step, ηᵀAη
    F = Eᵀη + C                    the slope at its start
    (Aη)_k = ⟨g_k − g₀_k, v_k⟩     the part of each group in C, for K > 1

The step was made from another batch, so the noise in it biases none of these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hidlr_optax._branch import where_due
from hidlr_optax._groups import Groups

ROUNDINGS = 16.0  # of the loss: a step that changes it by less has no curvature to be seen
ERRORS = (
    4.0  # times what the loss contradicts: a group that has done less is not seen to begin with
)
FITS = 0.01  # of the loss: a `value` further from the loss at the parameters is another's
TINY = 1e-30


class Products(NamedTuple):
    """Inner products by group, (K,) each: of the coming direction u, the last one v, g and w."""

    uu: jax.Array
    vv: jax.Array
    gg: jax.Array
    ww: jax.Array
    uv: jax.Array
    ug: jax.Array
    vg: jax.Array
    wu: jax.Array
    wv: jax.Array

    def whole(self) -> "Products":
        """Of all groups together: () each."""
        return Products(*map(jnp.sum, self))


class Call(NamedTuple):
    """What one call of `update` says: a loss, and four trees like the parameters.

    Attributes:
      loss: params -> scalar.
      groups: of the parameters.
      params: w.
      direction: u, of the coming step.
      last: v, of the last step; zeros at the first update.
      grad: g, of the loss at w.
      value: L, the loss at w; None where it is not known.
    """

    loss: Callable[[Any], jax.Array]
    groups: Groups
    params: Any
    direction: Any
    last: Any
    grad: Any
    value: Any

    def slope(self) -> jax.Array:
        """S_k = −⟨g_k, u_k⟩ on the batch that made u, loss per unit learning rate: (K,)."""
        return -self.groups.inner(self.grad, self.direction).astype(jnp.float32)

    def valued(self) -> "Call":
        """The same with the loss at w, evaluated where it is not known."""
        if self.value is not None:
            return self
        nowhere = jnp.zeros(len(self.groups), jnp.float32)
        return self._replace(
            value=self.loss(self.groups.step(self.params, self.direction, nowhere))
        )

    def products(self) -> Products:
        """All inner products, in one pass over the trees. Nothing is conjugated in those with g."""
        conjugate = jax.tree.map(jnp.conj, self.grad)
        trees = {"u": self.direction, "v": self.last, "g": conjugate, "w": self.params}
        places = {name: place for place, name in enumerate(trees)}
        pairs = [(places[x], places[y]) for x, y in Products._fields]
        found = self.groups.products(list(trees.values()), pairs)
        return Products(*(product.astype(jnp.float32) for product in found))


class Look(NamedTuple):
    """What was measured along one step.

    Attributes:
      rates: η of that step, (K,).
      slope: E, at its end, loss per unit learning rate, (K,).
      rows: Aη, loss per unit learning rate, (K,).
      won: G, loss, ().
      wrong_value: whether `value` is not the loss at w, (); compared at the first update.
    """

    rates: jax.Array
    slope: jax.Array
    rows: jax.Array
    won: jax.Array
    wrong_value: jax.Array

    @property
    def is_finite(self) -> jax.Array:
        """Whether all that was measured is: () bool."""
        return jnp.isfinite(self.won) & jnp.all(jnp.isfinite(self.rows))

    @property
    def curvature(self) -> jax.Array:
        """C, loss: ()."""
        return 2 * (self.won - self.slope @ self.rates)

    @property
    def start_slope(self) -> jax.Array:
        """F, loss: ()."""
        return self.slope @ self.rates + self.curvature

    @property
    def unit(self) -> jax.Array:
        """The joint rate of the step."""
        return joint(self.rates)

    def is_resolved(self, value: jax.Array, rate: jax.Array) -> jax.Array:
        """Whether the numbers are finite, and the curvature at a joint rate is not all rounding."""
        change = jnp.maximum(jnp.abs(self.slope @ self.rates), jnp.abs(self.won))
        scale = jnp.maximum(rate / self.unit, 1)
        return (
            self.is_finite
            & jnp.isfinite(value)
            & (change > scale * _rounding(value))
            & (change > 0)
        )

    def shows(self, value: jax.Array, begins: jax.Array) -> jax.Array:
        """Whether the loss shows what each group has done, (K,) bool.

        Adam makes steps of rounding where the loss does not depend on a group, as before a
        normalisation layer. Their gradients are noise. At a normal rate, what they do is less than
        the rounding of the loss. The first look has large steps for small slopes: there, the noise
        is part of what the gradients say about C and the loss does not.
        """
        done = jnp.abs(self.rates) * (jnp.abs(self.slope) + jnp.abs(self.rows))
        error = jnp.abs(self.curvature - self.rows @ self.rates)
        return done > jnp.where(begins, ERRORS * error, _rounding(value))


def _rounding(value: jax.Array) -> jax.Array:
    """How much of a loss is rounding: ()."""
    return (ROUNDINGS * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)).astype(jnp.float32)


def joint(rates: jax.Array) -> jax.Array:
    """x, the geometric mean of the sizes of (K,) rates."""
    return jnp.exp(jnp.mean(jnp.log(jnp.maximum(jnp.abs(rates), TINY))))


def look(call: Call, products: Products, rates: jax.Array, is_first: jax.Array) -> Look:
    """Looks back along the last step, at these rates.

    At the first update there is no last step. One group looks at the parameters themselves, several
    look along the coming step, mirrored, so that their first step has proportions. `value` is
    compared with the loss at the parameters.
    """
    groups = call.groups
    along = jax.tree.map(
        lambda v, u: jnp.where(is_first, u, v.astype(u.dtype)), call.last, call.direction
    )
    slope = -jnp.where(is_first, products.ug, products.vg)

    def fall(loss: jax.Array) -> jax.Array:
        return (loss.astype(call.value.dtype) - call.value).astype(jnp.float32)

    if len(groups) == 1:
        rates = jnp.where(is_first, 0, rates)
        here = won = fall(call.loss(groups.step(call.params, along, -rates)))
        rows = 2 * (won - slope @ rates) / jnp.where(rates == 0, 1, rates)
    else:
        start = groups.step(call.params, along, -rates)
        loss, grad = jax.value_and_grad(call.loss, allow_int=True)(start)
        # Whole numbers have gradients of no type.
        grad = jax.tree.map(
            lambda g, w: jnp.zeros_like(w) if g.dtype == jax.dtypes.float0 else g, grad, start
        )
        won, rows = fall(loss), -groups.inner(grad, along).astype(jnp.float32) - slope
        nowhere = jnp.zeros_like(slope)
        here = where_due(
            is_first,
            lambda: fall(call.loss(groups.step(call.params, along, nowhere))),
            jnp.zeros((), jnp.float32),
        )
    size = jnp.abs(call.value).astype(jnp.float32)
    return Look(rates, slope, rows, won, wrong_value=is_first & (jnp.abs(here) > FITS * size))
