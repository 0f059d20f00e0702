"""What a page holds, read without a browser."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

LIBRARY = (files("geffect.pages") / "templates" / "uplot.min.js").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page, its words, and the data of its charts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []  # their types
        self.charts: list[dict[str, Any]] = []
        self.words = ""
        self._inside: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        assert "src" not in told or told["src"].startswith("data:")
        self.tags.add(tag)
        self.attributes |= told.keys()
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told["href"]] if tag == "a" else []
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append(told.get("type", ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._inside:
            if self.scripts[-1] == "application/json":
                self.charts.append(json.loads(data))
        elif "style" not in self._inside:
            self.words += data
            if "td" in self._inside or "th" in self._inside:
                self.tables[-1][-1][-1] += data


def assert_self_contained(text: str) -> None:
    """Nothing is fetched, from the net or from beside the page, and every link has its target."""
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids))
    assert [link for link in page.links if link[0] != "#" or link[1:] not in page.ids] == []
    assert text.count(LIBRARY) == (1 if page.charts else 0)
    own = text.replace(LIBRARY, "")
    assert not re.search(r"https?://|@import|<script [^>]*src|<link", own)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", own)
    assert not re.search(r"url\((?!data:|#)", own)
