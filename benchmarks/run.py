"""Every exhibit of the paper, or its stand-in on free data, from one command.

Each exhibit is a module of the rooms beside this file. All of them keep their runs as JSON lines
and go on where they were stopped, and so does this. `smoke` does a few steps of each, `paper`
takes hours (the minutes of each exhibit, and the sizes that are scaled down, are in `EXHIBITS`),
`full` has the sizes of the paper where they differ.

    pip install -e '.[bench]'
    python -m benchmarks.run --suite smoke
    python -m benchmarks.run --suite paper --data-dir GLUE --e2e-dir E2E
    python -m benchmarks.run --suite paper --report     # tables and figures of what has run
    python -m benchmarks.run --suite paper --publish    # the same into OUT/TABLES.md and docs
"""

import argparse
import collections
import concurrent.futures
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

SUITES = ("smoke", "paper", "full")
HERE = Path(__file__).parent
_ONE_CORE = {
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}


class Exhibit(NamedTuple):
    """A part of the paper, and the module that shows it.

    Attributes:
      shows: the figures and tables of the paper.
      module: what Python is told to run, in `benchmarks`.
      out: how the name of its rows, figure or folder ends, which `--out` is told.
      minutes: of the suite that takes hours, on one core.
      smoke: further arguments of a few steps. None: not in this suite.
      paper: of the suite that takes hours.
      full: of the paper's own sizes.
      report: of what makes tables and figures from the rows, where `{out}` is the folder and the
        name; None where the run itself does.
      figures: those that are published, file under the folder of results -> file under docs.
    """

    shows: str
    module: str
    out: str
    minutes: float
    smoke: str | None = "--quick"
    paper: str | None = ""
    full: str | None = "--full"
    report: str | None = None
    figures: Mapping[str, str] = types.MappingProxyType({})

    def arguments(self, suite: str) -> str | None:
        """Of a suite, or of its report; None where it has no part of it."""
        more = {"smoke": self.smoke, "paper": self.paper, "full": self.full, "report": self.report}
        return None if more[suite] is None else f"--out {{out}}{self.out} {more[suite]}"


_DRAWN = "--report --figure {out}.png"
EXHIBITS: dict[str, Exhibit] = {
    "quadratic": Exhibit(
        "Figure 1",
        "paper.quadratic_fit",
        ".jsonl",
        1,
        report=_DRAWN,
        figures={"quadratic.png": "quadratic-fit.png"},
    ),
    "toys": Exhibit(
        "Figure 2", "paper.toys", ".png", 1, smoke="", full="", figures={"toys.png": "toys.png"}
    ),
    "multitask": Exhibit(
        "Figures 3 and 4",
        "paper.multitask",
        "",
        20,
        paper="--seeds 3",
        full="--seeds 5 --steps 1000",
        figures={"multitask/yeast/influence-Hi-DLR.png": "yeast-influence.png"},
    ),
    "nam": Exhibit(
        "Figures 5, 11 and 12",
        "paper.nam",
        ".jsonl",
        40,
        report=_DRAWN,
        figures={"nam.png": "nam.png"},
    ),
    "lora_toy": Exhibit(
        "Figure 13",
        "paper.lora_toy",
        ".jsonl",
        10,
        report=_DRAWN,
        figures={"lora_toy.png": "lora-toy.png"},
    ),
    "wall_clock": Exhibit(
        "Figure 14",
        "cost.overhead",
        ".json",
        8,
        paper="--problems transformer --groups 1 3 --rules hidlr 'first version, one at a time'",
        full="",
    ),
    "fine_tuning": Exhibit(
        "Tables 1 and 2, frozen lower layers",
        "finetune.frozen",
        ".jsonl",
        30,
        smoke=None,
        paper="--seeds 3 --methods 'hidlr, cosine' {data}",
        full="--seeds 5 {data}",
        report="--report {data}",
    ),
    "vision": Exhibit(
        "Table 1, DINOv2 as a whole", "finetune.vision", "", 120, paper=None, full="--seeds 3"
    ),
    "text": Exhibit(
        "Table 2, MiniLM by LoRA", "finetune.text", "", 120, paper=None, full="--seeds 3 {glue}"
    ),
    "influence": Exhibit(
        "Figures 6 and 7, Tables 3 and 4",
        "paper.influence",
        "",
        105,
        paper="--steps 60 {e2e}",
        full="{e2e}",
        figures={
            "influence/influence-MiniLM-snippets.png": "peft-influence.png",
            "influence/influence-GPT-E2E.png": "peft-influence-gpt.png",
            "influence/pareto-MiniLM-snippets.png": "peft-pareto.png",
        },
    ),
    "rivals": Exhibit(
        "rivals, schedules and performance profile",
        "rule.robustness",
        ".jsonl",
        60,
        smoke="--suite smoke --figure {out}.png",
        paper="--suite paper",
        full="",
        report="--report --details --figure {out}.png",
        figures={"rivals.png": "robustness.png"},
    ),
    "units": Exhibit(
        "groups with different units",
        "units",
        ".jsonl",
        40,
        smoke="predator_prey --methods hidlr --seeds 1",
        full="",
    ),
    "scripts": Exhibit(
        "public training scripts",
        "scripts.compare",
        ".jsonl",
        30,
        smoke="--quick --scripts pinn",
        paper=None,
        full="--seeds 3",
    ),
}


class Paths(NamedTuple):
    """Where data are and results go."""

    out: Path
    data_dir: Path | None
    e2e_dir: Path | None
    fashion_dir: Path | None

    def tables(self, name: str) -> Path:
        """What an exhibit has printed."""
        return self.out / f"{name}.md"

    def log(self, name: str) -> Path:
        """Its errors, and those of the runs before."""
        return self.out / f"{name}.log"

    def options(self) -> dict[str, str]:
        """What stands for the data in the arguments."""
        given = {
            "--data-dir": self.data_dir,
            "--e2e-dir": self.e2e_dir,
            "--fashion-dir": self.fashion_dir,
        }
        known = {
            name: f"{name} {shlex.quote(str(path.resolve()))}"
            for name, path in given.items()
            if path
        }
        return {
            "data": " ".join(known.values()),
            "glue": known.get("--data-dir", ""),
            "e2e": known.get("--e2e-dir", ""),
        }


class Outcome(NamedTuple):
    """How a run ended: its exhibit, the exit status, and its minutes."""

    name: str
    status: int
    minutes: float


def command(name: str, arguments: str, paths: Paths) -> list[str]:
    """What runs the module of an exhibit."""
    out = shlex.quote(str(paths.out.resolve() / name))
    filled = arguments.format(out=out, **paths.options())
    module = f"benchmarks.{EXHIBITS[name].module}"
    return [sys.executable, "-m", module, *shlex.split(filled)]


def execute(words: list[str], name: str, paths: Paths) -> int:
    """Runs a command on one core, its tables in one file and errors in another; the status."""
    with paths.tables(name).open("w") as tables, paths.log(name).open("a") as log:
        environment = os.environ | _ONE_CORE
        return subprocess.run(
            words, stdout=tables, stderr=log, env=environment, cwd=HERE.parent, check=False
        ).returncode


def report(name: str, paths: Paths) -> int:
    """Tables and figures of an exhibit's rows, where the run has not made them; the exit status."""
    arguments = EXHIBITS[name].arguments("report")
    if arguments is None:
        return 0
    return execute(command(name, arguments, paths), name, paths)


def run(name: str, suite: str, paths: Paths) -> Outcome:
    """One exhibit, unless the same command has ended well before, and then its report."""
    arguments, start = EXHIBITS[name].arguments(suite), time.monotonic()
    assert arguments is not None
    words = command(name, arguments, paths)
    mark, status = paths.out / f"{name}.done", 0
    if not (mark.exists() and mark.read_text() == " ".join(words)):
        status = execute(words, name, paths)
        if status == 0:
            mark.write_text(" ".join(words))
    status = status or report(name, paths)
    minutes = (time.monotonic() - start) / 60
    with (paths.out / "minutes.jsonl").open("a") as file:
        file.write(json.dumps({"name": name, "minutes": round(minutes, 2)}) + "\n")
    return Outcome(name, status, minutes)


def chosen_by(suite: str, names: list[str], paths: Paths) -> list[str]:
    """The exhibits that can be run, the longest first."""
    asked = [name for name in EXHIBITS if not names or name in names]
    wanted = [name for name in asked if EXHIBITS[name].arguments(suite) is not None]
    needs_data = [] if suite == "smoke" or paths.data_dir else ["fine_tuning"]
    left_out = [name for name in wanted if name in needs_data]
    if left_out:
        print(f"Without --data-dir, a folder in GLUE's layout: left out {', '.join(left_out)}")
    usable = [name for name in wanted if name not in left_out]
    return sorted(usable, key=lambda name: -EXHIBITS[name].minutes)


def publish(suite: str, names: list[str], paths: Paths, page: Path, docs: Path) -> None:
    """Writes the tables of a suite into a page, and its figures into the documentation."""
    where = str(paths.out.resolve())
    minutes: dict[str, float] = collections.defaultdict(float)
    for line in (paths.out / "minutes.jsonl").read_text().splitlines():
        run = json.loads(line)
        minutes[run["name"]] += run["minutes"]
    hours = sum(minutes[name] for name in names) / 60
    made = f"Made by `python -m benchmarks.run --suite {suite} --publish`: {hours:.1f} hours of one"
    made += (
        f" core, jax {version('jax')}, optax {version('optax')}, the rule as it is in this tree."
    )
    parts = ["# Tables", made]
    for name in sorted(names, key=list(EXHIBITS).index):
        exhibit = EXHIBITS[name]
        shown = [line for line in paths.tables(name).read_text().splitlines() if where not in line]
        arguments = (exhibit.arguments(suite) or "").format(out=name, data="…", glue="…", e2e="…")
        head = f"## {name}: {exhibit.shows}"
        how = f"`python -m benchmarks.{exhibit.module} {arguments}`, {minutes[name]:.0f} minutes."
        parts.append("\n\n".join([head, how, "\n".join(shown).strip()]))
        for file, published in exhibit.figures.items():
            shutil.copy(paths.out / file, docs / published)
    page.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="paper")
    parser.add_argument("--exhibits", nargs="*", default=[], choices=EXHIBITS, help="these alone")
    parser.add_argument("--out", type=Path, default=Path("exhibits"), help="a folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="one core each")
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="run nothing, write TABLES.md and the figures of docs",
    )
    parser.add_argument("--data-dir", type=Path, help="a folder in GLUE's layout")
    parser.add_argument("--e2e-dir", type=Path, help="with devset.csv and testset_w_refs.csv")
    parser.add_argument("--fashion-dir", type=Path, help="with Fashion-MNIST's four files")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {args.jobs}")
    paths = Paths(args.out, args.data_dir, args.e2e_dir, args.fashion_dir)
    paths.out.mkdir(parents=True, exist_ok=True)
    names = chosen_by(args.suite, args.exhibits, paths)
    if args.report:
        for name in names:
            report(name, paths)
            print(f"{EXHIBITS[name].shows}: {paths.out / name}.*")
        return
    if args.publish:
        publish(args.suite, names, paths, paths.out / "TABLES.md", HERE.parent / "docs")
        return
    minutes = sum(EXHIBITS[name].minutes for name in names)
    if args.suite == "paper":
        print(f"{len(names)} exhibits, about {minutes / 60:.1f} hours of one core")
    failed = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, name, args.suite, paths) for name in names]
        done = concurrent.futures.as_completed(jobs)
        for job in tqdm(done, "exhibits", len(jobs), disable=None):
            outcome = job.result()
            tqdm.write(f"{outcome.name}: {outcome.minutes:.1f} minutes, status {outcome.status}")
            if outcome.status:
                failed.append(outcome.name)
    for name in failed:
        log = paths.log(name)
        print(
            f"\n{name} failed; the end of {log}:\n", *log.read_text().splitlines()[-15:], sep="\n"
        )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
