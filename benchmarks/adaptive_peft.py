"""Does influence choose the right groups to train? The paper's section 5, against an oracle.

MiniLM with LoRA, and seven candidate groups that are all there at once: lora_A, lora_B, bias, norm,
head, embed, rest. All of them train for a tenth of the steps while influence is accumulated; then
plans are chosen, and each is trained from the pretrained weights.

1. Table 3's form: ψ from 1 to 2000, quality, trained parameters, and cost by XLA's own count.
2. Transfer: chosen on the first two or three layers, trained on all six.
3. The oracle: every group trained alone. Rank correlations of what it wins with influence, and with
   what is cheaper to know: gradient, Fisher information, the number of parameters.
4. With --e2e-dir, Table 4's form: a small GPT, pretrained here on English prose, tuned on E2E.

    python benchmarks/adaptive_peft.py
    python benchmarks/adaptive_peft.py --data-dir GLUE --e2e-dir E2E

Results are kept in a file; what is there is not computed again.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
import finetune_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from flax import nnx
from language import PRETRAINING, encode, language_loss, load_gpt
from models import gpt, lora
from scipy.stats import spearmanr
from tqdm import tqdm

import hidlr_optax as hd
import hidlr_optax.plot

PSIS = (1.0, 1.1, 10.0, 500.0, 1000.0, 2000.0)
TRANSFER_LAYERS = (2, 3)
LABELS = hd.label_by_role


class Problem(NamedTuple):
    """What plans are made for.

    Attributes:
      name: unique.
      task: trains all of its parameters.
      small: its smaller versions, by name, on which plans are made to be transferred.
    """

    name: str
    task: training.Task
    small: Mapping[str, training.Task] = {}


def base_optimizer() -> optax.GradientTransformation:
    """The direction of all runs."""
    return optax.adamw(1.0)


def rule(labels: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """The rates: `hidlr` with nothing tuned."""
    return hd.hidlr(
        None,
        labels,
        update_interval=20,
        solver=hd.coupled(),  # the tables are of this solver, whose probes measure each group
        curvature=hd.probes(batch_size=1),
        schedule=optax.cosine_decay_schedule(1.0, steps),
    )


def pretrained(task: training.Task, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model's structure, and its parameters as nested dicts."""
    graph, params = nnx.split(task.build(seed))
    return graph, nnx.to_pure_dict(params)


def scores(task: training.Task, graph: Any, params: Any) -> dict[str, float]:
    """Of a model on the test set."""
    return task.evaluate(nnx.merge(graph, params), "test")


def squared_by_group(params: Any, tree: Any) -> dict[str, jax.Array]:
    """Sum of squares over each group."""
    labels = jax.tree.leaves(LABELS(params))
    sums: dict[str, jax.Array] = {}
    for label, leaf in zip(labels, jax.tree.leaves(tree), strict=True):
        sums[label] = sums.get(label, jnp.zeros(())) + jnp.sum(leaf**2)
    return sums


def measure(task: training.Task, seed: int, steps: int, whole: int) -> dict[str, Any]:
    """Trains all groups and watches: influence, gradients, Fisher information.

    Args:
      task: to train.
      seed: of the run.
      steps: to train and to measure.
      whole: steps of the run that the schedule is made for.

    Returns:
      "plan", that of ψ = 1 as JSON, with the influence in it; "history", for the heatmap; and by
      group "gradient" (mean squared norm of batch gradients) and "Fisher" (that of gradients of
      single examples, of the last batch).
    """
    graph, params = pretrained(task, seed)
    tx = optax.chain(base_optimizer(), rule(LABELS, whole))
    state, running = tx.init(params), hd.influence.start(LABELS, params)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        return task.loss_fn(nnx.merge(graph, params), batch)

    @jax.jit
    def step(params: Any, state: Any, running: Any, batch: Any) -> Any:
        value, grad = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(
            grad, state, params, value_fn=lambda p: loss_of(p, batch), value=value, grad=grad
        )
        running = hd.influence.accumulate(running, state)
        row = {"loss": value} | hd.metrics(state)
        return (
            optax.apply_updates(params, updates),
            state,
            running,
            row,
            squared_by_group(params, grad),
        )

    history, gradients = [], []
    for n in tqdm(range(steps), f"all groups, seed {seed}"):
        batch = task.batch(seed, n)
        params, state, running, row, squares = step(params, state, running, batch)
        history.append(row)
        gradients.append(squares)

    @jax.jit
    def fisher(params: Any, batch: Any) -> Any:
        def of_example(example: Any) -> Any:
            one = jax.tree.map(lambda x: x[None], example)
            return squared_by_group(params, jax.grad(loss_of)(params, one))

        return jax.tree.map(lambda x: x.mean(0), jax.lax.map(of_example, batch))

    last = jax.tree.map(jnp.asarray, task.batch(seed, steps))
    found = hd.influence.summarise(running)
    numbers = {
        "history": history,
        "gradient": {k: np.mean([row[k] for row in gradients]) for k in gradients[0]},
        "Fisher": fisher(params, last),
    }
    plan = hd.peft.select(found, 1.0, rules="role")
    return jax.tree.map(float, jax.device_get(numbers)) | {"plan": plan.to_json()}


def by_xla(step: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """FLOPs, and bytes alive: arguments and temporaries, the first and third donated."""
    compiled = jax.jit(step, donate_argnums=(0, 2)).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    analysis: Any = compiled.cost_analysis()
    alive = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"flops": float(analysis["flops"]), "bytes": float(alive)}


def step_of(task: training.Task, graph: Any, tx: Any) -> Callable[..., Any]:
    """A training step: (trainable, frozen, state, batch) -> (trainable, state, loss)."""
    tx = optax.with_extra_args_support(tx)

    def step(trainable: Any, frozen: Any, state: Any, batch: Any) -> Any:
        def loss_of(trainable: Any) -> jax.Array:
            return task.loss_fn(nnx.merge(graph, hd.peft.merge(trainable, frozen)), batch)

        value, grad = jax.value_and_grad(loss_of)(trainable)
        updates, state = tx.update(grad, state, trainable, value_fn=loss_of, value=value, grad=grad)
        return optax.apply_updates(trainable, updates), state, value

    return step


def counted(task: training.Task, tx: Any, trainable: Any, frozen: Any) -> dict[str, float]:
    """One training step as XLA counts it.

    Args:
      task: gives the loss and a batch.
      tx: the optimizer; a `hidlr` in it counts with its refresh.
      trainable: parameters that the gradient is taken of.
      frozen: the others, from `split`.

    Returns:
      As `by_xla`; arguments are the parameters, the optimizer's state and a batch.
    """
    graph, _ = pretrained(task, 0)
    arguments = trainable, frozen, tx.init(trainable), task.batch(0, 0)
    return by_xla(step_of(task, graph, tx), *arguments)


def cost(task: training.Task, plan: hd.Plan) -> dict[str, float]:
    """One step of the base optimizer under a plan, from `counted`."""
    _, params = pretrained(task, 0)
    return counted(task, base_optimizer(), *hd.peft.split(params, LABELS, plan))


def ways_to_freeze(task: training.Task) -> dict[str, dict[str, float]]:
    """What training the head alone costs, by the way in which the rest is frozen."""
    _, params = pretrained(task, 0)
    labels = LABELS(params)
    names = set(jax.tree.leaves(labels))
    plan = hd.Plan({"head"}, names - {"head"})
    nothing = hd.peft.split(params, labels, hd.Plan(names, frozenset()))[1]
    parts: dict[Any, Any] = {name: optax.set_to_zero() for name in names} | {
        "head": base_optimizer()
    }
    is_frozen = jax.tree.map(lambda label: label != "head", labels)
    zeroed = optax.chain(base_optimizer(), optax.masked(optax.set_to_zero(), is_frozen))
    partition = optax.partition(parts, labels)
    rates = rule(hd.peft.trainable_labels(params, labels, plan), 100)
    head, rest = hd.peft.split(params, labels, plan)
    ways = {
        "plan": (base_optimizer(), head, rest),
        "all trained": (base_optimizer(), params, nothing),
        "AdamW for all, then set_to_zero": (zeroed, params, nothing),
        "partition with set_to_zero": (partition, params, nothing),
        "plan, with hidlr": (optax.chain(base_optimizer(), rates), head, rest),
        "partition, with hidlr": (optax.chain(partition, rule(labels, 100)), params, nothing),
    }
    return {name: counted(task, *way) for name, way in ways.items()} | {
        "by hand": by_hand(task, params)
    }


def by_hand(task: training.Task, params: dict[str, Any]) -> dict[str, float]:
    """The head alone, without anything of ours."""
    graph, _ = pretrained(task, 0)
    tx = base_optimizer()

    def step(head: Any, encoder: Any, state: Any, batch: Any) -> Any:
        def loss_of(head: Any) -> jax.Array:
            return task.loss_fn(nnx.merge(graph, {"encoder": encoder, "head": head}), batch)

        updates, state = tx.update(jax.grad(loss_of)(head), state, head)
        return optax.apply_updates(head, updates), state

    head = params["head"]
    arguments = head, params["encoder"], tx.init(head), task.batch(0, 0)
    return by_xla(step, *arguments)


def make_trainer(task: training.Task, plan: hd.Plan, steps: int) -> Callable[[int], dict[str, Any]]:
    """A function that trains what the plan says, from the pretrained weights, with a seed.

    It returns "test", the scores; "loss", of the last tenth of the steps; "seconds" of the median
    step. It compiles once for all seeds.
    """
    graph, params = pretrained(task, 0)
    labels = hd.peft.trainable_labels(params, LABELS, plan)
    tx = optax.chain(base_optimizer(), rule(labels, steps))

    step = jax.jit(step_of(task, graph, tx))

    def run(seed: int) -> dict[str, Any]:
        trainable, frozen = hd.peft.split(pretrained(task, seed)[1], LABELS, plan)
        state, losses, seconds = tx.init(trainable), [], []
        for n in tqdm(range(steps), f"{'+'.join(sorted(plan.trainable))}, seed {seed}"):
            start = time.perf_counter()
            trainable, state, value = step(trainable, frozen, state, task.batch(seed, n))
            losses.append(float(value))
            seconds.append(time.perf_counter() - start)
        return {
            "test": scores(task, graph, hd.peft.merge(trainable, frozen)),
            "loss": float(np.mean(losses[-max(steps // 10, 1) :])),
            "seconds": float(np.median(seconds)),
        }

    return run


class Results:
    """What has been computed, by key, in a file of JSON lines."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._known = path, {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._known[tuple(row["key"])] = row["value"]

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The value of a key, computed if it is not there."""
        name = tuple(map(str, key))
        if name not in self._known:
            self._known[name] = compute()
            with self._path.open("a") as file:
                file.write(json.dumps({"key": name, "value": self._known[name]}) + "\n")
        return self._known[name]


class Study:
    """All measurements and runs of one problem."""

    def __init__(self, problem: Problem, results: Results, steps: int, seeds: int):
        self.problem, self.steps, self.seeds = problem, steps, range(seeds)
        self._results = results
        self._trainers: dict[Any, Callable[[int], dict[str, Any]]] = {}

    def measured(self, seed: int, small: str | None = None) -> dict[str, Any]:
        """From `measure`, on the problem or a smaller version."""
        task = self.problem.task if small is None else self.problem.small[small]
        key = self.problem.name, self.steps, "measure", small, seed
        short = max(self.steps // 10, 2)
        return self._results.get(key, lambda: measure(task, seed, short, self.steps))

    def influence(self, seed: int, small: str | None = None) -> hd.Influence:
        """What the groups are worth."""
        found = hd.Plan.from_json(self.measured(seed, small)["plan"]).influence
        assert found is not None
        return found

    def select(self, psi: float, seed: int, small: str | None = None) -> hd.Plan | None:
        """The plan for ψ; None where it would freeze everything."""
        try:
            return hd.peft.select(self.influence(seed, small), psi, rules="role")
        except ValueError:
            return None

    def trained(self, plan: hd.Plan, seed: int) -> dict[str, Any]:
        """From `make_trainer`."""

        def train() -> dict[str, Any]:
            if plan.trainable not in self._trainers:
                self._trainers.clear()  # with all that they compiled
                self._trainers[plan.trainable] = make_trainer(self.problem.task, plan, self.steps)
            return self._trainers[plan.trainable](seed)

        key = self.problem.name, self.steps, "train", *sorted(plan.trainable), seed
        return self._results.get(key, train)

    def cost(self, plan: hd.Plan) -> dict[str, float]:
        """From `cost`."""
        key = self.problem.name, "cost", *sorted(plan.trainable)
        return self._results.get(key, lambda: cost(self.problem.task, plan))

    def ways_to_freeze(self) -> dict[str, dict[str, float]]:
        """From `ways_to_freeze`."""
        key = self.problem.name, "ways to freeze"
        return self._results.get(key, lambda: ways_to_freeze(self.problem.task))

    def untrained(self, seed: int) -> dict[str, float]:
        """Test scores before the first step."""
        key = self.problem.name, "untrained", seed
        return self._results.get(
            key, lambda: scores(self.problem.task, *pretrained(self.problem.task, seed))
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of parameters of each group, in the whole model."""
        return {label: group.size for label, group in self.influence(0).groups.items()}

    def alone(self, label: str) -> hd.Plan:
        """The plan that trains one group."""
        return hd.Plan({label}, set(self.sizes) - {label}, sizes=self.sizes)


def rank_correlation(one: Any, other: Any) -> float:
    """Spearman's ρ."""
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """For tables."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def freezing_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Ways to train the head alone, in units of the one by hand."""
    base = found["by hand"]
    rows = [
        [name, *(f"{way[unit] / base[unit]:.2f}" for unit in ("flops", "bytes"))]
        for name, way in sorted(found.items(), key=lambda item: item[1]["flops"])
    ]
    rows = [row for row in rows if row[0] != "by hand"]
    text = f"By hand: {base['flops'] / 1e9:.2f} GFLOP and {base['bytes'] / 2**20:.0f} MiB a step."
    return f"{text}\n\n{training.as_table(['the head alone', 'FLOPs', 'memory'], rows)}"


def plan_row(study: Study, name: str, plans: Sequence[hd.Plan]) -> list[Any]:
    """One line of Table 3: a plan for each seed, and what it comes to."""
    runs = [study.trained(plan, seed) for seed, plan in zip(study.seeds, plans, strict=True)]
    everything = hd.Plan(plans[0].labels, frozenset())
    full, own = study.cost(everything), study.cost(plans[0])
    groups = [", ".join(sorted(plan.trainable)) for plan in plans]
    kinds = "; ".join(sorted(set(groups), key=groups.index))
    # Not the plan's own sizes, which are those of the model that it was made on.
    share = sum(study.sizes[k] for k in plans[0].trainable) / sum(study.sizes.values())
    quality = [name for name in runs[0]["test"] if name not in ("score", "loss")]
    return [
        name,
        "all" if plans[0].trainable == plans[0].labels else kinds,
        f"{100 * share:.2f} %",
        *(mean_sd([run["test"][key] for run in runs]) for key in (*quality, "loss")),
        f"{own['flops'] / full['flops']:.2f}",
        f"{own['bytes'] / full['bytes']:.2f}",
        f"{np.mean([run['seconds'] for run in runs]):.3f}",
    ]


def plan_table(study: Study, rows: Sequence[tuple[str, Sequence[hd.Plan]]]) -> str:
    """Table 3's form."""
    run = study.trained(rows[0][1][0], 0)
    quality = [f"test {name}" for name in run["test"] if name not in ("score", "loss")]
    head = ["chosen by", "trains", "parameters", *quality, "test loss"]
    head += ["FLOPs / full", "memory / full", "seconds a step"]
    return training.as_table(head, [plan_row(study, *row) for row in rows])


def by_psi(study: Study) -> list[tuple[str, list[hd.Plan]]]:
    """The plans of all ψ that leave a group in each seed."""
    rows = []
    for psi in PSIS:
        plans = [study.select(psi, seed) for seed in study.seeds]
        if all(plans):
            rows.append((f"ψ = {psi:g}", [plan for plan in plans if plan]))
    return rows


def transferred(study: Study, psi: float) -> list[tuple[str, list[hd.Plan]]]:
    """Plans made on smaller models, applied to the whole one by their rules."""
    rows = []
    for small in study.problem.small:
        plans = []
        for seed in study.seeds:
            plan = study.select(psi, seed, small)
            assert plan is not None
            plan.label(pretrained(study.problem.task, seed)[1])  # raises where a rule finds nothing
            plans.append(plan)
        rows.append((f"ψ = {psi:g}, {small}", plans))
    return rows


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
    return training.as_table(head, rows)


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
    return training.as_table(head, rows)


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
    tokenizer, weights = load_gpt(config, steps, args.out)

    def encoded(texts: data.Texts, count: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.random.default_rng(0).permutation(len(texts.first))[:count]
        return encode(tokenizer, texts, chosen, config.positions)

    sets = {"train": encoded(train_texts, 4000), "test": encoded(test_texts, 512)}

    def build(seed: int) -> gpt.GPT:
        model = gpt.GPT(config, nnx.Rngs(0))
        nnx.update(model, weights)
        lora.add_lora(model, 8, rngs=nnx.Rngs(seed))
        return model

    def loss_fn(model: gpt.GPT, batch: Any) -> jax.Array:
        return language_loss(model(batch[0]), batch)

    def batch(seed: int, step: int) -> Any:
        chosen = np.random.default_rng((seed, step)).integers(0, 4000, 16)
        return tuple(array[chosen] for array in sets["train"])

    loss_of = nnx.jit(loss_fn)

    def evaluate(model: gpt.GPT, part: str) -> dict[str, float]:
        del part
        parts = [tuple(array[n : n + 64] for array in sets["test"]) for n in range(0, 512, 64)]
        weights = [part[1][:, 1:].sum() for part in parts]
        loss = float(np.average([float(loss_of(model, part)) for part in parts], weights=weights))
        return {"score": -loss, "loss": loss}

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
    results = Results(args.out / "results.jsonl")
    for problem in problems:
        report(Study(problem, results, args.steps, args.seeds), args.out)


if __name__ == "__main__":
    main()
