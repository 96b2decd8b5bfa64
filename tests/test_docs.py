"""What README and docs/ show runs as it stands there, and their links lead somewhere."""

import inspect
import math
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import jax
import pytest
from hatchling import build

import hidlr_optax as hd
from hidlr_optax._rule import guard, hold, measure, rate, record, shape

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL = [*SHOWN, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
ALL += [ROOT / "examples/README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
# A block that cannot run by itself has `<!-- not run: why -->` in the line before it.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+) -->\n)?```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


def _name(path):
    return str(path.relative_to(ROOT))


def _blocks(path):
    """(first line, code) of the blocks that run."""
    text = path.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if not match["why"]]
    return [(text.count("\n", 0, match.start("code")), match["code"]) for match in found]


@pytest.fixture
def _as_a_reader_runs_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("_as_a_reader_runs_it")
@pytest.mark.parametrize("path", [path for path in SHOWN if _blocks(path)], ids=_name)
def test_python_blocks_run_in_order(path):
    namespace = {"__name__": "__main__"}
    for line, block in _blocks(path):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + block, _name(path), "exec"), namespace)
    if "loss" in namespace:
        assert float(namespace["loss"]) < 0.5
    if path.name == "guide.md":
        written = _scalars(next(Path("runs/first").iterdir()))
        assert {name for name, _ in written} == {*hd.metrics(namespace["state"]), "step", "loss"}
        assert {step for _, step in written} == {0, 10, 20, 30}
        refreshes = [written["refreshes", step] for step in (0, 10, 20, 30)]
        assert refreshes[:2] == [1, 11]  # while the rates are found
        assert refreshes == sorted(refreshes)
        assert refreshes[-1] < 31
        assert 0 < written["learning_rate/head", 20] != written["learning_rate/head", 0] > 0


def _scalars(path):
    """{(name, step): number} of an event file of TensorBoard, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found, data = {}, path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data)
        event = Event.FromString(data[12 : 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    return found


def test_blocks_that_do_not_run_are_rare():
    blocks = [match for path in SHOWN for match in BLOCK.finditer(path.read_text("utf-8"))]
    assert len(blocks) >= 15
    assert sum(match["why"] is not None for match in blocks) <= 2


def test_blocks_fit_a_phone_and_a_column():
    for path in SHOWN:
        for match in BLOCK.finditer(path.read_text("utf-8")):
            assert all(len(line) <= 75 for line in match["code"].splitlines()), path


def _code_lines(text):
    return [line for line in text.splitlines() if line.strip() and not line.startswith("```")]


def test_the_recipe_is_short():
    text = (ROOT / "docs/influence.md").read_text("utf-8")
    recipe = text.split("<!-- recipe -->")[1].split("<!-- /recipe -->")[0]
    assert len(_code_lines(recipe)) <= 15


def test_the_readme_is_short_and_holds_the_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 600
    for name in ("main job", "tests", "results"):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1
    loop = text.split("## Fifteen lines")[1].split("```")[1]
    assert len(_code_lines(loop)) - 1 <= 15  # without the fence's `python`


def test_the_readme_shows_what_its_program_prints(capsys):
    text = (ROOT / "README.md").read_text("utf-8")
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(_blocks(ROOT / "README.md")[0][1], "README.md", "exec"), {})
    shown = text.split("```text\n")[1].split("```")[0]
    masked = (re.sub(r"\d[\d.e-]*", "#", part).split() for part in (shown, capsys.readouterr().out))
    assert next(masked) == next(masked)  # digits may differ from machine to machine


def test_words_are_few():
    docs = sorted((ROOT / "docs").rglob("*.md"))
    assert sum(len(path.read_text("utf-8").split()) for path in docs) <= 9000


# Links: relative ones lead to files of the repository, and their anchors to headings.


def _anchors(path):
    """As GitHub and Python-Markdown make them of headings without markup."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {re.sub(r"\s", "-", slug) for slug in slugs}


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        if anchor:
            assert anchor in _anchors(found), target


# docs/design.md: one row for each constant, with the value that the code has.


def _rows(section):
    """Name -> value, of the first table of a section."""
    text = (ROOT / "docs/design.md").read_text("utf-8").split(f"## {section}\n")[1]
    table = re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))


def test_design_has_a_row_for_each_constant_of_the_rule():
    constants = {
        name: value
        for module in (measure, rate, shape, guard, hold, record)
        for name, value in vars(module).items()
        if re.fullmatch(r"_?[A-Z_]+", name) and isinstance(value, int | float)
    }
    shown = {name: float(value) for name, value in _rows("Constants of the rule").items()}
    assert shown.keys() == constants.keys()
    for name, value in constants.items():
        assert math.isclose(shown[name], value, rel_tol=1e-4), name  # RECOVER has many digits


def test_design_has_a_row_for_each_default():
    parameters = inspect.signature(hd.hidlr).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    shown = _rows("Defaults of hidlr")
    assert shown.keys() == defaults.keys()
    for name, value in defaults.items():
        if isinstance(value, int | float):
            assert float(shown[name]) == value
        elif value is None or isinstance(value, str):
            assert shown[name].strip('"') == str(value)


# What is packed.


def test_the_wheel_says_that_it_is_typed_and_the_sdist_has_the_docs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # as PEP 517 has it
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = wheel.namelist()
    assert "hidlr_optax/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hidlr_optax"}
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as sdist:
        packed = {name.split("/", 1)[1] for name in sdist.getnames()}
    assert {"mkdocs.yml", "CITATION.cff", "CONTRIBUTING.md", "docs/hooks.py"} <= packed
    assert {str(path.relative_to(ROOT)) for path in SHOWN} <= packed


def test_every_public_name_is_in_the_reference():
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    text = "".join(page.read_text("utf-8") for page in pages)
    modules = {*hd.peft.__all__, *hd.influence.__all__}
    missing = [n for n in hd.__all__ if f"::: hidlr_optax.{n}\n" not in text and n not in modules]
    assert not missing
