"""Parameters in two trees, so that frozen ones have no gradients, no optimizer state, no updates.

As in `equinox.partition`, each tree has the structure of params and None in the places of the
other. None is no leaf to JAX, so whatever maps over the trainable tree never meets the frozen part.
"""

from typing import Any, NamedTuple

import jax

from hidlr_optax._groups import Groups
from hidlr_optax.peft._plan import Plan


class Absent(NamedTuple):
    """In the frozen tree, where params itself holds None: so `merge` can tell it from a gap."""


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, Absent)


def _matched(params: Any, labels: Any, plan: Plan) -> Groups:
    groups = Groups.of(labels, params)
    plan.check_labels(groups.names)
    return groups


def split(params: Any, labels: Any, plan: Plan) -> tuple[Any, Any]:
    """Splits parameters into those that train and those that are frozen.

    Differentiate, and initialise the optimizer, with respect to the trainable tree alone; then the
    frozen groups cost a forward pass and nothing else. Hand the frozen tree to the jitted step as
    an argument: a closure would make constants of it. Updates that are merely set to zero do not
    save as much: `hidlr` takes inner products with all gradients it is given, and so keeps the
    backward pass of frozen groups alive.

    Args:
      params: any pytree.
      labels: as `hidlr` takes them: a pytree of str like params, a prefix of it, or a callable.
      plan: for these labels.

    Returns:
      (trainable, frozen), each with the structure of `params` and None in the places of the other.
      Where `params` itself holds None, the frozen tree has the leafless node `Absent()`.

    Raises:
      ValueError: the labels do not match the parameters, or are not those of the plan.

    Example:
      >>> import hidlr_optax as hd
      >>> params = {"head": 1.0, "body": [2.0, 3.0]}
      >>> plan = hd.Plan(trainable={"head"}, frozen={"rest"})
      >>> trainable, frozen = hd.peft.split(params, {"head": "head", "body": "rest"}, plan)
      >>> trainable, frozen
      ({'body': [None, None], 'head': 1.0}, {'body': [2.0, 3.0], 'head': None})
      >>> hd.peft.merge(trainable, frozen) == params
      True
    """
    groups = _matched(params, labels, plan)
    trains = iter([groups.names[k] in plan.trainable for k in groups.index])
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda node: node is None)
    pairs = []
    for leaf in leaves:
        if leaf is None:
            pairs.append((None, Absent()))
        else:
            pairs.append((leaf, None) if next(trains) else (None, leaf))
    trainable, frozen = zip(*pairs, strict=True)
    return jax.tree.unflatten(structure, trainable), jax.tree.unflatten(structure, frozen)


def merge(trainable: Any, frozen: Any) -> Any:
    """The parameters that `split` took apart, or with newer values in either part; works in jit.

    Args:
      trainable: from `split`, or of the same structure.
      frozen: likewise.

    Returns:
      A pytree with the structure of the parameters.

    Raises:
      ValueError: the structures differ, both trees have a leaf in one place, or neither has.

    Example:
      See `split`.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=_is_hole)
    others, other_structure = jax.tree.flatten(frozen, is_leaf=_is_hole)
    if structure != other_structure:
        raise ValueError(
            f"the two parts must come from one split, but their structures differ: {structure} "
            f"and {other_structure}"
        )
    merged, twice, nowhere = [], [], []
    for (path, leaf), other in zip(paths, others, strict=True):
        if not _is_hole(leaf) and not _is_hole(other):
            twice.append(jax.tree_util.keystr(path))
        if leaf is None and other is None:
            nowhere.append(jax.tree_util.keystr(path))
        found = other if _is_hole(leaf) else leaf
        merged.append(None if _is_hole(found) else found)
    if twice or nowhere:
        raise ValueError(
            f"the two parts must come from one split, by one plan; both have {twice[:5]} "
            f"({len(twice)} in all), neither has {nowhere[:5]} ({len(nowhere)} in all)"
        )
    return jax.tree.unflatten(structure, merged)


def trainable_labels(params: Any, labels: Any, plan: Plan) -> Any:
    """The labels of the trainable tree, for `hidlr` over it.

    Args:
      params: all of the parameters, as for `split`.
      labels: as for `split`.
      plan: as for `split`.

    Returns:
      A pytree of str with the structure of the trainable tree, None in the places of frozen leaves.

    Raises:
      ValueError: as `split`.

    Example:
      >>> import hidlr_optax as hd
      >>> params = {"head": 1.0, "body": [2.0, 3.0]}
      >>> plan = hd.Plan(trainable={"head"}, frozen={"rest"})
      >>> hd.peft.trainable_labels(params, {"head": "head", "body": "rest"}, plan)
      {'body': [None, None], 'head': 'head'}
    """
    groups = _matched(params, labels, plan)
    names = [groups.names[k] for k in groups.index]
    labelled = jax.tree.unflatten(jax.tree.structure(params), names)
    return split(labelled, labelled, plan)[0]
