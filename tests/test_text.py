"""Text that others wrote: it comes out whole, and does nothing."""

import re
from html.parser import HTMLParser

import pytest

from geffect.text import in_html, in_markdown, lines, plain

HOSTILE = [
    "[/foo]", "[red]", "\x1b[31mred\x1b[0m", "\x9b31m", "$x^$", r"\frac{", "&amp;", "\x00",
    "<script>alert(1)</script>", '" onload="x', "\u202eevil", "\u2066a\u2069", "a\nb", "a|b",
    "a\r\x1b[2Kb", "x" * 5000, "👩\u200d💻🇩🇪", "語言", "שלום", "\udcff", "`a`", "*a*_b_", "%s",
    "[a](javascript:b)", "{{ 7 }}", "{% x %}", "\u2028", "\ufeff", "\u200b", "\U000e0041",
]  # fmt: skip


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
