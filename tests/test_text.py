"""Text that others wrote: it comes out whole, and does nothing."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from geffect.text import in_html, in_markdown, lines, plain
from tests.utils.hostile import HOSTILE as NAMES

HOSTILE = (*NAMES, "\x00", "\udcff")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_terminal_obeys_nothing_and_shows_all(text: str) -> None:
    said = plain(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", said)
    said.encode()
    visible = "".join(c for c in text if c.isprintable())
    assert [c for c in said if c in visible][: len(visible)] or not visible
    if text.isprintable():
        assert said == text


def test_lines_stay_lines() -> None:
    assert lines("a\n\x1b[2Jb\r\n") == "a\n\\x1b[2Jb\\r\n"


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_html_reads_it_as_text(text: str) -> None:
    page = Page(f'<p title="{in_html(text)}">{in_html(text)}</p>')
    assert page.tags == ["p"] and page.words == plain(text)
    assert page.attributes == [("title", plain(text))]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_cell_of_markdown_is_one_cell(text: str) -> None:
    cell = in_markdown(text)
    assert "\n" not in cell and not re.search(r"(?<!\\)(?:\\\\)*[|<`$&\[*]", cell)
    assert re.sub(r"\\([\\`*_{}\[\]<>|~$#&])", r"\1", cell) == plain(text)


# That nobody writes around them

ROOT = Path(__file__).parents[1]
MODULES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("geffect", "analysis", "plots")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_symlink() and not path.parent.is_symlink()
}


def using(pattern: str, folder: str = "") -> set[str]:
    return {
        name
        for name, text in MODULES.items()
        if name.startswith(folder) and re.search(pattern, text)
    }


def test_html_is_escaped_in_one_place() -> None:
    assert using(r"(?m)^(?:import html|from html import)|html\.escape") == {"geffect/text.py"}
    assert using(r"\bEnvironment\(") == {"geffect/pages/frame.py"}
    assert using(r"\bMarkup\(") == {"geffect/pages/frame.py"}
    assert "finalize=_plain" in MODULES["geffect/pages/frame.py"]
    safe = [
        line
        for page in ROOT.glob("geffect/*/templates/*.jinja")
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"\|\s*safe|autoescape|Markup", line)
    ]
    assert len(safe) == 1 and "{{ text | safe }}" in safe[0], (
        "the spans, which escape by themselves"
    )


def test_a_terminal_is_written_to_in_one_place() -> None:
    assert using(r"\bConsole\(") == set()
    assert using(r"\(Console\)") == {"geffect/cli/terminal.py"}
    assert using(r"\.print\(|sys\.stdout\.write", "geffect/cli") == {"geffect/cli/terminal.py"}
    # The version, and a page of help.
    assert using(r"typer\.s?echo") == {"geffect/cli/main.py", "geffect/cli/command.py"}
    assert using(r"rich\.markup|from_markup|markup=True") == set()


WRITERS = {"set_title", "suptitle", "set_xlabel", "set_ylabel", "set_label", "set_xticks",
           "set_yticks", "set_text"}  # fmt: skip
OWN = ("drawn(", "wrapped(", "unit", "thinned(", "range(", "COSINE.label", "MARKS", "places")


def test_a_picture_is_written_to_through_one_function() -> None:
    """What is no constant of ours is drawn or wrapped."""
    pictures = {name for name in MODULES if name.startswith("plots/")} | {"geffect/cli/plot.py"}
    for name in pictures - {"plots/legends.py", "plots/words.py"}:
        for call in ast.walk(ast.parse(MODULES[name])):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                written = " ".join(map(ast.unparse, call.args))
                assert call.func.attr != "set_text", name
                if call.func.attr in WRITERS and not re.fullmatch(r"'[^']*'", written):
                    assert any(how in written for how in OWN), f"{name}: {ast.unparse(call)}"
    assert using(r"\.legend\(", "plots/") == {"plots/legends.py", "plots/sheet.py"}
