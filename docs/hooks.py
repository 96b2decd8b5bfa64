"""For MkDocs: Markdown outside of `docs/` becomes pages, and links to files become links to pages.

Everywhere, links are written as they lead through the repository, so that they also work where the
files are read without this site. A link to a file that is no page, such as a script, becomes text.

For mkdocstrings: the sections `Example:` of the docstrings are doctests, not notes in Markdown.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
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
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links through the repository into links through the site."""
    del config, files
    sources = {made: source for source, made in PAGES.items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / path).exists():
            return match[0]  # for MkDocs to complain of
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor or ''})"
        if path.startswith("docs/"):
            return f"{image}[{text}]({path.removeprefix('docs/')}{anchor or ''})"
        return text

    return LINK.sub(moved, markdown)


class Examples(griffe.Extension):
    """Griffe knows doctests under `Examples:` alone."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Called for each object that has been read."""
        del unused
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)
