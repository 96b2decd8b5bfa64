"""What a BERT, a ViT and a GPT have in common: attention, the MLP, and filling in trained weights.

Dropout is on where a call is given `rngs`, and off without. No module keeps random state, so that
`nnx.split(model)` gives the structure and parameters only, and a loss is a pure function of its
parameters and batch, where the batch may carry the key.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU. On a CPU, erf takes half the time of the erfc in `jax.nn.gelu`."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Dropout, where there are random numbers for it."""
    return nnx.Dropout(rate)(x, deterministic=rngs is None, rngs=rngs)


class Seen(NamedTuple):
    """Keys and values of the tokens so far, each (n, longest, heads, width / heads)."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Multi-head self-attention; causal: to nothing that comes later."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, *, causal: bool = False):
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads, self.causal = heads, causal
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def _by_head(self, linear: nnx.Module, x: jax.Array) -> jax.Array:
        """(n, t, width) -> (n, t, heads, width / heads)."""
        return linear(x).reshape(*x.shape[:2], self.heads, -1)  # pyright: ignore[reportCallIssue]

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(n, t, width), and a mask (n, t) of the tokens to attend to -> (n, t, width)."""
        mixed = jax.nn.dot_product_attention(
            self._by_head(self.query, x),
            self._by_head(self.key, x),
            self._by_head(self.value, x),
            mask=None if mask is None else mask[:, None, None, :],  # (n, heads, query, key)
            is_causal=self.causal,
        )
        return self.out(mixed.reshape(x.shape))

    def following(self, x: jax.Array, place: jax.Array, seen: Seen) -> tuple[jax.Array, Seen]:
        """The same of one token, (n, 1, width) at `place`, after those that have been seen."""
        seen = Seen(
            seen.keys.at[:, place].set(self._by_head(self.key, x)[:, 0]),
            seen.values.at[:, place].set(self._by_head(self.value, x)[:, 0]),
        )
        known = jnp.arange(seen.keys.shape[1]) <= place
        mixed = jax.nn.dot_product_attention(
            self._by_head(self.query, x), *seen, mask=known[None, None, None, :]
        )
        return self.out(mixed.reshape(x.shape)), seen


class MLP(nnx.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, t, width) -> (n, t, width)."""
        return self.down(gelu(self.up(x)))


def load_weights(model: nnx.Module, find: Callable[[str], np.ndarray]) -> None:
    """Sets every parameter of `model` to what `find` returns for its path.

    Args:
      model: changed in place.
      find: path, such as `layers/0/attention/query/kernel` -> array.

    Raises:
      ValueError: an array does not have the shape of its parameter.
    """
    params = nnx.state(model, nnx.Param)
    for parts, param in nnx.to_flat_state(params):
        path = "/".join(map(str, parts))
        value = find(path)
        if value.shape != param.shape:
            raise ValueError(f"{path} has shape {param.shape}, but its weights have {value.shape}")
        param[...] = jnp.asarray(value, param.dtype)
    nnx.update(model, params)
