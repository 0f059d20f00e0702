"""Names that a medium would obey, all the way from a run file to what is shown of it."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from geffect import open_run
from geffect.cli.plot import Kind, draw
from geffect.cli.selection import ScoreName, table_of
from geffect.plots.words import drawn
from geffect.text import plain
from tests.utils.command_line import Ask
from tests.utils.hostile import HOSTILE, hostile_run
from tests.utils.pages import Page, assert_self_contained

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("hostile") / "[red] $x^$ <script>\x1b\n.h5")


@pytest.mark.parametrize(
    "told", [["info"], ["validate"], ["scores"], ["scores", "--format", "tsv"]], ids=" ".join
)
def test_a_terminal_shows_every_name_and_obeys_none(
    ask: Ask, hostile: Path, told: list[str]
) -> None:
    said = ask(told[0], hostile, *told[1:])
    assert (said.code, said.err) == (0, "") and not OBEYED.search(said.out)
    if told != ["validate"]:
        assert [name for name in HOSTILE if plain(name) not in said.out] == []


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_an_error_is_one_line(ask: Ask, hostile: Path, name: str) -> None:
    for told in (["info", name], ["scores", hostile, "--score", name],
                 ["scores", hostile, "--score", "cosine", "--between", f"x,{name}"]):  # fmt: skip
        said = ask(*told)
        assert said.code in (1, 2) and said.out == ""
        assert said.err.startswith("geffect: ") and said.err.count("\n") == 1
        assert not OBEYED.search(said.err)


def test_data_keeps_the_names_as_they_are(ask: Ask, hostile: Path) -> None:
    rows = json.loads(ask("scores", hostile, "--format", "json").out)
    assert list(dict.fromkeys(row["layer"] for row in rows)) == [*HOSTILE]
    lines = ask("scores", hostile, "--format", "tsv").out.splitlines()
    assert len(lines) == len(rows) + 1 and {line.count("\t") for line in lines} == {
        len(rows[0]) - 1
    }


def texts(figure: Figure) -> Iterator[Text]:
    figure.draw_without_rendering()
    yield from (text for text in figure.findobj(Text) if isinstance(text, Text))


@pytest.mark.parametrize("kind", [Kind.HEATMAP, Kind.PROFILE, Kind.TRAJECTORY])
def test_a_picture_draws_names_as_they_are(hostile: Path, kind: Kind) -> None:
    score = ScoreName.COSINE
    table = table_of(open_run(hostile), score, None, "$x^$,[red]")
    shown = {text.get_text() for text in texts(draw(table, kind))}
    names = [name for name in HOSTILE if drawn(name) in shown]
    assert len(names) >= 12, "some of the names: there is not room for all"
    assert any("cosine of \\$x^\\$ and [red]" in text for text in shown)
    for text in shown:
        assert "\x1b" not in text and len(text) < 200


@pytest.mark.parametrize("name", ["$x^$", r"\frac{", "_private", "$", "a$b$c", "語言", "\x1b[0m"])
def test_a_legend_has_every_name(name: str) -> None:
    table = pd.DataFrame({"step": [0, 0], "layer": [name, "b"], "value": [1.0, 2.0]}).astype(
        {"layer": pd.CategoricalDtype([name, "b"], ordered=True)}
    )
    figure = draw(table, Kind.TRAJECTORY)
    (legend,) = (ax.get_legend() for ax in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == [drawn(name), "b"]
    for text in texts(figure):
        written, is_math = text._preprocess_math(text.get_text())
        assert not is_math
        if text.get_text() == drawn(name) and name.isascii():
            assert written == plain(name)


def test_a_report_reads_every_name_as_text(ask: Ask, hostile: Path, tmp_path: Path) -> None:
    assert ask("report", hostile, "-o", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    page = Page(text)
    assert not OBEYED.search(text)
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr",
        "th", "td", "figure", "figcaption", "div", "dl", "dt", "dd", "b", "i", "ul", "li", "span",
        "nav", "a", "thead", "tbody", "code", "details", "summary", "script", "svg", "path",
        "text", "image",
    }  # fmt: skip
    assert page.attributes == {
        "lang", "charset", "name", "content", "class", "id", "href", "open", "type", "aria-label",
        "data-value", "role", "viewbox", "d", "x", "y", "width", "height", "preserveaspectratio",
        "stroke", "stroke-dasharray", "text-anchor",
    }  # fmt: skip
    assert {*page.scripts} == {"", "application/json"}
    assert [name for name in HOSTILE if plain(name) not in page.words] == []


def test_a_run_that_is_looked_at_shows_its_names(hostile: Path) -> None:
    run = open_run(hostile)
    page = Page(run._repr_html_())
    assert page.tags <= {"table", "caption", "b", "tr", "th", "td"} and page.attributes <= {"style"}
    assert not OBEYED.search(run._repr_html_()) and not OBEYED.search(repr(run))


@pytest.mark.parametrize("kind", [Kind.HEATMAP, Kind.PROFILE, Kind.TRAJECTORY, Kind.SHEET])
def test_a_long_name_leaves_room_for_the_picture(kind: Kind) -> None:
    table = pd.DataFrame({"step": [0, 1], "layer": "layer 0", "value": [1.0, 2.0]})
    two = pd.concat([table.assign(effect="y" * 500), table.assign(effect="z")], ignore_index=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(two, kind)
        figure.draw_without_rendering()
    assert max(figure.get_size_inches()) < 30
