"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def _as_a_reader_runs_it(monkeypatch, tmp_path):
    import jax

    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_python_blocks_run_in_order_and_the_loss_falls():
    assert len(BLOCKS) >= 2
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert float(namespace["loss"]) < 0.5


def test_the_recipe_is_short():
    recipe = README.split("<!-- recipe -->")[1].split("<!-- /recipe -->")[0]
    lines = [line for line in recipe.splitlines() if line.strip()]
    assert len(lines) - 2 <= 15  # without the fences
