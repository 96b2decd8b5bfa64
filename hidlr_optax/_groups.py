"""Groups: which leaf belongs to which learning rate, and sums and scalings by group.

Everything here is static: names, indices and sizes come from structures and shapes, so `Groups` can
be rebuilt at trace time and never enters a computation as a value.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hidlr_optax._paths import Path, leaf_paths, listing

OUTSIDE = (
    "hidlr has to be outermost: put it after partition/masked/flatten in the chain, as in "
    "chain(partition(...), hidlr(...)), not inside"
)


def check_not_module(params: Any) -> None:
    """An nnx module is a pytree of more than its parameters: of statistics, counts and keys."""
    kinds = [f"{kind.__module__}:{kind.__name__}" for kind in type(params).__mro__]
    if any(kind.startswith("flax.nnx.") and kind.endswith(":Module") for kind in kinds):
        raise ValueError(
            f"params must be the parameters alone, got the nnx module {type(params).__name__}: "
            "pass nnx.state(model, nnx.Param), or the filter that the optimizer has as wrt"
        )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def wide(dtype: Any) -> Any:
    """The dtype to probe and compare in: `dtype`, but float32 at least."""
    narrow = not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def _is_double(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact) and jnp.finfo(leaf.dtype).bits == 64


def _leaves(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def is_labeller(param_labels: Any) -> bool:
    """Whether labels are a function of params; a callable pytree (an Equinox module) is not."""
    return callable(param_labels) and jax.tree_util.all_leaves([param_labels])


def label_names(param_labels: Any) -> tuple[str, ...]:
    """The distinct labels of a label tree, sorted: an order that does not depend on the tree's."""
    label_paths = leaf_paths(param_labels)
    for path, label in label_paths:
        if not isinstance(label, str):
            raise ValueError(
                f"a label has to be a str, got {label!r} ({type(label).__name__}) at "
                f"{'/'.join(path)!r}"
            )
    if not label_paths:
        raise ValueError("param_labels holds no label, so there is no group to give a rate to")
    return tuple(sorted({label for _, label in label_paths}))


def _match(labels: dict[Path, str], paths: list[Path]) -> list[str]:
    """The label of each leaf: that of the label tree's leaf on the way to it."""
    found, used, unlabelled = [], set(), []
    for path in paths:
        prefix = next((path[:n] for n in range(len(path) + 1) if path[:n] in labels), None)
        if prefix is None:
            unlabelled.append(path)
        else:
            used.add(prefix)
            found.append(labels[prefix])
    unused = [path for path in labels if path not in used]
    if unlabelled or unused:
        problems = []
        if unlabelled:
            problems.append(f"no label for the parameters {listing(unlabelled)}")
        if unused:
            problems.append(f"no parameters for the labels at {listing(unused)}")
        raise ValueError(
            f"param_labels does not match params: {'; '.join(problems)}. It has to be a pytree of "
            f"str like params, a prefix of it, or a callable params -> such a tree. If a part of "
            f"the model is trained, label that part (peft.trainable_labels; in nnx, give the same "
            f"filter wrt everywhere; in Equinox, label eqx.filter(model, eqx.is_inexact_array)). "
            f"If hidlr is wrapped in a transformation that changes the tree: {OUTSIDE}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Groups:
    """K groups of parameters.

    Attributes:
      names: the K labels, sorted; position k of every (K,) array belongs to `names[k]`.
      index: for each leaf of params, in the order of `jax.tree.leaves`, its group's position.
      sizes: d_k, the number of parameters of each group.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(param_labels: Any, params: Any) -> "Groups":
        """Matches labels to parameters by their paths.

        Raises:
          ValueError: the labels do not match, a label is not a str, params is masked or a module.
        """
        check_not_module(params)
        if any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
            raise ValueError(f"hidlr was given masked parameters (optax.MaskedNode). {OUTSIDE}")
        labels = param_labels(params) if is_labeller(param_labels) else param_labels
        names = label_names(labels)
        leaves = leaf_paths(params)
        leaf_labels = _match(dict(leaf_paths(labels)), [path for path, _ in leaves])
        index = tuple(map(names.index, leaf_labels))
        sizes = [0] * len(names)
        for k, (_, leaf) in zip(index, leaves, strict=True):
            sizes[k] += math.prod(np.shape(leaf))  # reads .shape: abstract leaves will do
        return Groups(names, index, tuple(sizes))

    def __len__(self) -> int:
        """K."""
        return len(self.names)

    def pack(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """A dict keyed by label as a (K,) array."""
        return jnp.stack([values[name] for name in self.names])

    def unpack(self, values: jax.Array) -> dict[str, jax.Array]:
        """A (K,) array as a dict keyed by label."""
        return {name: values[k] for k, name in enumerate(self.names)}

    def _map(self, fn: Callable[..., Any], *trees: Any) -> Any:
        """Maps `fn(k, *leaves)` over trees of the same structure, k the leaf's group."""
        flat = [_leaves(tree) for tree in trees]
        mapped = [fn(k, *leaves) for k, *leaves in zip(self.index, *flat, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(trees[0]), mapped)

    def scale(self, tree: Any, rates: jax.Array) -> Any:
        """Multiplies each leaf by its group's rate, in float32 or wider; keeps its dtype."""

        def scaled(k: int, leaf: jax.Array) -> jax.Array:
            dtype = wide(leaf.dtype)
            return (leaf.astype(dtype) * rates[k].astype(dtype)).astype(leaf.dtype)

        return self._map(scaled, tree)

    def step(self, params: Any, direction: Any, rates: jax.Array) -> Any:
        """Moves to w + Σ_k η_k u_k, left in float32 or wider, so that small steps count."""

        def moved(k: int, param: jax.Array, update: jax.Array) -> jax.Array:
            if not jnp.issubdtype(param.dtype, jnp.inexact):
                return param
            dtype = wide(param.dtype)
            return param.astype(dtype) + update.astype(dtype) * rates[k].astype(dtype)

        return self._map(moved, params, direction)

    def inner(self, left: Any, right: Any) -> jax.Array:
        """⟨left_k, right_k⟩ for every group: (K,), float32, or float64 where a leaf is."""
        pairs = list(zip(_leaves(left), _leaves(right), strict=True))
        dtype = (
            jnp.float64 if any(_is_double(leaf) for pair in pairs for leaf in pair) else jnp.float32
        )
        sums = [jnp.zeros((), dtype)] * len(self)
        for k, (x, y) in zip(self.index, pairs, strict=True):
            product = x.astype(wide(x.dtype)) * y.astype(wide(x.dtype))
            sums[k] = sums[k] + jnp.real(jnp.sum(product)).astype(dtype)
        return jnp.stack(sums)

    def squares(self, tree: Any) -> jax.Array:
        """‖tree_k‖² for every group: (K,), float32 or wider; what is not inexact has no length."""

        def conjugated(leaf: jax.Array) -> jax.Array:
            return jnp.conj(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0 * leaf

        return self.inner([conjugated(leaf) for leaf in _leaves(tree)], _leaves(tree))
