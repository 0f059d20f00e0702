"""The site of the project: built in a fork, and read as a browser would."""

import importlib.util
import io
import runpy
from contextlib import redirect_stderr, redirect_stdout
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).parents[2] / "docs" / "site"


def built(out: Path, notebooks: Path) -> tuple[int, str]:
    """Build it of notebooks that have their outputs already: the exit code, and what was said."""
    build = runpy.run_path(str(SOURCE / "build.py"))["build"]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        code = build(out, ["-D", "nb_execution_mode=off"], notebooks=notebooks)
    return code, said.getvalue()


def extension(name: str) -> ModuleType:
    """A module that Sphinx is extended by."""
    spec = importlib.util.spec_from_file_location(name, SOURCE / "extensions" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """A page: its anchors, what it links to, and what a browser fetches to show it."""

    FETCHED = ("src", "srcset", "poster", "data", "action", "background")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.pictures: list[str] = []
        self.styles = ""
        self._in_style = False
        self.feed(self.text)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.anchors |= {told[name] for name in ("id", "name") if name in told}
        self.fetched += [told[name] for name in self.FETCHED if name in told]
        self.styles += told.get("style", "")
        self._in_style = tag == "style"
        if tag == "img":
            self.pictures.append(told["src"])
        if tag == "link":
            self.fetched.append(told["href"])
        elif "href" in told:
            self.links.append(told["href"])

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles += data
