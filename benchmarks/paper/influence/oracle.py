"""The oracle: every group trained alone, and what predicts what it wins."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.kit.tables import markdown, mean_sd
from benchmarks.paper.influence.study import Study


def rank_correlation(one: Any, other: Any) -> float:
    """Spearman's ρ."""
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def predictions(study: Study, seed: int, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """What is to predict the loss that each group wins; groups without a number count 0."""
    measured, groups = study.measured(seed), study.influence(seed).groups
    found = {
        "influence, b²/a": [groups[k].total or 0.0 for k in labels],
        "marginal share": [groups[k].marginal or 0.0 for k in labels],
        "gradient": [measured["gradient"][k] for k in labels],
        "Fisher": [measured["Fisher"][k] for k in labels],
        "number of parameters": [float(groups[k].size) for k in labels],
    }
    return {name: np.array(values) for name, values in found.items()}


def correlations(study: Study) -> str:
    """Of what each group wins when it trains alone, with what was to predict it, over seeds."""
    labels = sorted(study.influence(0).groups)
    sizes = np.array([study.sizes[k] for k in labels])
    whole: dict[str, list[float]] = {}
    each: dict[str, list[float]] = {}
    wins_of_seed = []
    for seed in study.seeds:
        before = study.untrained(seed)["loss"]
        after = [study.trained(study.alone(k), seed)["test"]["loss"] for k in labels]
        wins = before - np.array(after)
        wins_of_seed.append(wins)
        for name, values in predictions(study, seed, labels).items():
            whole.setdefault(name, []).append(rank_correlation(values, wins))
            # The number of parameters as a rival of PPI: "the smaller, the better".
            per_parameter = values / sizes if name != "number of parameters" else 1 / sizes
            each.setdefault(name, []).append(rank_correlation(per_parameter, wins / sizes))
    rows = [[name, mean_sd(whole[name], 2), mean_sd(each[name], 2)] for name in whole]
    rows.append(["random order", *[f"0.00 ± {1 / np.sqrt(len(labels) - 1):.2f}"] * 2])
    if len(wins_of_seed) > 1:
        pairs = list(itertools.combinations(wins_of_seed, 2))
        rows.append(
            [
                "what it wins with another seed",
                mean_sd([rank_correlation(one, other) for one, other in pairs], 2),
                mean_sd([rank_correlation(one / sizes, other / sizes) for one, other in pairs], 2),
            ]
        )
    head = ["ρ of … with what a group wins alone", "loss", "loss per parameter"]
    return markdown(head, rows)


def oracle_table(study: Study) -> str:
    """Every group alone: what was predicted, and what it won."""
    rows = []
    for label in study.influence(0).ranking():
        groups = [study.influence(seed).groups[label] for seed in study.seeds]
        runs = [study.trained(study.alone(label), seed) for seed in study.seeds]
        before = [study.untrained(seed)["loss"] for seed in study.seeds]
        numbers = [group.per_parameter for group in groups if group.per_parameter is not None]
        totals = [group.total for group in groups if group.total is not None]
        wins = [b - run["test"]["loss"] for b, run in zip(before, runs, strict=True)]
        score = [run["test"]["score"] for run in runs]
        rows.append(
            [
                label,
                groups[0].size,
                f"{np.mean(numbers):.2g}" if numbers else groups[0].status,
                f"{np.mean(totals):.2g}" if totals else groups[0].status,
                mean_sd(wins),
                mean_sd(score),
            ]
        )
    head = ["group", "parameters", "PPI", "total influence", "loss won alone", "test score alone"]
    return markdown(head, rows)
