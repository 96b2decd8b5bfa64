"""Slash-joined names for the leaves of any pytree."""

from collections.abc import Iterator
from typing import Any

import jax

_KEY_FIELDS = ("key", "name", "idx")  # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey


def _component(key: Any) -> str:
    for field in _KEY_FIELDS:
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def path_components(key_path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names along one key path, without the `.value` of a Flax nnx Variable.

    nnx hands Variables to `init` and their bare arrays to `update`; both are to have one name.
    """
    if key_path and getattr(key_path[-1], "name", None) == "value":
        key_path = key_path[:-1]
    return tuple(_component(key) for key in key_path)


def leaf_paths(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path components, leaf) for every leaf, in the order of `jax.tree.leaves`."""
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield path_components(key_path), leaf


def shown(paths: list[tuple[str, ...]], limit: int = 5) -> str:
    """The first few paths and their count, for error messages."""
    listed = ", ".join(repr("/".join(path)) for path in paths[:limit])
    return f"{listed}{', …' if len(paths) > limit else ''} ({len(paths)} in all)"
