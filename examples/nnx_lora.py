"""LoRA in Flax nnx: train the adapters and the head of a trained model, groups by nnx filters.

An MLP learns 8×8 images of digits; then they are mirrored, and `nnx.LoRA` in its two hidden layers
adapts it, groups lora_A / lora_B / head. The kernels below stay as they are.

    python examples/nnx_lora.py
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hidlr_optax as hd
from hidlr_optax.flax import label_by_filter, take_step


class MLP(nnx.Module):
    """Two hidden layers and a head."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """(n, 64) pixels -> (n, 10) logits."""
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss_fn(model, batch):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()


def fit(model, wrt, labels, x, y, steps):
    """Trains what the filter `wrt` selects; returns the optimizer and the losses."""
    rule = hd.hidlr(None, labels, schedule=optax.cosine_decay_schedule(1.0, steps))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adamw(1.0), rule), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, batch):
        return take_step(model, optimizer, loss_fn, batch)

    rows = np.random.default_rng(0).integers(0, len(y), (steps, 64))
    return optimizer, [float(step(model, optimizer, (x[chosen], y[chosen]))) for chosen in rows]


def main(steps=300):
    """Trains both times; returns the losses of the second time."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype(np.float32) / 16, y, random_state=0)
    model = MLP(nnx.Rngs(0))
    fit(model, nnx.Param, "all", x, y, steps)
    print(f"test accuracy, upright: {np.mean(model(x_test).argmax(1) == y_test):.1%}")

    x, x_test = (np.reshape(a, (-1, 8, 8))[:, :, ::-1].reshape(-1, 64) for a in (x, x_test))
    print(f"mirrored, before LoRA: {np.mean(model(x_test).argmax(1) == y_test):.1%}")
    rngs = nnx.Rngs(1)
    for name, sizes in {"first": (64, 8, 128), "second": (128, 8, 64)}.items():
        setattr(model, name, nnx.LoRA(*sizes, base_module=getattr(model, name), rngs=rngs))
    wrt = nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))
    rules = [(nnx.PathContains("lora_a"), "lora_A"), (nnx.PathContains("lora_b"), "lora_B")]
    labels = label_by_filter(model, rules, default="head", wrt=wrt)
    optimizer, losses = fit(model, wrt, labels, x, y, steps)
    print(f"mirrored, after LoRA: {np.mean(model(x_test).argmax(1) == y_test):.1%}")
    print(hd.explain(optimizer.opt_state))
    return losses


if __name__ == "__main__":
    main()
