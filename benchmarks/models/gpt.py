"""A small GPT, and the byte-pair encoding that it reads; both are trained from nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.layers import MLP, Attention


@dataclass(frozen=True)
class Config:
    """The sizes of a GPT."""

    vocabulary: int = 1024
    positions: int = 128
    width: int = 192
    layers: int = 4
    heads: int = 6


class Embed(nnx.Module):
    """The sum of the embeddings of token and position."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.token = nnx.Embed(config.vocabulary, config.width, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(config.positions, config.width, embedding_init=normal, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(n, t) -> (n, t, width)."""
        return self.token(tokens) + self.position(jnp.arange(tokens.shape[1]))


class Layer(nnx.Module):
    """Attention and MLP of the normalised input, each added to it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.norm_attention = nnx.LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config.width, config.heads, rngs, causal=True)
        self.norm_mlp = nnx.LayerNorm(config.width, rngs=rngs)
        self.mlp = MLP(config.width, 4 * config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, t, width) -> (n, t, width)."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nnx.Module):
    """A language model."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(n, t) -> (n, t, vocabulary) logits of the token that comes next.

        Raises:
          ValueError: the sequences are longer than the model has positions.
        """
        if tokens.shape[1] > self.config.positions:
            raise ValueError(
                f"the model has {self.config.positions} positions, got {tokens.shape[1]} tokens"
            )
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding; token 0 ends a text, and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer
