"""The site builds without a warning, shows every public name, loads nothing from elsewhere, and links to each page.

tests/test_codebase.py and tests/test_pages.py run the code of its pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from docstrings import NAMESPACES, public

ROOT = Path(__file__).parent.parent


class Tags(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if name := given.get("id"):
            self.ids.add(name)
        if tag == "a" and (target := given.get("href")):
            self.links.append(target)
        if tag in ("script", "img", "iframe") and (target := given.get("src")):
            self.loads.append(target)
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon") and (target := given.get("href")):
            self.loads.append(target)


@pytest.fixture(scope="module")
def site(need, tmp_path_factory) -> dict[str, Tags]:
    """The pages of the site by path. Building it takes 10 s."""
    need("mkdocs")
    need("mkdocstrings")
    need("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder, "-f", ROOT / "mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme's
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = {path.relative_to(folder).as_posix(): Tags(path.read_text()) for path in folder.rglob("*.html")}
    shutil.rmtree(folder)
    return pages


def test_every_public_name_is_there(site):
    ids = set().union(*(page.ids for path, page in site.items() if path.startswith("reference/")))
    wanted = {f"{space}.{name}" for space in NAMESPACES for name in public(space)}
    assert len(wanted) >= 87
    assert wanted - ids == set()


def test_links_lead_to_pages_and_places(site):
    broken = []
    for path, page in site.items():
        for link in page.links:
            url = urlparse(link)
            if url.scheme or path == "404.html":
                continue
            target, place = urldefrag(unquote(link))
            other = (_flat(f"{path.rpartition('/')[0]}/{target}") or "index.html") if target else path
            if other.endswith(".html") and (other not in site or (place and place not in site[other].ids)):
                broken.append((path, link))
    assert broken == []


def _flat(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def test_nothing_is_loaded_from_elsewhere(site):
    loads = {target for page in site.values() for target in page.loads}
    assert loads
    assert {target for target in loads if urlparse(target).netloc} == set()


def test_every_page_is_reached(site):
    seen, waiting = set(), ["index.html"]
    while waiting:
        path = waiting.pop()
        if path in seen or path not in site:
            continue
        seen.add(path)
        folder = path.rpartition("/")[0]
        for link in site[path].links:
            if not urlparse(link).scheme:
                waiting.append(_flat(f"{folder}/{urldefrag(unquote(link))[0]}") or "index.html")
    assert set(site) - seen == {"404.html"}
