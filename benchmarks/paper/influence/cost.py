"""What freezing saves: one training step as XLA counts it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

import hidlr_optax as hd
from benchmarks.kit.tables import markdown
from benchmarks.kit.training import Task
from benchmarks.paper.influence.runs import LABELS, base_optimizer, pretrained, rule, step_of


def by_xla(step: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """FLOPs, and bytes alive: arguments and temporaries, the first and second donated."""
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    analysis: Any = compiled.cost_analysis()
    alive = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"flops": float(analysis["flops"]), "bytes": float(alive)}


def counted(task: Task, tx: Any, trainable: Any, frozen: Any) -> dict[str, float]:
    """One training step as XLA counts it.

    Args:
      task: gives the loss and a batch.
      tx: the optimizer; a `hidlr` in it counts with its refresh.
      trainable: parameters that the gradient is taken of.
      frozen: the others, from `split`.

    Returns:
      As `by_xla`; arguments are the parameters, the optimizer's state and a batch.
    """
    graph, _ = pretrained(task, 0)
    arguments = trainable, tx.init(trainable), (frozen, task.batch(0, 0))
    return by_xla(step_of(task, graph, tx), *arguments)


def cost(task: Task, plan: hd.Plan) -> dict[str, float]:
    """One step of the base optimizer under a plan, from `counted`."""
    _, params = pretrained(task, 0)
    return counted(task, base_optimizer(), *hd.peft.split(params, LABELS, plan))


def ways_to_freeze(task: Task) -> dict[str, dict[str, float]]:
    """What training the head alone costs, by the way in which the rest is frozen."""
    _, params = pretrained(task, 0)
    labels = LABELS(params)
    names = set(jax.tree.leaves(labels))
    plan = hd.Plan({"head"}, names - {"head"})
    nothing = hd.peft.split(params, labels, hd.Plan(names, frozenset()))[1]
    parts: dict[Any, Any] = {name: optax.set_to_zero() for name in names} | {
        "head": base_optimizer()
    }
    is_frozen = jax.tree.map(lambda label: label != "head", labels)
    zeroed = optax.chain(base_optimizer(), optax.masked(optax.set_to_zero(), is_frozen))
    partition = optax.partition(parts, labels)
    rates = rule(hd.peft.trainable_labels(params, labels, plan), 100)
    head, rest = hd.peft.split(params, labels, plan)
    ways = {
        "plan": (base_optimizer(), head, rest),
        "all trained": (base_optimizer(), params, nothing),
        "AdamW for all, then set_to_zero": (zeroed, params, nothing),
        "partition with set_to_zero": (partition, params, nothing),
        "plan, with hidlr": (optax.chain(base_optimizer(), rates), head, rest),
        "partition, with hidlr": (optax.chain(partition, rule(labels, 100)), params, nothing),
    }
    return {name: counted(task, *way) for name, way in ways.items()} | {
        "by hand": by_hand(task, params)
    }


def by_hand(task: Task, params: dict[str, Any]) -> dict[str, float]:
    """The head alone, without anything of ours."""
    graph, _ = pretrained(task, 0)
    tx = base_optimizer()

    def step(head: Any, state: Any, encoder: Any, batch: Any) -> Any:
        def loss_of(head: Any) -> jax.Array:
            return task.loss_fn(nnx.merge(graph, {"encoder": encoder, "head": head}), batch)

        updates, state = tx.update(jax.grad(loss_of)(head), state, head)
        return optax.apply_updates(head, updates), state

    head = params["head"]
    arguments = head, tx.init(head), params["encoder"], task.batch(0, 0)
    return by_xla(step, *arguments)


def freezing_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Ways to train the head alone, in units of the one by hand."""
    base = found["by hand"]
    rows = [
        [name, *(f"{way[unit] / base[unit]:.2f}" for unit in ("flops", "bytes"))]
        for name, way in sorted(found.items(), key=lambda item: item[1]["flops"])
    ]
    rows = [row for row in rows if row[0] != "by hand"]
    text = f"By hand: {base['flops'] / 1e9:.2f} GFLOP and {base['bytes'] / 2**20:.0f} MiB a step."
    return f"{text}\n\n{markdown(['the head alone', 'FLOPs', 'memory'], rows)}"
