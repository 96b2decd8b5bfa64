"""The suites of `benchmarks/run.py`: what they run, and what they publish of it."""

import ast
import graphlib
import importlib.util
import json

import pytest

from benchmarks import run


def _paths(out, **folders):
    return run.Paths(out, *(folders.get(name) for name in ("data_dir", "e2e_dir", "fashion_dir")))


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_exhibit_of_a_suite_is_a_command(tmp_path, suite):
    folders = dict.fromkeys(("data_dir", "e2e_dir", "fashion_dir"), tmp_path / "some data")
    names = run.chosen_by(suite, [], _paths(tmp_path, **folders))
    assert {"quadratic", "toys", "multitask", "wall_clock", "influence", "rivals"} <= set(names)
    for name in names:
        arguments = run.EXHIBITS[name].arguments(suite)
        words = run.command(name, arguments, _paths(tmp_path, **folders))
        assert importlib.util.find_spec(f"benchmarks.{run.EXHIBITS[name].module}")
        assert not any("{" in word for word in words)
        assert not any(word.endswith("some") for word in words)  # a blank in a path splits nothing


def test_fine_tuning_needs_data(tmp_path, capsys):
    assert "fine_tuning" not in run.chosen_by("paper", [], _paths(tmp_path))
    assert "Without --data-dir" in capsys.readouterr().out


def test_publishing_takes_tables_and_figures_and_no_path_of_the_machine(tmp_path):
    out, docs, page = tmp_path / "exhibits", tmp_path / "docs", tmp_path / "TABLES.md"
    out.mkdir()
    docs.mkdir()
    (out / "toys.md").write_text(f"| a | b |\n|---|---|\n| 1 | 2 |\nfigure: {out}/toys.png\n")
    (out / "toys.png").write_bytes(b"drawn")
    runs = [{"name": "toys", "minutes": 1.25}, {"name": "toys", "minutes": 0.75}]
    (out / "minutes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in runs))
    run.publish("paper", ["toys"], _paths(out), page, docs)
    text = page.read_text()
    assert "## toys: Figure 2" in text
    assert "| 1 | 2 |" in text
    assert "2 minutes" in text
    assert str(tmp_path) not in text
    assert (docs / "toys.png").read_bytes() == b"drawn"


def test_a_run_that_has_ended_well_is_not_run_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "execute", lambda words, name, paths: calls.append(name) or 0)
    for _ in range(2):
        assert run.run("toys", "paper", _paths(tmp_path)).status == 0
    assert calls == ["toys"]  # it has no report of its own
    monkeypatch.setattr(run, "execute", lambda words, name, paths: calls.append(name) or 1)
    for _ in range(2):
        assert run.run("quadratic", "paper", _paths(tmp_path)).status == 1
    assert calls == ["toys", "quadratic", "quadratic"]


def test_rooms_import_each_other_in_no_circle():
    rooms = {}
    for path in run.HERE.rglob("*.py"):
        room = path.relative_to(run.HERE).parts[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                rooms.setdefault(room, set()).add(node.module.split(".")[1])
    others = {room: found - {room} for room, found in rooms.items()}
    assert "kit" in list(graphlib.TopologicalSorter(others).static_order())  # raises at a circle
    assert not others["kit"]
    assert others["problems"] == {"kit"}
