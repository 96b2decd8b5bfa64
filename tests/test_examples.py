"""The examples to copy from: each trains, says what its rates became, and can stand alone."""

import ast
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS = {"plain_jax": 40, "mesh": 40, "linen": 40, "nnx_lora": 40, "choose_and_freeze": 40}

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", STEPS)
def test_the_loss_falls_and_the_rates_are_shown(name, capsys):
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        losses = importlib.import_module(name).main(STEPS[name])
    assert len(losses) == STEPS[name]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    printed = capsys.readouterr().out
    assert "%" in printed
    assert "the guard stepped in " in printed
    assert "learning rate" in printed


def test_the_picture_of_the_quickstart_is_the_sum_of_its_gaussians():
    with jax.numpy_dtype_promotion("standard"):
        import quickstart

        params = jax.tree.map(np.asarray, quickstart.initial(jax.random.key(3)))
        places = np.asarray(quickstart.PLACES[:: quickstart.SIZE * 37])
        found = quickstart.render(params, places)
    expected = np.zeros((len(places), 3))
    for k in range(quickstart.GAUSSIANS):
        angle = params["rotation"][k]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        away = (places - params["position"][k]) @ turn / np.exp(params["scale"][k])
        height = np.exp(-0.5 * (away**2).sum(1)) / (1 + np.exp(-params["opacity"][k]))
        expected += height[:, None] * params["colour"][k]
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_nothing_of_each_other(path):
    text = path.read_text("utf-8")
    files = {other.stem for other in EXAMPLES.glob("*.py")}
    nodes = list(ast.walk(ast.parse(text)))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not names & files
    assert f"    python examples/{path.name}\n" in text.split('"""')[1]
    if path.name not in ("quickstart.py", "mnist.py"):  # comparisons, not to copy from
        assert len(text.splitlines()) <= 80


def _calls_of(name):
    """(file, line, keywords) of all calls of a function in examples and benchmarks."""
    for path in sorted([*EXAMPLES.glob("*.py"), *(EXAMPLES.parent / "benchmarks").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield path.name, node.lineno, keywords


def test_progress_bars_are_silent_where_stderr_is_no_terminal():
    calls = list(_calls_of("tqdm"))
    assert calls
    assert all(keywords.get("disable") == "None" for *_, keywords in calls), calls
