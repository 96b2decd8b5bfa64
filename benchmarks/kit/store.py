"""Results as JSON lines: what is there is not computed again.

`Store` has whole runs, each some flat rows, beside published baselines that come with the code;
`Log` the steps and the end of each run, `Values` any values by key.
"""

import argparse
import collections
import gzip
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

RESULTS = Path(__file__).parent.parent / "results"

Row = dict[str, Any]


class Job(NamedTuple):
    """Some runs that share one compilation.

    Attributes:
      key: what their rows have in common, beside the seed.
      execute: seed -> their results.
    """

    key: Row
    execute: Callable[[int], list[Row]]


def read(path: Path) -> list[Row]:
    """The rows of a file, which may be compressed, or none where there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.decode().splitlines()]


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def rounded(found: Mapping[str, Any], digits: int) -> Row:
    """Arrays as lists of numbers of so many decimal places."""
    return {name: np.asarray(x, float).round(digits).tolist() for name, x in found.items()}


def arguments(
    doc: str | None, out: str, *, quick: str, full: str | None = None, figure: bool = False
) -> argparse.Namespace:
    """What every script with rows in one file is told by its user.

    Args:
      doc: of the script.
      out: where its rows go, unless told otherwise.
      quick: what `--quick` does.
      full: what `--full` does; None: there is no such flag.
      figure: whether it draws one.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, default=3)
    if full is not None:
        parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    if figure:
        parser.add_argument("--figure", type=Path)
    return parser.parse_args()


def identity(row: Row, fields: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells a run apart; its seed comes last."""
    return tuple(row.get(name) for name in (*fields, "seed"))


class Store(NamedTuple):
    """Where the rows of a benchmark are.

    Attributes:
      path: the file to append to.
      fields: the names whose entries, with the seed, tell runs apart.
      baselines: the file under `RESULTS` of rows that were published, or None.
    """

    path: Path
    fields: tuple[str, ...]
    baselines: str | None = None

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return identity(row, self.fields)

    def rows(self) -> list[Row]:
        """All runs so far, each once: where both files have it, that of `path`."""
        own = read(self.path)
        known = set(map(self._identity, own))
        published = read(RESULTS / self.baselines) if self.baselines else []
        return [row for row in published if self._identity(row) not in known] + own

    def result(self, job: Job, seed: int) -> list[Row]:
        """The rows of a run, which is run if there are none."""
        key = job.key | {"seed": seed}
        here = [row for row in self.rows() if self._identity(row) == self._identity(key)]
        return here or self._append(key, job)

    def run(self, jobs: Iterable[Job], seeds: Iterable[int], title: str = "") -> None:
        """Runs what is missing and appends it."""
        seeds, jobs = list(seeds), collections.deque(jobs)
        done = set(map(self._identity, self.rows()))
        for _ in tqdm(range(len(jobs)), title, disable=None):
            job = jobs.popleft()  # gone with its programs, before hundreds of them fill the memory
            for seed in seeds:
                key = job.key | {"seed": seed}
                if self._identity(key) not in done:
                    self._append(key, job)

    def _append(self, key: Row, job: Job) -> list[Row]:
        start = time.perf_counter()
        results = job.execute(key["seed"])
        seconds = {"seconds": round(time.perf_counter() - start, 2)}
        rows = [key | result | seconds for result in results]
        append(self.path, rows)
        return rows


class Log:
    """Steps and results of all runs, in a file of JSON lines; of two rows for a step, the later.

    Raises:
      ValueError: the file was written under other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path = path
        self._steps: dict[tuple[str, int], dict[int, Row]] = collections.defaultdict(dict)
        self._results: dict[tuple[str, int], Row] = {}
        if not path.exists():
            append(path, [{"settings": dict(settings)}])
        first, *rows = read(path)
        if first["settings"] != settings:
            raise ValueError(
                f"{path} was written with the settings {first['settings']}, not {settings}: "
                "choose another --out, or delete it"
            )
        self._add(rows)

    def _add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            run = row["method"], row["seed"]
            if "step" in row:
                self._steps[run][row["step"]] = row
            else:
                self._results[run] = row

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows: with "step" those of a step, without it those of a run's end."""
        append(self._path, rows)
        self._add(rows)

    def history(self, method: str, seed: int) -> list[Row]:
        """The steps of a run, in order."""
        steps = self._steps[method, seed]
        return [steps[step] for step in sorted(steps)]

    def result(self, method: str, seed: int) -> Row | None:
        """The end of a run, or None if it has not come to it."""
        return self._results.get((method, seed))


class Values:
    """What has been computed, by key."""

    def __init__(self, path: Path):
        self._path = path
        self._known = {tuple(row["key"]): row["value"] for row in read(path)}

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The value of a key, computed if it is not there."""
        name = tuple(map(str, key))
        if name not in self._known:
            self._known[name] = compute()
            append(self._path, [{"key": name, "value": self._known[name]}])
        return self._known[name]


def shard(text: str) -> slice:
    """`i/n`, every n-th from the i-th on, as a slice.

    Raises:
      ValueError: it is not of this form, or not 0 <= i < n.
    """
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError(f"a shard is i/n with 0 <= i < n, got {text}")
    return slice(index, None, count)
