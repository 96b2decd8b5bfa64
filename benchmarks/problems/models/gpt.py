"""A small GPT, and the byte-pair encoding that it reads; both are trained from nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.problems.models.layers import MLP, Attention, Seen


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

    def __call__(self, tokens: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """(n, t), whose first is at that position -> (n, t, width)."""
        return self.token(tokens) + self.position(first + jnp.arange(tokens.shape[1]))


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

    def following(self, x: jax.Array, place: jax.Array, seen: Seen) -> tuple[jax.Array, Seen]:
        """The same of one token, (n, 1, width) at `place`, after those that have been seen."""
        mixed, seen = self.attention.following(self.norm_attention(x), place, seen)
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)), seen


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


def as_functions(
    config: Config, seed: int = 0, dtype: Any = None
) -> tuple[dict[str, Any], Callable[[Any, jax.Array], jax.Array]]:
    """Parameters, and (params, tokens) -> the mean cross-entropy of what follows.

    Args:
      config: the sizes.
      seed: of the parameters, in float32.
      dtype: of activations. None: float32.
    """
    model = GPT(config, nnx.Rngs(seed))
    parts: list[Any] = [module for _, module in nnx.iter_modules(model)]
    for part in parts:
        if dtype is not None and hasattr(part, "dtype"):
            part.dtype = dtype
    graph, params = nnx.split(model)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return nnx.to_pure_dict(params), loss


@nnx.jit
def greedy(model: GPT, prompts: jax.Array, lengths: jax.Array) -> jax.Array:
    """What the model tells: always the token that it holds to be the likeliest, until it ends.

    Args:
      model: whose state is not changed.
      prompts: (n, t) int, what is given, and room for what follows; t at most its positions.
      lengths: (n,) int, how many tokens are given, 1 or more.

    Returns:
      (n, t): the prompts, what follows, and 0 from where a text has ended.
    """
    config, (n, t) = model.config, prompts.shape
    none = jnp.zeros((n, t, config.heads, config.width // config.heads))
    graph, params = nnx.split(model)

    def goes_on(carry: Any) -> jax.Array:
        place, _, ended, _ = carry
        return (place < t - 1) & ~jnp.all(ended)

    def one_more(carry: Any) -> Any:
        place, tokens, ended, seen = carry
        told = nnx.merge(graph, params)
        x, now = told.embed(tokens[:, place][:, None], place), []
        for layer, before in zip(told.layers, seen, strict=True):
            x, after = layer.following(x, place, before)
            now.append(after)
        likeliest = told.head(told.norm(x))[:, 0].argmax(-1).astype(tokens.dtype)
        given = place + 1 < lengths
        token = jnp.where(given, tokens[:, place + 1], jnp.where(ended, 0, likeliest))
        ended = ended | (~given & (token == 0))
        return place + 1, tokens.at[:, place + 1].set(token), ended, now

    begun = 0, jnp.where(jnp.arange(t) < lengths[:, None], prompts, 0), jnp.zeros(n, bool)
    return jax.lax.while_loop(goes_on, one_more, (*begun, [Seen(none, none)] * len(model.layers)))[
        1
    ]


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
