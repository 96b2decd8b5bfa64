"""LoRA (Hu et al., 2021): a trained product of two thin matrices beside each frozen kernel."""

from collections.abc import Sequence

import jax
from flax import nnx

# What is trained: `nnx.split(model, lora.TRAINED, ...)` gives the structure, these, and the rest.
TRAINED = nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))

# Bounded by 1/√inputs, as in the authors' code.
_init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def add_lora(
    model: nnx.Module,
    rank: int,
    targets: Sequence[str] = ("query", "value"),
    *,
    rngs: nnx.Rngs,
) -> None:
    """Replaces every `nnx.Linear` with one of these names by x·W + b + x·A·B, in place.

    A is random and B zero, so that the outputs do not change before the first step. The scale α/r
    of the paper is 1, that is α = r. Parameters are found at `…/query/lora_a`, `…/query/lora_b`
    and, of the frozen layer, `…/query/base_module/kernel`.

    Args:
      model: changed in place.
      rank: columns of A and rows of B.
      targets: attribute names.
      rngs: for A.

    Raises:
      ValueError: the rank is below 1, or the model has no `nnx.Linear` with one of the names.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    modules = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    names = dict.fromkeys(targets)  # each once
    found = [(m, t) for m in modules for t in names if isinstance(getattr(m, t, None), nnx.Linear)]
    missing = names.keys() - {target for _, target in found}
    if missing:
        raise ValueError(f"{type(model).__name__} has no nnx.Linear named {min(missing)!r}")
    for parent, target in found:
        setattr(parent, target, _adapted(getattr(parent, target), rank, rngs))


def _adapted(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    return nnx.LoRA(
        linear.in_features,
        rank,
        linear.out_features,
        base_module=linear,
        a_initializer=_init_a,
        rngs=rngs,
    )
