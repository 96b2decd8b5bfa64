"""Runs as JSON lines: what is there is not run again, and published baselines come with the code.

A row is a flat dict. The entries named in `Store.fields` and its seed say which run it belongs to.
"""

import gzip
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"

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


def identity(row: Row, fields: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells a run apart; its seed comes last."""
    return tuple(row.get(name) for name in (*fields, "seed"))


class Store(NamedTuple):
    """Where the rows of a benchmark are.

    Attributes:
      path: the file to append to.
      fields: the names that tell runs apart.
      baselines: the file under `RESULTS` of rows that were published.
    """

    path: Path
    fields: tuple[str, ...]
    baselines: str

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return identity(row, self.fields)

    def rows(self) -> list[Row]:
        """All runs so far, each once: where both files have it, that of `path`."""
        own = read(self.path)
        known = set(map(self._identity, own))
        published = read(RESULTS / self.baselines)
        return [row for row in published if self._identity(row) not in known] + own

    def result(self, job: Job, seed: int) -> list[Row]:
        """The rows of a run, which is run if there are none."""
        key = job.key | {"seed": seed}
        here = [row for row in self.rows() if self._identity(row) == self._identity(key)]
        return here or self._append(key, job)

    def run(self, jobs: Iterable[Job], seeds: Iterable[int], title: str = "") -> None:
        """Runs what is missing and appends it."""
        seeds = list(seeds)
        done = set(map(self._identity, self.rows()))
        for job in tqdm(list(jobs), desc=title):
            for seed in seeds:
                key = job.key | {"seed": seed}
                if self._identity(key) not in done:
                    self._append(key, job)

    def _append(self, key: Row, job: Job) -> list[Row]:
        start = time.perf_counter()
        results = job.execute(key["seed"])
        seconds = {"seconds": round(time.perf_counter() - start, 2)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [key | result | seconds for result in results]
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows


def shard(text: str) -> slice:
    """`i/n`, every n-th from the i-th on, as a slice.

    Raises:
      ValueError: it is not of this form, or not 0 <= i < n.
    """
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError(f"a shard is i/n with 0 <= i < n, got {text}")
    return slice(index, None, count)
