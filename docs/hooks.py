"""For MkDocs: other Markdown becomes pages, links to files lead to pages.

Everywhere, links are written as they lead through the repository, so that
they also work where the files are read without this site. A link to a file
that is no page, such as a script, becomes text.

What GitHub renders by itself is made here: formulas in blocks of `math`,
and boxes such as `> [!WARNING]`. The gallery is run, and what its blocks
print and draw is put behind them.

For mkdocstrings: the sections `Example:` of the docstrings are doctests,
not notes in Markdown.
"""

import contextlib
import io
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/STUDIES.md": "studies.md",
    "benchmarks/PRETRAINED.md": "pretrained.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
GALLERY = "gallery.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
MATH = re.compile(r"^```math\n(.*?)^```", re.DOTALL | re.MULTILINE)
BOX = re.compile(r"^> \[!(\w+)\]\n((?:>.*\n)+)", re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, page in PAGES.items():
        made = File.generated(
            config, page, abs_src_path=str(ROOT / source)
        )
        files.append(made)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Makes of the Markdown of the repository that of the site."""
    if page.file.src_uri == GALLERY:
        markdown = executed(markdown, config, files)
    markdown = MATH.sub(lambda match: formula(match[1]), markdown)
    markdown = BOX.sub(lambda match: box(match[1], match[2]), markdown)
    return LINK.sub(lambda match: moved(match, page), markdown)


def moved(match: re.Match[str], page: Page) -> str:
    """A link through the repository as a link through the site."""
    sources = {made: source for source, made in PAGES.items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    image, text, target, anchor = match.groups()
    path = posixpath.normpath(
        posixpath.join(posixpath.dirname(here), target)
    )
    if not (ROOT / path).exists():
        return match[0]  # for MkDocs to complain of
    if path not in PAGES and not path.startswith("docs/"):
        return text
    path = PAGES.get(path, path.removeprefix("docs/"))
    path = posixpath.relpath(path, posixpath.dirname(page.file.src_uri))
    return f"{image}[{text}]({path}{anchor or ''})"


def formula(latex: str) -> str:
    """LaTeX as MathML, which browsers render without a script."""
    return f'<div class="formula">{convert(latex, display="block")}</div>'


def box(kind: str, quoted: str) -> str:
    """A box of GitHub's as one of Material's."""
    lines = (line.removeprefix(">")[1:] for line in quoted.splitlines())
    return "\n".join(
        [f"!!! {kind.lower()}\n", *(f"    {line}" for line in lines), ""]
    )


def executed(markdown: str, config: MkDocsConfig, files: Files) -> str:
    """The page with what its blocks print, and draw as `figure`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    drawn = 0

    def run(match: re.Match[str]) -> str:
        nonlocal drawn
        names.pop("figure", None)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(match[1], GALLERY, "exec"), names)
        text = match[0]
        if printed.getvalue():
            text += f"\n```text\n{printed.getvalue()}```\n"
        if "figure" in names:
            drawn += 1
            name, image = f"gallery-{drawn}.png", io.BytesIO()
            names["figure"].savefig(image, dpi=120)
            made = File.generated(config, name, content=image.getvalue())
            files.append(made)
            text += f"\n![What the block above draws]({name})\n"
        return text

    return PYTHON.sub(run, markdown)


class Examples(griffe.Extension):
    """Griffe knows doctests under `Examples:` alone."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Called for each object that has been read."""
        del unused
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", value, flags=re.MULTILINE
            )
