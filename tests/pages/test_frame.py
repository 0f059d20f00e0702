"""The frame of pages: anchors, contents, and what is written into it."""

import hashlib

import pytest

from geffect.pages.frame import framed, with_contents, word
from tests.utils.hostile import HOSTILE
from tests.utils.pages import LIBRARY, Page


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        ("<h2>A</h2><h2>A</h2><h3>A</h3>", ["a", "a-2", "a-3"]),
        ('<h2 id="a">B</h2><h2>A</h2>', ["a", "a-2"]),
        ("<h2>&lt;b&gt; 語</h2>", ["lt-b-gt"]),
        ('<p id="a">x</p><h2>A</h2>', ["a", "a-2"]),
        ("<h2>語</h2><h2> </h2>", ["section", "section-2"]),
    ],
)
def test_every_heading_is_an_anchor_of_its_own(body: str, ids: list[str]) -> None:
    page = Page(str(with_contents(body)))
    assert page.ids == ids
    assert [link[1:] for link in page.links if link[1:] not in ids] == []
    assert len(page.links) == body.count("<h2")


def test_a_page_without_sections_has_no_contents() -> None:
    assert with_contents("<p>a</p>") == "<p>a</p>"


def test_a_word_leads_to_its_definition() -> None:
    assert 'href="#word-implicit-weight"' in word("implicit weight")
    assert "<b>" not in word("<b>", "cosine")


@pytest.mark.parametrize("name", HOSTILE[:12], ids=ascii)
def test_headings_of_others_are_text(name: str) -> None:
    from geffect.text import in_html

    page = Page(str(with_contents(f"<h2>{in_html(name)}</h2>")))
    assert page.tags == {"nav", "ul", "li", "a", "h2"} and len(page.ids) == 1


def test_the_library_is_the_one_that_its_authors_gave_out() -> None:
    assert LIBRARY.startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
    digest = hashlib.sha256(LIBRARY.encode()).hexdigest()
    assert digest == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"


def test_a_number_stands_on_the_line_of_its_per_cent() -> None:
    text = framed(
        "a", "<h1>3 % of b</h1>", '<p title="4 %">5 % and <b>6</b></p>', style="i{}/*7 %*/"
    )
    assert "3\u00a0% of b" in text and "5\u00a0% and" in text
    assert 'title="4 %"' in text and "7 %" in text  # no text of the page
