"""Groups: which leaf belongs to which learning rate, and sums and scalings by group.

Everything here is static: names, indices and sizes come from structures and shapes, so `Groups` can
be rebuilt at trace time and never enters a computation as a value.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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


_LONGEST_ROW = 8192  # numbers that are added one after the other


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


def _product(left: jax.Array, right: jax.Array, dtype: Any) -> jax.Array:
    """Re(conj(left) · right), element by element."""
    if jnp.iscomplexobj(left) or jnp.iscomplexobj(right):
        dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return jnp.real(jnp.conj(left.astype(dtype)) * right.astype(dtype))


def _sums(terms: list[jax.Array]) -> jax.Array:
    """The sums of each of n arrays of one shape, over all their axes but the first: (size, n).

    Of several matrices, first along the rows of all of them at once: one kernel reads each leaf
    once, and there is one to compile where there would be as many as arrays. Such a sum adds term
    after term on a CPU, so long rows are left to `jnp.sum`, which does not lose small ones.
    """
    shape = terms[0].shape
    if len(terms) > 1 and len(shape) > 1 and 0 < shape[-1] <= _LONGEST_ROW:
        zeros = tuple(jnp.zeros((), term.dtype) for term in terms)

        def add(left: Any, right: Any) -> Any:
            return tuple(x + y for x, y in zip(left, right, strict=True))

        terms = list(jax.lax.reduce(tuple(terms), zeros, add, (len(shape) - 1,)))
    axes = tuple(range(1, terms[0].ndim))
    if terms[0].size <= _LONGEST_ROW:
        return jnp.sum(jnp.stack(terms, axis=1), axis=tuple(axis + 1 for axis in axes))
    return jnp.stack([jnp.sum(term, axis=axes) for term in terms], axis=1)


Column = tuple[jax.Array, ...]  # the leaves of some trees at one place


def _alike(index: Sequence[int], columns: list[Column]) -> list[list[tuple[int, Column]]]:
    """Columns with their groups, together where they are small and alike in shape and type.

    A large model has hundreds of biases and scales, and a kernel for each takes longer to compile
    than the model. Large leaves stay alone: to stack them would be to copy them.
    """
    found: dict[Any, list[tuple[int, Column]]] = {}
    for n, (k, column) in enumerate(zip(index, columns, strict=True)):
        if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in column):
            is_small = column[0].size <= _LONGEST_ROW
            key = tuple((leaf.shape, leaf.dtype) for leaf in column) if is_small else n
            found.setdefault(key, []).append((k, column))
    return list(found.values())


def is_labeller(param_labels: Any) -> bool:
    """Whether labels are a function of params; a callable pytree (an Equinox module) is not."""
    return callable(param_labels) and jax.tree_util.all_leaves([param_labels])


def is_placeholder(params: Any) -> bool:
    """Whether this is `optax.tree.map_params`, which asks `init` with an object without leaves."""
    return type(params).__name__ == "_ParamsPlaceholder"


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


def _are_rules(labels: dict[Path, str], used: set[Path]) -> bool:
    """Whether this is `{regular expression: label}`, or pairs of these, instead of labels."""
    if used:
        return False
    pairs = [(str(n), str(k)) for n in range(len(labels) // 2) for k in range(2)]
    return sorted(labels) == sorted(pairs) or any(
        len(path) == 1 and set(path[0]) & set("*+?|[(\\^$") for path in labels
    )


def _first_rule(labels: dict[Path, str]) -> tuple[str, str]:
    (path, one), *others = labels.items()
    return (path[0], one) if len(path) == 1 else (one, others[0][1])


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
    if _are_rules(labels, used):
        raise ValueError(
            "param_labels are labels, a pytree of str like params, and these look like rules, "
            f"{_first_rule(labels)!r} the first of them: pass hidlr_optax.label_by_path(params, "
            "rules, default='rest')"
        )
    if unlabelled or unused:
        problems = []
        if unlabelled:
            problems.append(f"no label for the parameters {listing(unlabelled)}")
        if unused:
            problems.append(f"no parameters for the labels at {listing(unused)}")
        raise ValueError(
            f"param_labels does not match params: {'; '.join(problems)}. It has to be a pytree of "
            f"str like params, a prefix of it, or a callable params -> such a tree, such as "
            f"label_by_path(params, rules, default=...) makes. If only a part of "
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

    def products(
        self, trees: Sequence[Any], pairs: Sequence[tuple[int, int]]
    ) -> tuple[jax.Array, ...]:
        """Re⟨x_k, y_k⟩ for every group and pair of trees: each (K,), float32 or float64.

        All of them in one pass over the leaves. What is not inexact counts as zero.

        Args:
          trees: of the same structure.
          pairs: the places of x and y in `trees`.
        """
        columns = list(zip(*map(_leaves, trees), strict=True))
        doubles = any(_is_double(leaf) for column in columns for leaf in column)
        dtype = jnp.float64 if doubles else jnp.float32
        found, index = [jnp.zeros((0, len(pairs)), dtype)], []
        for alike in _alike(self.index, columns):
            stacks = list(map(jnp.stack, zip(*(column for _, column in alike), strict=True)))
            found.append(_sums([_product(stacks[i], stacks[j], dtype) for i, j in pairs]))
            index += [k for k, _ in alike]
        is_member = np.array(index)[None, :, None] == np.arange(len(self))[:, None, None]
        # No product by zero: what is not finite stays with its group.
        by_group = jnp.sum(jnp.where(is_member, jnp.concatenate(found), 0), axis=1)
        return tuple(by_group.T)

    def inner(self, left: Any, right: Any) -> jax.Array:
        """Re Σ left_k right_k, nothing conjugated, for every group: (K,), float32 or float64."""
        return self.products((jax.tree.map(jnp.conj, left), right), [(0, 1)])[0]

    def squares(self, tree: Any) -> jax.Array:
        """‖tree_k‖² for every group: (K,), float32 or float64; not inexact leaves have none."""
        return self.products((tree,), [(0, 0)])[0]
