"""The documentation site is built without a warning, and its links lead somewhere."""

import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.packaging.conftest import run

FETCHED = {("link", "href"), ("script", "src"), ("img", "src")}  # what a browser loads with the page


class Page(HTMLParser):
    """The anchors of a page, and where its links lead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value is not None:
                self.links.append(value)
                if (tag, name) in FETCHED:
                    self.loaded.append(value)


def test_the_site_is_built_strictly_and_its_links_lead_somewhere(root: Path, tmp_path: Path) -> None:
    """One test, since it takes one build: strict, every link and anchor, and nothing loaded from elsewhere."""
    # not --quiet, which hides warnings from --strict
    mkdocs = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    run(*mkdocs, cwd=root, NO_MKDOCS_2_WARNING="1")
    pages = {path: Page(path) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    assert {tmp_path / name for name in ("index.html", "CHANGELOG.html", "docs/api/trainers.html")} <= set(pages)
    broken, elsewhere = [], []
    for path, page in pages.items():
        elsewhere += [(path.name, link) for link in page.loaded if urlsplit(link).netloc]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append((path.relative_to(tmp_path).as_posix(), link))
    assert not broken
    assert not elsewhere, f"these would not load offline: {elsewhere}"
