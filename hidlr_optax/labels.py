"""Labels: pytrees of group names, made from the paths of the parameters.

Every function here returns a pytree of str with the structure of `params`. It looks at the paths
alone, never at values, so it also serves as the callable form of `param_labels`
(`functools.partial(label_by_path, rules=...)`, `label_by_role`).
"""

import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hidlr_optax._checks.advice import stacklevel
from hidlr_optax._paths import Path, leaf_paths, listing

# Component patterns, tried in this order; the first that matches any component of a path decides.
# LoRA comes first because adapters sit inside heads and norms, `norm` before `embed` because
# encoders keep a LayerNorm among their embeddings, and `bias` after the places a bias can live in.
_ROLES = {
    "lora_A": r".*lora_?a(_\d+)?",
    "lora_B": r".*lora_?b(_\d+)?",
    "head": r"(.*_)?heads?(_\d+)?|classifier|score|logits|qa_outputs|predictions?|output_layer",
    "norm": r".*norm.*|(ln|bn)(_.*|\d*)",
    "embed": r".*embed.*|wte|wpe|cls_token|(pos|position)_.*",
    "bias": r"(.*_)?bias|b",
}


def _map_paths(label: Callable[[Path], str], params: Any) -> Any:
    labels = [label(path) for path, _ in leaf_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def _pairs(rules: Any) -> list[tuple[str, str]]:
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    for pair in pairs:
        is_pair = not isinstance(pair, str) and isinstance(pair, Sequence) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) for part in pair):
            raise ValueError(
                "rules must be (regular expression, label) pairs of str, or a dict {regular "
                f"expression: label}}, got {pair!r} among them"
            )
    return [(pattern, label) for pattern, label in pairs]


def label_by_path(
    params: Any,
    rules: Sequence[tuple[str, str]] | Mapping[str, str],
    default: str | None = None,
) -> Any:
    r"""Labels each leaf by the first rule whose regular expression matches its whole path.

    Paths are the keys, attribute names and indices that lead to a leaf, joined by slashes, such as
    `encoder/layers/3/attention/bias`. They are the same for dicts, lists, NamedTuples, FrozenDict,
    `nnx.State` and Equinox modules.

    Args:
      params: any pytree.
      rules: (regular expression, label) pairs, or a dict of them, tried in order with
        `re.fullmatch`.
      default: the label of leaves that no rule covers. None: every leaf has to be covered.

    Returns:
      A pytree of str with the structure of `params`.

    Raises:
      ValueError: a leaf is covered by no rule and there is no default, or a rule is no pair of str.

    Warns:
      UserWarning: a rule matches no leaf at all, which is mostly a slip in the expression. A rule
        whose leaves were all taken by earlier rules is not warned about.

    Example:
      >>> import hidlr_optax as hd
      >>> params = {"body": {"kernel": 0.0, "bias": 0.0}, "head": {"kernel": 0.0, "bias": 0.0}}
      >>> hd.label_by_path(params, [(r"head/.*", "head"), (r".*/bias", "bias")], default="rest")
      {'body': {'bias': 'bias', 'kernel': 'rest'}, 'head': {'bias': 'head', 'kernel': 'head'}}
    """
    compiled = [(re.compile(pattern), label) for pattern, label in _pairs(rules)]
    paths = [components for components, _ in leaf_paths(params)]
    joined = ["/".join(path) for path in paths]
    for pattern, label in compiled:
        if not any(pattern.fullmatch(path) for path in joined):
            warnings.warn(
                f"the rule ({pattern.pattern!r}, {label!r}) matches no parameter; paths look like "
                f"{listing(paths, 3)} and a rule has to match the whole path",
                stacklevel=2,
            )

    def first_match(path: Path) -> str | None:
        name = "/".join(path)
        return next((label for pattern, label in compiled if pattern.fullmatch(name)), default)

    uncovered = [path for path in paths if first_match(path) is None]
    if uncovered:
        raise ValueError(
            f"no rule covers {listing(uncovered)}; add a rule that matches the whole path, or pass "
            "default='rest'"
        )
    return _map_paths(lambda path: str(first_match(path)), params)


def _role(path: Path) -> str:
    for role, pattern in _ROLES.items():
        parts = path[-1:] if role == "bias" else path
        if any(re.fullmatch(pattern, part, re.IGNORECASE) for part in parts):
            return role
    return "rest"


def label_by_role(params: Any) -> Any:
    """Labels each leaf by its role in the paper: norm, bias, head, embed, lora_A, lora_B or rest.

    Reads the names that Flax linen (`LayerNorm_0/scale`), Flax nnx (`norm/scale`, `lora_a`) and
    Hugging Face (`layer_norm`, `ln_1`, `wte`, `classifier`, `lora_A`) use. The roles are
    exclusive: a bias inside a head is `head`, a bias inside a norm is `norm`, as in LayerNorm
    tuning. For other conventions, use `label_by_path`. The last of the layers that Flax has
    numbered by itself, `Dense_1`, is no head: name it, `nn.Dense(10, name="head")`.

    Args:
      params: any pytree.

    Returns:
      A pytree of str with the structure of `params`.

    Warns:
      UserWarning: there are layers numbered by Flax, and no head.

    Example:
      >>> import hidlr_optax as hd
      >>> hd.label_by_role({"Dense_0": {"kernel": 0.0, "bias": 0.0}, "head": {"bias": 0.0}})
      {'Dense_0': {'bias': 'bias', 'kernel': 'rest'}, 'head': {'bias': 'head'}}
    """
    labels = _map_paths(_role, params)
    numbered = sorted({path[0] for path, _ in leaf_paths(params) if _is_numbered(path)})
    if len(numbered) > 1 and "head" not in jax.tree.leaves(labels):
        warnings.warn(
            f"label_by_role finds no head: the last of {', '.join(numbered)} may be one. Name it, "
            "such as nn.Dense(10, name='head'), or use label_by_path",
            stacklevel=stacklevel(),
        )
    return labels


def _is_numbered(path: Path) -> bool:
    """Whether the layer is at the top, and has the name that Flax linen gives it."""
    return re.fullmatch(r"Dense_\d+", path[0]) is not None if path else False


# A number by itself or after an underscore is a layer's; only where no path has one, so is any
# other at the end of a name: `block_2/conv1` is layer 2, but `layer1/kernel` layer 1.
_NUMBERED = r"(?:.*_)?(\d+)", r".*\D(\d+)"


def _depth(path: Path, numbered: str) -> int | None:
    for part in path:
        match = re.fullmatch(numbered, part)
        if match:
            return int(match.group(1))
    return None


def _shared(paths: list[Path]) -> int:
    """Counts the names that all paths begin with: `gpt2/...` has a number that tells no layers."""
    columns = zip(*(path[:-1] for path in paths), strict=False)
    return len(list(itertools.takewhile(lambda names: len(set(names)) == 1, columns)))


def _depths(paths: list[Path]) -> list[int | None]:
    """The layer of each path, None where it has none."""
    found: list[int | None] = []
    for numbered, start in itertools.product(_NUMBERED, (_shared(paths), 0)):
        found = [_depth(path[start:], numbered) for path in paths]
        if any(depth is not None for depth in found):
            break
    return found


def label_by_depth(params: Any, num_groups: int | None = None) -> Any:
    """Layer-wise groups, from the first number in each path (`layers/3/…`, `EncoderBlock_3/…`).

    A number stands alone or at the end of a name: `h/0`, `block_2`, `Dense_3`, and where no path
    has one of those, `layer1`, `h0`, `fc2`. Names that all paths begin with are passed over.

    Leaves without a number are labelled by role: `embed`, `head`, or else `rest`.

    Args:
      params: any pytree.
      num_groups: merges neighbouring layers so that this many layer groups remain, equal in number
        of layers within one. None: one group per layer.

    Returns:
      A pytree of str with the structure of `params`: `depth_0`, `depth_1`, …, or for merged layers
      the first and the last one, `depth_0-5`.

    Raises:
      ValueError: no path holds a number, or there are fewer layers than `num_groups`.

    Example:
      >>> import hidlr_optax as hd
      >>> layers = [{"kernel": 0.0}, {"kernel": 0.0}]
      >>> hd.label_by_depth({"layers": layers, "head": {"kernel": 0.0}})
      {'head': {'kernel': 'head'}, 'layers': [{'kernel': 'depth_0'}, {'kernel': 'depth_1'}]}
    """
    paths = [path for path, _ in leaf_paths(params)]
    found = dict(zip(paths, _depths(paths), strict=True))
    depths = sorted({depth for depth in found.values() if depth is not None})
    if not depths:
        names = sorted({part for path in paths for part in path})
        raise ValueError(
            "no path holds a layer number, alone or at the end of a name. Looked at were the names "
            f"{', '.join(map(repr, names[:20]))}{', …' if len(names) > 20 else ''} in "
            f"{listing(paths)}; label the layers with label_by_path"
        )
    num_groups = len(depths) if num_groups is None else num_groups
    if not 1 <= num_groups <= len(depths):
        raise ValueError(
            f"num_groups must lie in [1, {len(depths)}], the number of layers, got {num_groups}; "
            f"found were the layers {depths}"
        )
    digits = len(str(depths[-1]))
    labels = {}
    for group in range(num_groups):
        start = group * len(depths) // num_groups
        stop = (group + 1) * len(depths) // num_groups
        first, last = depths[start], depths[stop - 1]
        name = f"depth_{first:0{digits}}" + (f"-{last:0{digits}}" if last > first else "")
        labels.update(dict.fromkeys(depths[start:stop], name))

    def label(path: Path) -> str:
        depth = found[path]
        if depth is not None:
            return labels[depth]
        role = _role(path)
        return role if role in ("embed", "head") else "rest"

    return _map_paths(label, params)
