"""Pages in a browser: charts show the values of tables, links lead, all of it is printed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from geffect import open_run
from geffect.analysis import g_effect
from geffect.report import runs_report
from tests.utils.browser import Browser, words_of
from tests.utils.many_runs import random_run
from tests.utils.pages import Page

# Unfolds a chart, which is drawn when it comes into view; gives its place on the screen.
FIND = """
const [title, nth] = args;
const found = [...document.querySelectorAll(".chart")].filter(
  (chart) => JSON.parse(chart.querySelector("script").textContent).title === title)[nth];
for (let at = found; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
found.scrollIntoView({ block: "center" });
for (let i = 0; i < 200 && !found.querySelector(".u-over"); i += 1) {
  await new Promise((r) => setTimeout(r, 20));
}
window.chart = found;
const box = found.querySelector(".u-over").getBoundingClientRect();
return [box.left, box.top, box.width, box.height];
"""
TIP = """
await new Promise((r) => setTimeout(r, 60));
const tip = window.chart.querySelector(".tip");
return tip.hidden ? null : [...tip.children].map((line) => line.textContent);
"""


@dataclass(frozen=True)
class Chart:
    """A chart on the screen, whose places are shares of its panel."""

    browser: Browser
    box: Sequence[float]

    @classmethod
    def of(cls, browser: Browser, title: str, nth: int = 0) -> "Chart":
        return cls(browser, browser.run(FIND, title, nth))

    def mouse(self, *kinds: str, at: tuple[float, float]) -> None:
        left, top, wide, tall = self.box
        self.browser.mouse(*kinds, x=left + at[0] * wide, y=top + at[1] * tall)

    def told(self, at: tuple[float, float]) -> list[str]:
        """What stands beside the pointer."""
        self.mouse("moved", at=at)
        shown: list[str] = self.browser.run(TIP)
        return shown


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    plain = open_run(random_run(folder / "plain.h5", 12))
    gru = open_run(random_run(folder / "gru.h5", 9, rectified=True))
    (folder / "page.html").write_text(runs_report([plain, gru]), encoding="utf-8")
    return folder / "page.html"


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_a_page_opens_without_error_or_request_and_fits(
    chromium: Browser, report: Path, width: int, dark: bool
) -> None:
    chromium.open(report, width=width, dark=dark)
    wide, drawn, paper = chromium.run("""
      for (const one of document.querySelectorAll("details")) one.open = true;
      for (const one of document.querySelectorAll(".chart")) {
        one.scrollIntoView();
        for (let turn = 0; turn < 200 && !one.classList.contains("drawn"); turn++) {
          await new Promise((r) => setTimeout(r, 20));
        }
      }
      return [document.documentElement.scrollWidth,
              document.querySelectorAll(".chart:not(.drawn)").length,
              getComputedStyle(document.body).backgroundColor];
    """)
    assert wide <= width and drawn == 0
    assert (max(map(int, re.findall(r"\d+", paper))) < 60) == dark
    assert chromium.console() == []
    assert chromium.requests() == [report.as_uri()]


@pytest.mark.parametrize(("step", "row"), [(0, 0), (5, 1), (11, 2)])
def test_a_map_shows_the_value_of_the_table(
    chromium: Browser, report: Path, step: int, row: int
) -> None:
    table = g_effect(open_run(report.with_name("plain.h5")), "layer")
    own = table[(table["effect"] == "retaining") & (table["step"] == step)]
    chromium.open(report)
    chart = Chart.of(chromium, "retaining: G-effect (nats per unit learning rate)")
    words, value = chart.told(((step + 0.5) / 12, (row + 0.5) / 3))
    assert words == f"step {step}, layer {row}"
    assert float(value) == float(f"{own['value'].iloc[row]:.4g}")


def test_an_overlay_shows_the_values_of_all_runs(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    chart = Chart.of(chromium, "retain risk (nats)")
    assert chart.told((8 / 11, 0.5)) == ["step 8", "plain: 0.18", "gru: 0.18"]
    assert chart.told((0.99, 0.5)) == ["step 11", "plain: 0.21"]


def test_a_chart_zooms_and_back(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    chart = Chart.of(chromium, "forget risk (nats)")
    assert chart.told((0.98, 0.5))[0] == "step 11"
    chart.mouse("moved", "pressed", at=(0.1, 0.5))
    chart.mouse("moved", at=(0.3, 0.5))
    chart.mouse("moved", "released", at=(0.5, 0.5))
    assert chart.told((0.98, 0.5))[0] == "step 5"
    chart.mouse("moved", "pressed", "released", at=(0.5, 0.5))
    chromium.run("window.chart.querySelector('.u-over').dispatchEvent(new MouseEvent('dblclick'))")
    assert chart.told((0.98, 0.5))[0] == "step 11"


def test_links_lead_to_what_they_name(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    links = Page(report.read_text(encoding="utf-8")).links
    hidden = chromium.run(
        """
        const lost = [];
        for (const link of args[0]) {
          for (const one of document.querySelectorAll("details")) one.open = false;
          location.hash = "";
          location.hash = link;
          await new Promise((r) => setTimeout(r, 40));
          const box = document.getElementById(link.slice(1)).getBoundingClientRect();
          if (!box.height || box.top > innerHeight || box.bottom < 0) lost.push(link);
        }
        return lost;
        """,
        sorted(set(links)),
    )
    assert hidden == []


SORT = """
const table = document.querySelector("table.sortable");
const heads = [...table.tHead.rows[0].cells];
const at = heads.findIndex((head) => head.textContent === args[0]);
const seen = [];
for (let i = 0; i < 2; i += 1) {
  heads[at].querySelector("button").click();
  seen.push([...table.tBodies[0].rows].map((row) => row.cells[at].textContent));
  seen.push(heads[at].getAttribute("aria-sort"));
}
return seen;
"""


def test_a_heading_sorts_its_table(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    sorted_by = partial(chromium.run, SORT)
    assert sorted_by("steps") == [["9", "12"], "ascending", ["12", "9"], "descending"]
    up, _, down, _ = sorted_by("violation rate")
    assert up[-1] == down[-1] == "undefined"
    up, _, down, _ = sorted_by("retaining, last")
    assert [float(v) for v in up] == sorted(float(v) for v in up) and down == up[::-1]


def test_paper_holds_all_that_the_page_says(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    pdf = "".join(words_of(chromium.printed()))
    page = Page(report.read_text(encoding="utf-8"))
    for table in page.tables:
        for cell in (cell for row in table for cell in row):
            assert re.sub(r"\s+", "", cell) in pdf, cell
    for word in ("layer 2", "Findings", "Provenance", "What the numbers mean"):
        assert word.replace(" ", "") in pdf
    assert "dragoverit" in re.sub(r"\s+", "", report.read_text(encoding="utf-8"))
    assert "dragoverit" not in pdf
