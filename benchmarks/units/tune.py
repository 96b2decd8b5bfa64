"""Tuned rates: one for all by a grid, then one per group by a search along each group in turn."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.kit.loop import Problem
from benchmarks.units.compare import PROBLEMS, TUNED, fixed, geometric_mean, groups, train

SEEDS = 3
WIDE = np.array([-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2])
UP = np.arange(1.0, 9.0)
NEAR = np.array([-0.5, -0.25, 0.25, 0.5])
FINE = np.array([-0.2, -0.1, 0.1, 0.2])
# What is tried along each group, log10 of factors. One rate of SGD is bound by its steepest group.
SEARCH = {"adam": (WIDE, NEAR, FINE), "momentum": (UP, WIDE, WIDE, NEAR, FINE)}
GRID = {"adam": np.arange(-5.0, 3.0, 0.5), "momentum": np.arange(-9.0, 7.0, 1.0)}


def scorer(problem: Problem) -> Callable[[np.ndarray], np.ndarray]:
    """(4, K) log10 of rates -> their final losses, geometric means over the seeds."""
    names = groups(problem)

    def one(tried: tuple[jax.Array, jax.Array]) -> jax.Array:
        rates, seed = tried
        return train(problem, fixed(problem, dict(zip(names, rates, strict=True))), seed)[0]

    run = jax.jit(lambda *tried: jax.lax.map(one, tried))  # batched products are slow on a CPU

    def score(logs: np.ndarray) -> np.ndarray:
        rates = jnp.asarray(10.0 ** np.repeat(logs, SEEDS, 0), jnp.float32)
        losses = run(rates, jnp.tile(jnp.arange(SEEDS), len(logs)))
        return geometric_mean(np.asarray(losses).reshape(-1, SEEDS))

    return score


def in_fours(score: Callable[[np.ndarray], np.ndarray], logs: np.ndarray) -> np.ndarray:
    """The scores of 4n rows, which are compiled once for four."""
    return np.concatenate([score(part) for part in np.split(logs, len(logs) // 4)])


def proportions(problem: Problem, power: int) -> np.ndarray:
    """Log10 of the sizes of the groups at the start, to a power, mean zero: steps as large."""
    params = problem.init(jax.random.key(0))
    norms = np.array([float(optax.tree.norm(params[name])) for name in groups(problem)])
    sizes = np.array([sum(x.size for x in jax.tree.leaves(params[n])) for n in groups(problem)])
    logs = power * np.log10(np.maximum(norms / np.sqrt(sizes), 1e-6))
    return logs - logs.mean()


def search(problem: Problem) -> dict[str, Any]:
    """The best rate for all, and the best found for each group, with their losses.

    The search for the latter starts from equal rates or from proportional ones, where the loss is
    less.
    """
    names, score = groups(problem), scorer(problem)
    kind = "adam" if problem.direction is optax.adam else "momentum"
    grid = GRID[kind][:, None] + np.zeros(len(names))
    losses = in_fours(score, grid)
    best, least = grid[np.argmin(losses)], float(losses.min())
    found = {"one rate": least, "uniform": float(10 ** best[0])}
    print(found, flush=True)
    grid = grid + proportions(problem, 1 if kind == "adam" else 2)
    losses = in_fours(score, grid)
    if losses.min() < least:
        best, least = grid[np.argmin(losses)], float(losses.min())
    print("in proportion:", float(losses.min()), flush=True)
    for factors in SEARCH[kind]:
        for group in range(len(names)):
            tried = best + factors[:, None] * np.eye(len(names))[group]
            losses = in_fours(score, tried)
            if losses.min() < least:
                best, least = tried[np.argmin(losses)], float(losses.min())
        print(f"{least:.4g}", dict(zip(names, best.round(2).tolist(), strict=True)), flush=True)
    rates = {name: float(10**log) for name, log in zip(names, best, strict=True)}
    return found | {"per group": least, "rates": rates}


def _rounded(x: Any, digits: int) -> Any:
    if isinstance(x, dict):
        return {name: _rounded(value, 3) for name, value in x.items()}
    return float(f"{x:.{digits}g}")


def tune(name: str) -> None:
    """Searches, and stores what was found in `tuned.json`."""
    print(name, flush=True)
    found = {key: _rounded(x, 5) for key, x in search(PROBLEMS[name]()).items()}
    rows = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    lines = (
        f" {json.dumps(key)}: {json.dumps(row)}" for key, row in (rows | {name: found}).items()
    )
    TUNED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(found, flush=True)
