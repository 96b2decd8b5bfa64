"""Given ratios between parts of one group: a map on the direction, before the rates are found."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from hidlr_optax._groups import Groups, is_placeholder, label_names

_LAYER = r"depth_(\d+)(-\d+)?"  # as `label_by_depth` has it


def scale_by_label(param_labels: Any, factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies updates by a factor for each label: parts of one group at given ratios.

    Put it before `hidlr`, behind the optimizer (in `hessian_informed`, at the end of `base`), and
    give `hidlr` one label for all the parts: it finds their joint rate, and the rate of each part
    is that times its factor. Known as multipliers or scales of the learning rate of parameter
    groups, in LoRA+ as the ratio of B to A, for layers as `layer_decay`.

    Args:
      param_labels: as in `hidlr`, but of the parts: often finer than those of `hidlr`.
      factors: `{label: factor}`, each finite and > 0. Labels that are not named have 1.

    Returns:
      An `optax.GradientTransformation` without state.

    Raises:
      ValueError: a factor is no factor; from `init`, the parameters have no such label.

    Example:
      >>> import jax.numpy as jnp, optax, hidlr_optax as hd
      >>> parts = {"a": "lora_A", "b": "lora_B"}  # LoRA+: B sixteen times as fast as A
      >>> direction = optax.chain(optax.sgd(1.0), hd.scale_by_label(parts, {"lora_B": 16.0}))
      >>> tx = hd.hessian_informed(direction, lambda p, _: (p["a"] * p["b"] - 1) ** 2, "lora")
      >>> params = {"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)}
      >>> grads = {"a": jnp.asarray(4.0), "b": jnp.asarray(2.0)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> round(float(updates["b"] / updates["a"]), 4)  # 2 · 16 / 4
      8.0
    """
    for name, factor in factors.items():
        if not (isinstance(factor, int | float) and math.isfinite(factor) and factor > 0):
            raise ValueError(
                f"factors[{name!r}] must be finite and > 0, got {factor!r}; to freeze a group, see "
                "hidlr_optax.peft.split"
            )

    def init_fn(params: Any) -> optax.EmptyState:
        if not is_placeholder(params):
            names = Groups.of(param_labels, params).names
            unknown = [name for name in factors if name not in names]
            if unknown:
                raise ValueError(f"factors for {unknown}, but the labels are {list(names)}")
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        groups = Groups.of(param_labels, updates if params is None else params)
        by_group = [float(factors.get(name, 1.0)) for name in groups.names]
        return groups.scale(updates, jnp.asarray(by_group, jnp.float32)), state

    return optax.GradientTransformation(init_fn, update_fn)


def layer_decay(labels: Any, decay: float) -> dict[str, float]:
    """Factors of layer-wise learning rate decay (LLRD), for `scale_by_label`.

    The last layer has `decay`, the one before it `decay`², and so on down to the embeddings, as in
    BEiT (https://arxiv.org/abs/2106.08254); heads, and what belongs to no layer, have 1.

    Args:
      labels: from `label_by_depth`. Merged layers count as one.
      decay: in (0, 1].

    Returns:
      `{label: factor}`.

    Raises:
      ValueError: `decay` is none, or no label is of a layer.

    Example:
      >>> import hidlr_optax as hd
      >>> params = {"embed": 0.0, "layers": [0.0, 0.0], "head": 0.0}
      >>> labels = hd.label_by_depth(params)
      >>> hd.layer_decay(labels, 0.5)
      {'depth_0': 0.25, 'depth_1': 0.5, 'embed': 0.125, 'head': 1.0}
      >>> scale = hd.scale_by_label(labels, hd.layer_decay(labels, 0.5))  # then hidlr(loss, "all")
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must lie in (0, 1], got {decay}")
    names = label_names(labels)
    layers = {name: re.fullmatch(_LAYER, name) for name in names}
    numbers = sorted(int(match[1]) for match in layers.values() if match)
    if not numbers:
        raise ValueError(
            f"layer_decay takes the labels of label_by_depth, such as 'depth_0'; got {list(names)}"
        )

    def factor(name: str) -> float:
        match = layers[name]
        if match:
            return decay ** (len(numbers) - numbers.index(int(match[1])))
        return decay ** (len(numbers) + 1) if name == "embed" else 1.0

    return {name: factor(name) for name in names}
