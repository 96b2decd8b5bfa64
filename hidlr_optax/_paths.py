"""Slash-joined names for the leaves of any pytree."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

Path = tuple[str, ...]

_KEY_FIELDS = ("key", "name", "idx")  # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey


def _component(key: Any) -> str:
    for field in _KEY_FIELDS:
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def leaf_paths(tree: Any) -> list[tuple[Path, Any]]:
    """(path components, leaf) for every leaf, in the order of `jax.tree.leaves`.

    The `value` attribute of a Flax nnx Variable, the only child of its node, is left out: nnx hands
    Variables to `init` and their bare arrays to `update`, and both are to have one name.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves_below = Counter(keys[:depth] for keys, _ in flat for depth in range(len(keys)))
    paths = []
    for keys, leaf in flat:
        named_value = bool(keys) and getattr(keys[-1], "name", None) == "value"
        if named_value and leaves_below[keys[:-1]] == 1:
            keys = keys[:-1]
        paths.append((tuple(map(_component, keys)), leaf))
    return paths


def listing(paths: list[Path], limit: int = 5) -> str:
    """The first few paths and their count, for error messages."""
    first = ", ".join(repr("/".join(path)) for path in paths[:limit])
    return f"{first}{', …' if len(paths) > limit else ''} ({len(paths)} in all)"


def nodes(tree: Any, is_node: Callable[[Any], bool]) -> list[Any]:
    """The parts of a tree that `is_node` says yes to, not what is inside of them."""
    return [part for part in jax.tree.leaves(tree, is_leaf=is_node) if is_node(part)]
