"""Which groups matter? Measure their influence, choose by a budget, and train those alone.

An MLP on 8×8 images of digits. All of its groups train for 60 steps while influence is
accumulated; then those that are worth most within a budget of parameters go on, the rest frozen.

    python examples/choose_and_freeze.py
"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hidlr_optax as hd

LAYERS = {"first": (64, 128), "second": (128, 64), "head": (64, 10)}
RULES = [(r"head/.*", "head"), (r".*/bias", "bias"), (r"first/.*", "first")]


def predict(params, x):
    """(n, 64) pixels -> (n, 10) logits."""
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(trainable, frozen, batch):
    """Mean cross-entropy."""
    logits = predict(hd.peft.merge(trainable, frozen), batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def main(steps=300):
    """Measures, chooses and trains; returns the loss of each step after the choice."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype(np.float32) / 16, y, random_state=0)
    rng, params = np.random.default_rng(0), {}
    for name, shape in LAYERS.items():
        kernel = rng.normal(0, (2 / shape[0]) ** 0.5, shape)
        params[name] = {"kernel": kernel.astype(np.float32), "bias": np.zeros(shape[1], np.float32)}

    def train(trainable, frozen, labels, steps):
        tx = optax.chain(optax.adamw(1.0), hd.hidlr(None, labels, update_interval=2))
        state, running, losses = tx.init(trainable), hd.influence.start(labels, trainable), []

        @jax.jit
        def step(trainable, frozen, state, running, batch):  # frozen: an argument, no constant
            loss, grad = jax.value_and_grad(loss_fn)(trainable, frozen, batch)
            extra = {"value_fn": lambda x: loss_fn(x, frozen, batch), "value": loss, "grad": grad}
            updates, state = tx.update(grad, state, trainable, **extra)
            running = hd.influence.accumulate(running, state)
            return optax.apply_updates(trainable, updates), state, running, loss

        for rows in rng.integers(0, len(y), (steps, 64)):
            batch = x[rows], y[rows]
            trainable, state, running, loss = step(trainable, frozen, state, running, batch)
            losses.append(float(loss))
        return trainable, state, running, losses

    labels = hd.label_by_path(params, RULES, default="second")
    everything = hd.peft.split(params, labels, hd.Plan(set(jax.tree.leaves(labels)), frozenset()))
    params, _, running, _ = train(*everything, labels, 60)
    front = hd.peft.pareto(hd.influence.summarise(running))
    plan = hd.peft.within(front, budget=2000)  # parameters
    print(plan, "\n")
    trainable, frozen = hd.peft.split(params, labels, plan)
    chosen = hd.peft.trainable_labels(params, labels, plan)
    trainable, state, _, losses = train(trainable, frozen, chosen, steps)
    logits = predict(hd.peft.merge(trainable, frozen), x_test)
    print(f"test accuracy: {np.mean(logits.argmax(1) == y_test):.1%}")
    print(hd.explain(state))
    return losses


if __name__ == "__main__":
    main()
