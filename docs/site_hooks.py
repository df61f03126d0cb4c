"""What mkdocs.yml can't say: which files outside docs/ are pages of the site, and where links to the others go.

The README is the first page, and each example's script a page of its own. A page is the file as it stands: only its
links are rewritten. A link to a file that the site doesn't have (a test, a header) becomes text with the path as its
tooltip, because the site knows no address of the repository.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.hooks.site")  # a warning fails mkdocs build --strict
ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "README.zh.md": "index.zh.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "LICENSE": "project/license.md",
    "examples/README.md": "examples/index.md",
}  # path in the repository -> page of the site; docs/ itself keeps its paths
PAGES |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))}
SOURCES = {page: source for source, page in PAGES.items()}

FENCES = re.compile(r"(^```.*?^```[ \t]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=_content(source)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def rewrite(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        known = _page(path, files)
        if known is None:
            if not (ROOT / path).exists():
                LOG.warning("%s links to %s, which the repository hasn't", source, target)
            return f'<span title="{path}">{text}</span>'
        return f"[{text}]({posixpath.relpath(known, posixpath.dirname(here) or '.')}{anchor})"

    parts = FENCES.split(markdown)
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def _content(source: str) -> str:
    text = (ROOT / source).read_text()
    if source.endswith(".md"):
        return text
    name = Path(source).name
    return f"# {name}\n\n```{'python' if name.endswith('.py') else 'text'}\n{text}```\n"


def _page(path: str, files: Any) -> str | None:
    """The site's file for a path of the repository; None if it has none."""
    for candidate in (path, f"{path}/README.md"):
        page = PAGES.get(candidate, candidate.removeprefix("docs/") if candidate.startswith("docs/") else None)
        if page is not None and files.get_file_from_path(page) is not None:
            return str(page)
    return None
