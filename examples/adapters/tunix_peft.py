"""google-tunix: `PeftTrainer`, here with LoRA in a toy model. Lines that differ are marked.

The trainer tells the optimizer nothing, and wraps it in `optax.MultiSteps` by itself.

    pip install google-tunix
    python examples/adapters/tunix_peft.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.sft import hooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import hidlr_optax as hd  # <- new
import hidlr_optax.flax  # <- new


class Model(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.LoRA(3, 4, 32, base_module=nnx.Linear(3, 32, rngs=rngs), rngs=rngs)
        self.head = nnx.LoRA(32, 4, 1, base_module=nnx.Linear(32, 1, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))[:, 0]


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


class Losses(hooks.TrainingHooks):
    """Keeps the losses, for the test of this file."""

    def __init__(self):
        self.losses = []

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.losses.append(float(train_loss))

    def _nothing(self, *args, **kwargs):
        pass

    on_train_start = on_train_end = on_train_step_start = _nothing
    on_eval_step_start = on_eval_step_end = _nothing


def batches(steps):
    for key in jax.random.split(jax.random.key(1), steps):
        x = jax.random.normal(key, (64, 3))
        yield {"x": x, "y": jnp.sin(x.sum(1))}


def main(steps=200):
    remembering = hidlr_optax.flax.remember_batch(loss_fn, wrt=nnx.LoRAParam)  # <- new
    tx = hd.hessian_informed(optax.adamw(1.0), remembering, hd.label_by_role)  # <- was adamw(1e-2)
    config = TrainingConfig(eval_every_n_steps=10**9, max_steps=steps)
    trainer = PeftTrainer(Model(nnx.Rngs(0)), tx, config)
    trainer = trainer.with_loss_fn(remembering)  # <- was loss_fn
    kept = Losses()
    trainer.with_training_hooks(kept)
    trainer.train(list(batches(steps)))
    print(hd.explain(trainer.optimizer.opt_state))  # <- new
    return kept.losses


if __name__ == "__main__":
    print(f"loss {main()[-1]:.4f}")
