"""Does influence choose the right groups to train? The paper's section 5, against an oracle.

MiniLM with LoRA, and seven candidate groups that are all there at once: lora_A, lora_B, bias, norm,
head, embed, rest. All of them train for a tenth of the steps while influence is accumulated; then
plans are chosen, and each is trained from the pretrained weights.

1. Table 3's form: ψ from 1 to 2000, quality, trained parameters, and cost by XLA's own count.
2. Transfer: chosen on the first two or three layers, trained on all six.
3. The oracle: every group trained alone. Rank correlations of what it wins with influence, and with
   what is cheaper to know: gradient, Fisher information, the number of parameters.
4. With --e2e-dir, Table 4's form: a small GPT, pretrained here on English prose, tuned on E2E.

    python -m benchmarks.paper.influence
    python -m benchmarks.paper.influence --data-dir GLUE --e2e-dir E2E

Results are kept in a file; what is there is not computed again.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import hidlr_optax as hd
import hidlr_optax.plot
from benchmarks.finetune import text as finetune_text
from benchmarks.kit import training
from benchmarks.kit.store import Values
from benchmarks.kit.tables import mean_sd
from benchmarks.paper.influence.cost import freezing_table
from benchmarks.paper.influence.oracle import correlations, oracle_table, rank_correlation
from benchmarks.paper.influence.plans import by_psi, plan_table, transferred
from benchmarks.paper.influence.study import Problem, Study
from benchmarks.problems import data
from benchmarks.problems.language import (
    PRETRAINING,
    bleu,
    described,
    encode,
    language_loss,
    load_gpt,
    references,
)
from benchmarks.problems.models import gpt, lora

TRANSFER_LAYERS = (2, 3)
TESTED = 256  # texts of the test set
TOLD = 64  # restaurants of the test set that are described, for BLEU


def report(study: Study, out: Path) -> None:
    """Everything on one problem."""
    print(f"\n### {study.problem.name}\n")
    print(study.influence(0), "\n")
    print(plan_table(study, by_psi(study)))
    if study.problem.small:
        print("\nWays to freeze:\n")
        print(freezing_table(study.ways_to_freeze()))
        print("\nChosen on the first layers:\n")
        print(plan_table(study, transferred(study, psi=10.0)))
        for small in study.problem.small:
            rhos = []
            for seed in study.seeds:
                whole, part = study.influence(seed).groups, study.influence(seed, small).groups
                values = [[g[k].per_parameter or 0.0 for k in sorted(whole)] for g in (whole, part)]
                rhos.append(rank_correlation(*values))
            print(f"\nρ of the PPIs with those of {small}: {mean_sd(rhos, 2)}")
    print("\nEach group alone:\n")
    print(oracle_table(study), correlations(study), sep="\n\n")
    slug = study.problem.name.replace(" ", "-").replace(",", "")
    heatmap = hidlr_optax.plot.influence(study.measured(0)["history"])
    heatmap.savefig(out / f"influence-{slug}.png", dpi=120)
    front = hd.peft.pareto(study.influence(0), rules="role")
    hidlr_optax.plot.pareto(front).savefig(out / f"pareto-{slug}.png", dpi=120)


def text_problem(args: argparse.Namespace) -> Problem:
    """MiniLM with LoRA, on CoLA or on snippets of reviews; smaller ones are its first layers."""
    corpus = finetune_text.load(args)
    inputs, labels = corpus.splits["test"]
    rows = np.arange(min(TESTED, len(labels)))
    corpus.splits["test"] = finetune_text.rows_of(inputs, rows), labels[rows]
    layers = (2, 1) if args.quick else (6, *TRANSFER_LAYERS)
    whole, *small = (
        finetune_text.make_task(corpus, dropout=0.0, rank=8, layers=n)._replace(wrt=nnx.Param)
        for n in layers
    )
    names = [f"{n} layers" for n in layers[1:]]
    name = "snippets" if args.data_dir is None else args.task
    return Problem(f"MiniLM, {name}", whole, dict(zip(names, small, strict=True)))


def e2e_problem(args: argparse.Namespace) -> Problem:
    """A small GPT with LoRA that learns to describe restaurants; only the description counts."""
    config = gpt.Config()
    train_texts = data.e2e(args.e2e_dir, "devset.csv")
    test_texts = data.e2e(args.e2e_dir, "testset_w_refs.csv")
    steps = 20 if args.quick else PRETRAINING
    tokenizer, weights = load_gpt(config, steps, data.CACHE)

    def encoded(texts: data.Texts, count: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.random.default_rng(0).permutation(len(texts.first))[:count]
        return encode(tokenizer, texts, chosen, config.positions)

    sets = {"train": encoded(train_texts, 4000), "test": encoded(test_texts, TESTED)}
    by_people = references(test_texts)
    meanings = list(by_people)[: 8 if args.quick else TOLD]

    def build(seed: int) -> gpt.GPT:
        model = gpt.GPT(config, nnx.Rngs(0))
        nnx.update(model, weights)
        lora.add_lora(model, 8, rngs=nnx.Rngs(seed))
        return model

    def loss_fn(model: gpt.GPT, batch: Any) -> jax.Array:
        return language_loss(model(batch[0]), batch)

    def batch(seed: int, step: int) -> Any:
        chosen = np.random.default_rng((seed, step)).integers(0, 4000, 8)
        return tuple(array[chosen] for array in sets["train"])

    loss_of = nnx.jit(loss_fn)

    def evaluate(model: gpt.GPT, part: str) -> dict[str, float]:
        del part
        parts = [tuple(array[n : n + 64] for array in sets["test"]) for n in range(0, TESTED, 64)]
        weights = [part[1][:, 1:].sum() for part in parts]
        loss = float(np.average([float(loss_of(model, part)) for part in parts], weights=weights))
        told = described(model, tokenizer, meanings, config.positions)
        quality = bleu(told, [by_people[meaning] for meaning in meanings])
        return {"score": quality, "BLEU": quality, "loss": loss}

    return Problem("GPT, E2E", training.Task(build, nnx.Param, loss_fn, batch, evaluate))


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="a folder in GLUE's layout")
    parser.add_argument("--task", default="CoLA", help="of GLUE")
    parser.add_argument("--e2e-dir", type=Path, help="with devset.csv and testset_w_refs.csv")
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("adaptive_peft"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 4, 1
    args.out.mkdir(parents=True, exist_ok=True)
    with training.bad_input(parser):
        problems = [text_problem(args)]
        if args.e2e_dir is not None:
            problems.append(e2e_problem(args))
    results = Values(args.out / "results.jsonl")
    for problem in problems:
        report(Study(problem, results, args.steps, args.seeds), args.out)


if __name__ == "__main__":
    main()
