"""What all pages share, in a browser: they fit on a phone, and paper loses no column of a table."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geffect.pages import framed
from geffect.plots import spans
from tests.utils.browser import Browser, words_of
from tests.utils.pages import Page

HEADS = [f"heading {number}" for number in range(20)]
ROWS = 90
FOREIGN = "name_without_any_blank_" * 12

FITS = """
for (const one of document.querySelectorAll("details")) one.open = true;
return [document.documentElement.scrollWidth, innerWidth];
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a table of many columns and rows, which is folded, and a long name."""
    head = "".join(f"<th>{heading}</th>" for heading in HEADS)
    rows = "".join(
        f"<tr><td>{FOREIGN if row == 3 else f'row {row}'}</td>"
        + "".join(f"<td>{row}.{column:03}</td>" for column in range(1, len(HEADS)))
        + "</tr>"
        for row in range(ROWS)
    )
    body = (
        f"<h2>A table</h2><p>{FOREIGN}</p><details><summary>All</summary>"
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details><h2>The end</h2>"
    )
    path = tmp_path_factory.mktemp("wide") / "page.html"
    path.write_text(framed("wide", "<h1>A page</h1>", body), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_stands_on_no_box_and_breaks_no_number_of_its_scale(
    chromium: Browser, tmp_path: Path, dark: bool
) -> None:
    said = {"sample": 0, "position": [0, 1], "token": [" a", " b"], "value": [-300.0, 150.0]}
    tokens = spans(pd.DataFrame(said).assign(score="PG-effect", unit="nats", scale="symlog"))
    picture = '<svg viewBox="0 0 600 300" width="600pt"><rect width="600" height="300"/></svg>'
    body = f"<h2>One</h2><figure>{picture}</figure><h2>Two</h2>{tokens}"
    path = tmp_path / "page.html"
    path.write_text(framed("pictures", "<h1>Pictures</h1>", body), encoding="utf-8")
    chromium.open(path, width=390, dark=dark)
    filtered, paper, lines = chromium.run(
        """
        const svg = document.querySelector("figure svg");
        const numbers = [...document.querySelectorAll(".tokens div div span")];
        return [getComputedStyle(svg).filter,
                getComputedStyle(document.body).backgroundColor,
                numbers.map(one => [one.textContent, one.offsetHeight])];
        """
    )
    inverted = re.match(r"invert\(([\d.]+)\)", filtered)
    white = round(255 * (1 - float(inverted[1]))) if inverted else 255
    assert paper == f"rgb({white}, {white}, {white})"
    assert "100" in [said for said, _ in lines] and len({tall for _, tall in lines}) == 1


@pytest.mark.parametrize(("wide_by", "shown"), [(200, 200 * 96 / 72), (600, 480)])
def test_on_a_phone_a_picture_scrolls_where_its_text_would_be_too_small(
    chromium: Browser, tmp_path: Path, wide_by: int, shown: float
) -> None:
    picture = f'<svg viewBox="0 0 {wide_by} 300" width="{wide_by}pt"></svg>'
    says = f"<figcaption>{'It is a picture. ' * 20}</figcaption>"
    path = tmp_path / "page.html"
    body = f"<h2>One</h2><figure>{picture}{says}</figure>"
    path.write_text(framed("pictures", "<h1>Pictures</h1>", body), encoding="utf-8")
    chromium.open(path, width=390)
    page, picture_wide, before, after = chromium.run(
        """
        const caption = document.querySelector("figcaption");
        const right = () => caption.getBoundingClientRect().right;
        const before = right();
        document.querySelector("figure").scrollLeft = 50;
        const wide = document.querySelector("figure svg").getBoundingClientRect().width;
        return [document.documentElement.scrollWidth, wide, before, right()];
        """
    )
    assert page == 390 and picture_wide == pytest.approx(shown, abs=1)
    assert before == after <= 390


@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_a_wide_table_scrolls_and_the_page_does_not(
    chromium: Browser, wide: Path, width: int
) -> None:
    chromium.open(wide, width=width)
    found, room = chromium.run(FITS)
    assert found <= room == width
    assert chromium.console() == [] and chromium.requests() == [wide.as_uri()]


def test_paper_holds_every_column_and_each_page_its_headings(chromium: Browser, wide: Path) -> None:
    chromium.open(wide)
    pages = words_of(chromium.printed())
    whole = "".join(pages)
    for row in range(ROWS):
        assert all(f"{row}.{column:03}" in whole for column in range(1, len(HEADS))), row
    assert FOREIGN in whole
    of_table = [page for page in pages if "row" in page]
    assert len(of_table) > 1
    for page in of_table:
        assert all(heading.replace(" ", "") in page for heading in HEADS)


def test_what_was_folded_is_folded_again_behind_the_printer(chromium: Browser, wide: Path) -> None:
    chromium.open(wide)
    chromium.printed()
    assert chromium.run("return document.querySelector('details').open") is False


def test_without_scripts_all_is_there(chromium: Browser, wide: Path, tmp_path: Path) -> None:
    text = re.sub(r"<script>.*?</script>", "", wide.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "plain.html").write_text(text, encoding="utf-8")
    chromium.open(tmp_path / "plain.html")
    assert "89.019" in "".join(words_of(chromium.printed()))


def test_the_page_of_a_study_fits_and_is_printed_whole(chromium: Browser, quick_study: Any) -> None:
    path = quick_study.out / "report.html"
    for width in (390, 1400):
        chromium.open(path, width=width, dark=True)
        found, room = chromium.run(FITS)
        assert found <= room == width
        assert chromium.console() == [] and chromium.requests() == [path.as_uri()]
    printed = "".join(words_of(chromium.printed()))
    for table in Page(path.read_text(encoding="utf-8")).tables:
        for cell in (cell for row in table for cell in row):
            assert re.sub(r"\s+", "", cell) in printed, cell


@pytest.mark.parametrize("dark", [False, True])
def test_a_table_that_goes_on_behind_an_edge_has_a_shadow_there(
    chromium: Browser, wide: Path, dark: bool
) -> None:
    def shadows(scrolled: int, columns: int = len(HEADS)) -> tuple[bool, bool]:
        """Whether the left and the right edge are of another colour than the paper."""
        chromium.open(wide, width=390, dark=dark)
        left, top, right = chromium.run(
            """
            document.querySelector("details").open = true;
            const table = document.querySelector(".wide");
            for (const row of table.querySelectorAll("tr"))
                while (row.cells.length > args[1]) row.deleteCell(-1);
            table.scrollLeft = args[0];
            await new Promise(requestAnimationFrame);
            const box = table.getBoundingClientRect();
            return [box.left, box.top + scrollY, box.right];
            """,
            scrolled,
            columns,
        )
        shown = chromium.pixels(left, top + 2, right - left, 2).astype(int)
        paper = chromium.pixels(1, 1, 1, 1)[0, 0]
        return tuple(bool(np.abs(shown[0, x] - paper).max() > 8) for x in (0, -1))

    assert [shadows(0), shadows(300), shadows(9999)] == [(False, True), (True, True), (True, False)]
    assert shadows(0, columns=1) == (False, False)
