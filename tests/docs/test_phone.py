"""The site on a phone: nothing sticks out of it but what moves, and no number is in two lines."""

from typing import Any

import pytest

from tests.utils.browser import browser

WIDTH = 390  # pixels

# A table of many columns moves.
STICKS_OUT = """
const narrow = ".pst-scrollable-table-container:not(:has(tr > :nth-child(4)))";
return [...document.querySelectorAll(`.bd-article :is(h1, h2, p, li, td), ${narrow}`)]
  .filter((e) => e.scrollWidth > e.clientWidth + 1)
  .map((e) => e.textContent.trim().slice(0, 80));
"""
LINES = """
return [...document.querySelectorAll("td.text-right")].map((cell) => {
  const inside = document.createRange();
  inside.selectNodeContents(cell.querySelector("p") ?? cell);
  return [cell.textContent, new Set([...inside.getClientRects()].map((r) => r.top)).size];
});
"""


@pytest.mark.parametrize(
    "page", ["api/geffect.projection", "api/types", "docs/from_cockpit", "docs/hiding"]
)
def test_names_and_commands_break_where_the_screen_ends(site: Any, page: str) -> None:
    with browser() as seen:
        seen.open(site.pages / f"{page}.html", width=WIDTH)
        assert seen.run("return document.documentElement.scrollWidth") == WIDTH
        assert seen.run(STICKS_OUT) == []


def test_numbers_stand_in_one_line(site: Any) -> None:
    with browser() as seen:
        seen.open(site.pages / "docs" / "costs.html", width=WIDTH)
        lines = seen.run(LINES)
    assert [text for text, _ in lines if "e-" in text]
    assert {count for text, count in lines if text.strip()} == {1}
