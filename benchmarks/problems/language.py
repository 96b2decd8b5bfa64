"""A small GPT pretrained on English prose, and the E2E data as it reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.kit.loop import stepper
from benchmarks.problems import data
from benchmarks.problems.models import gpt

PRETRAINING = 800  # steps


def pack(tokens: Sequence[list[int]], length: int) -> np.ndarray:
    """Texts, one after the other with 0 between them, as (n, length) int32."""
    stream = np.concatenate([np.array([*text, 0], np.int32) for text in tokens])
    return stream[: len(stream) // length * length].reshape(-1, length)


def language_loss(logits: jax.Array, batch: tuple[Any, Any]) -> jax.Array:
    """Cross-entropy of what follows, mean over the tokens that count."""
    tokens, counts = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    weights = counts[:, 1:].astype(losses.dtype)
    return jnp.sum(losses * weights) / jnp.maximum(weights.sum(), 1)


def pretrain(config: gpt.Config, rows: np.ndarray, steps: int, path: Path) -> dict[str, Any]:
    """The parameters of a GPT trained on English prose, from `path` if they are there."""
    graph, params = nnx.split(gpt.GPT(config, nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    leaves, structure = jax.tree.flatten(params)
    if path.exists():
        with np.load(path) as arrays:
            return jax.tree.unflatten(structure, [arrays[str(k)] for k in range(len(leaves))])
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps))
    state = tx.init(params)

    def loss(params: Any, tokens: Any) -> jax.Array:
        batch = tokens, jnp.ones_like(tokens)
        return language_loss(nnx.merge(graph, params)(tokens), batch)

    step = jax.jit(stepper(loss, tx))
    rng = np.random.default_rng(0)
    bar = tqdm(range(steps), "pretraining", disable=None)
    for _ in bar:
        params, state, value = step(params, state, rows[rng.integers(0, len(rows), 16)])
        bar.set_postfix(loss=f"{float(value):.2f}", refresh=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{str(k): leaf for k, leaf in enumerate(jax.tree.leaves(params))})
    return params


def load_gpt(config: gpt.Config, steps: int, folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-pair encoding and the GPT of all our prose, whose weights are kept in a folder."""
    prose = data.prose()
    tokenizer = gpt.train_tokenizer(prose, config.vocabulary)
    rows = pack([text.ids for text in tokenizer.encode_batch(prose)], config.positions)
    return tokenizer, pretrain(config, rows, steps, folder / f"gpt-{steps}.npz")


def _given(tokenizer: Tokenizer, meaning: str) -> list[int]:
    """The tokens after which a description begins."""
    return tokenizer.encode(f"{meaning} => ").ids


def encode(
    tokenizer: Tokenizer, texts: data.Texts, rows: Sequence[int] | np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """What is given, then what is told, as (n, length) tokens, and which of them are told."""
    tokens = np.zeros((len(rows), length), np.int32)
    counts = np.zeros((len(rows), length), bool)
    assert texts.second is not None
    for place, row in enumerate(rows):
        given = _given(tokenizer, texts.first[row])
        told = [*tokenizer.encode(texts.second[row]).ids, 0]
        both = [*given, *told][:length]
        tokens[place, : len(both)] = both
        counts[place, len(given) : len(both)] = True
    return tokens, counts


def described(
    model: gpt.GPT, tokenizer: Tokenizer, meanings: Sequence[str], length: int
) -> list[str]:
    """What the model tells of each meaning, by greedy decoding, up to `length` tokens in all."""
    given = [_given(tokenizer, meaning)[: length - 1] for meaning in meanings]
    lengths = np.array([len(ids) for ids in given])
    prompts = np.array([ids + [0] * (length - len(ids)) for ids in given], np.int32)
    tokens = np.asarray(gpt.greedy(model, jnp.asarray(prompts), jnp.asarray(lengths)))
    told = [row[start:] for row, start in zip(tokens, lengths, strict=True)]
    return [tokenizer.decode([n for n in ids.tolist() if n]).strip() for ids in told]


def references(texts: data.Texts) -> dict[str, list[str]]:
    """All that people told of each meaning."""
    assert texts.second is not None
    found: dict[str, list[str]] = {}
    for meaning, told in zip(texts.first, texts.second, strict=True):
        found.setdefault(meaning, []).append(told)
    return found


def bleu(told: Sequence[str], by_people: Sequence[Sequence[str]]) -> float:
    """BLEU of a corpus by sacrebleu, 0 to 100, each text against all of its references."""
    most = max(map(len, by_people))
    # An empty one is no reference.
    columns = [[some[n] if n < len(some) else "" for some in by_people] for n in range(most)]
    return sacrebleu.corpus_bleu(told, columns).score
