"""The examples of other libraries' loops: each trains, in as many lines that differ as it marks."""

import ast
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

ADAPTERS = Path(__file__).resolve().parent.parent / "examples/adapters"
# What each needs, and the steps or epochs of the test.
NEEDS = {
    "equinox_loop": ("equinox", 100),
    "nnx_optimizer": ("flax", 100),
    "linen_train_state": ("flax", 100),
    "optimistix_minimise": ("optimistix", 700),
    "numpyro_svi": ("numpyro", 200),
    "flowjax_fit": ("flowjax", 10),
    "gpjax_fit": ("gpjax", 60),
    "tunix_peft": ("tunix", 60),
}
# Not in the test extra: with what they need installed, `pytest -m slow tests/test_adapters.py`.
HEAVY = "numpyro_svi", "flowjax_fit", "gpjax_fit", "tunix_peft"


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, ADAPTERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("default")  # of libraries that are not ours
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY)) for name in NEEDS],
)
def test_the_loss_falls(name):
    package, steps = NEEDS[name]
    pytest.importorskip(package)
    with jax.numpy_dtype_promotion("standard"):
        losses = _loaded(name).main(steps)
    assert np.all(np.isfinite(losses))
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    if len(losses) < 10:  # of epochs, or the ends alone
        first, last = losses[0], losses[-1]
    assert last < first - 0.05 * abs(first)  # a log-likelihood has no zero


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*.py")), ids=lambda path: path.stem)
def test_each_stands_alone_and_is_listed(path):
    text = path.read_text("utf-8")
    assert path.stem in NEEDS
    assert f"python examples/adapters/{path.name}\n" in text.split('"""')[1]
    assert len(text.splitlines()) <= 90
    assert "# <- " in text
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert not {node.module for node in imported} & set(NEEDS)
    readme = (ADAPTERS / "README.md").read_text("utf-8")
    assert f"({path.name})" in readme
