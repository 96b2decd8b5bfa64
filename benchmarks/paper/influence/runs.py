"""The training runs: of all groups, to measure influence, and of plans."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import hidlr_optax as hd
from benchmarks.kit.loop import stepper
from benchmarks.kit.training import Task

LABELS = hd.label_by_role


def base_optimizer() -> optax.GradientTransformation:
    """The direction of all runs."""
    return optax.adamw(1.0)


def rule(labels: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """The rates: `hidlr` with nothing tuned."""
    return hd.hidlr(None, labels, schedule=optax.cosine_decay_schedule(1.0, steps))


def measuring_rule(steps: int) -> optax.GradientTransformationExtraArgs:
    """The rates while influence is measured: each group by probes of its own."""
    return hd.paper.one_step(
        None,
        LABELS,
        update_interval=20,
        curvature=hd.paper.probes(batch_size=1),
        schedule=optax.cosine_decay_schedule(1.0, steps),
    )


def pretrained(task: Task, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model's structure, and its parameters as nested dicts."""
    graph, params = nnx.split(task.build(seed))
    return graph, nnx.to_pure_dict(params)


def scores(task: Task, graph: Any, params: Any) -> dict[str, float]:
    """Of a model on the test set."""
    return task.evaluate(nnx.merge(graph, params), "test")


def squared_by_group(params: Any, tree: Any) -> dict[str, jax.Array]:
    """Sum of squares over each group."""
    labels = jax.tree.leaves(LABELS(params))
    sums: dict[str, jax.Array] = {}
    for label, leaf in zip(labels, jax.tree.leaves(tree), strict=True):
        sums[label] = sums.get(label, jnp.zeros(())) + jnp.sum(leaf**2)
    return sums


def pairs(params: Any) -> dict[str, tuple[str, str]]:
    """LoRA's two matrices, where there are any: alone, the first has no slope at first."""
    pair = "lora_A", "lora_B"
    return {"lora": pair} if set(pair) <= set(jax.tree.leaves(LABELS(params))) else {}


def measure(task: Task, seed: int, steps: int, whole: int) -> dict[str, Any]:
    """Trains all groups and watches: influence, gradients, Fisher information.

    Args:
      task: to train.
      seed: of the run.
      steps: to train and to measure.
      whole: steps of the run that the schedule is made for.

    Returns:
      "plan", that of ψ = 1 as JSON, with the influence in it; "history", for the heatmap; and by
      group "gradient" (mean squared norm of batch gradients) and "Fisher" (that of gradients of
      single examples, of the last batch).
    """
    graph, params = pretrained(task, seed)
    tx = optax.chain(base_optimizer(), measuring_rule(whole))
    state, running = tx.init(params), hd.influence.start(LABELS, params, joint=pairs(params))

    def loss_of(params: Any, batch: Any) -> jax.Array:
        return task.loss_fn(nnx.merge(graph, params), batch)

    @jax.jit
    def step(params: Any, state: Any, running: Any, batch: Any) -> Any:
        value, grad = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(
            grad, state, params, value_fn=lambda p: loss_of(p, batch), value=value, grad=grad
        )
        running = hd.influence.accumulate(running, state)
        row = {"loss": value} | hd.metrics(state)
        return (
            optax.apply_updates(params, updates),
            state,
            running,
            row,
            squared_by_group(params, grad),
        )

    history, gradients = [], []
    for n in tqdm(range(steps), f"all groups, seed {seed}", disable=None):
        batch = task.batch(seed, n)
        params, state, running, row, squares = step(params, state, running, batch)
        history.append(row)
        gradients.append(squares)

    @jax.jit
    def fisher(params: Any, batch: Any) -> Any:
        def of_example(example: Any) -> Any:
            one = jax.tree.map(lambda x: x[None], example)
            return squared_by_group(params, jax.grad(loss_of)(params, one))

        return jax.tree.map(lambda x: x.mean(0), jax.lax.map(of_example, batch))

    last = jax.tree.map(jnp.asarray, task.batch(seed, steps))
    found = hd.influence.summarise(running)
    numbers = {
        "history": history,
        "gradient": {k: np.mean([row[k] for row in gradients]) for k in gradients[0]},
        "Fisher": fisher(params, last),
    }
    plan = hd.peft.select(found, 1.0, rules="role")
    return jax.tree.map(float, jax.device_get(numbers)) | {"plan": plan.to_json()}


def step_of(task: Task, graph: Any, tx: Any) -> Callable[..., Any]:
    """A training step: (trainable, state, (frozen, batch)) -> (trainable, state, loss)."""

    def loss_of(trainable: Any, batch: Any) -> jax.Array:
        frozen, batch = batch
        return task.loss_fn(nnx.merge(graph, hd.peft.merge(trainable, frozen)), batch)

    return stepper(loss_of, tx)


def make_trainer(task: Task, plan: hd.Plan, steps: int) -> Callable[[int], dict[str, Any]]:
    """A function that trains what the plan says, from the pretrained weights, with a seed.

    It returns "test", the scores; "loss", of the last tenth of the steps; "seconds" of the median
    step. It compiles once for all seeds.
    """
    graph, params = pretrained(task, 0)
    labels = hd.peft.trainable_labels(params, LABELS, plan)
    tx = optax.chain(base_optimizer(), rule(labels, steps))

    step = jax.jit(step_of(task, graph, tx))

    def run(seed: int) -> dict[str, Any]:
        trainable, frozen = hd.peft.split(pretrained(task, seed)[1], LABELS, plan)
        state, losses, seconds = tx.init(trainable), [], []
        title = f"{'+'.join(sorted(plan.trainable))}, seed {seed}"
        for n in tqdm(range(steps), title, disable=None):
            start = time.perf_counter()
            trainable, state, value = step(trainable, state, (frozen, task.batch(seed, n)))
            losses.append(float(value))
            seconds.append(time.perf_counter() - start)
        return {
            "test": scores(task, graph, hd.peft.merge(trainable, frozen)),
            "loss": float(np.mean(losses[-max(steps // 10, 1) :])),
            "seconds": float(np.median(seconds)),
        }

    return run
