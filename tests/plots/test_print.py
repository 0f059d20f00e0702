"""Every picture as it is printed: width, fonts, the size of text, and what covers what."""

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from geffect import plots
from geffect.plots import facets, style, trajectory
from geffect.plots.sheet import LOWEST, TALLEST
from geffect.scores import stack
from tests.utils.pictures import EXAMPLES, PRINTED, grown, two_units

pytestmark = pytest.mark.usefixtures("untouched")

POINTS = 72
"""To the inch: of figures in which boxes are told in points."""

WIDTHS = {"column": 3.3, "page": 6.9, "slide": 10.0}


def figure_of(name: str) -> Figure:
    made = {**EXAMPLES, **PRINTED}[name]()
    if isinstance(made, Figure):
        return made
    figure = getattr(plots, name)(made).get_figure(root=True)
    pyplot.close(figure)
    return figure


NAMES = sorted({**EXAMPLES, **PRINTED})


def written(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def shown(figure: Figure) -> Iterator[tuple[str, Bbox, str]]:
    """Titles, labels, ticks within their axis, keys and names: what must not cover another."""
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            span = 1e-6 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                for label in (tick.label1, tick.label2):
                    if label.get_visible() and low - span <= tick.get_loc() <= high + span:
                        kind = "slanted" if label.get_rotation() % 90 else "tick"
                        yield kind, label.get_window_extent(), label.get_text()
            yield "label", axis.label.get_window_extent(), axis.label.get_text()
        for title in (ax._left_title, ax.title, ax._right_title):
            yield "title", of_lines_with_words(title), title.get_text()
        for text in ax.texts:
            if isinstance(text, Annotation):
                yield "name", Text.get_window_extent(text), text.get_text()
    for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes)]:
        if legend:
            yield "key", legend.get_window_extent(), "key"
    if figure._suptitle:
        yield "title", figure._suptitle.get_window_extent(), figure._suptitle.get_text()


def of_lines_with_words(title: Text) -> Bbox:
    """The box without the empty lines below, which lift a title over a note beside it."""
    box, lines = title.get_window_extent(), title.get_text().split("\n")
    empty = len(lines) - len(title.get_text().rstrip("\n").split("\n"))
    return Bbox.from_extents(box.x0, box.y0 + box.height * empty / len(lines), box.x1, box.y1)


def fonts_and_sizes(figure: Figure, path: Path) -> tuple[bytes, list[float]]:
    """The figure as PDF, and the sizes in which text is set in it."""
    with mpl.rc_context({"pdf.compression": 0}):
        figure.savefig(path, dpi=POINTS)
    whole = path.read_bytes()
    return whole, [float(size) for size in re.findall(rb"/F\d+ ([\d.]+) Tf", whole)]


@pytest.mark.parametrize("medium", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_can_be_read_in_print(
    name: str, medium: str, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    with plots.style(medium):
        figure = figure_of(name)
        figure.dpi = POINTS  # what is in the file is looked at, and not drawn again
        whole, sizes = fonts_and_sizes(figure, tmp_path / "a.pdf")
        assert not [str(w.message) for w in recwarn if "layout" in str(w.message)]
        assert figure.get_figwidth() == pytest.approx(WIDTHS[medium])
        assert not {t.get_text(): t.get_fontsize() for t in written(figure) if t.get_fontsize() < 7}
        assert b"/Type3" not in whole and b"/Type /Font" in whole
        assert sizes and min(sizes) >= 7
        assert not [label for kind, _, label in shown(figure) if kind == "label" and "…" in label]
        nothing_covers_another(figure)


LINED = [
    "accumulated", "crossings", "depth", "evaluations", "half_spaces", "profile", "rectification",
    "relearning", "shares", "tradeoff", "trajectory", "walk",
]  # fmt: skip


def strokes_of(figure: Figure) -> list[float]:
    """How broad the lines of the data are, and how large their marks."""
    lines = [line for ax in figure.axes for line in ax.lines if line.get_zorder() >= 3]
    broad = [line.get_linewidth() for line in lines if line.get_linestyle() != "None"]
    large = [line.get_markersize() for line in lines if line.get_marker() not in ("None", "")]
    return broad + large


@pytest.mark.parametrize("name", LINED)
def test_lines_and_marks_of_a_slide_are_broader_than_on_paper(name: str) -> None:
    found = {}
    for medium in WIDTHS:
        with plots.style(medium):
            found[medium] = strokes_of(figure_of(name))
    # The heads of arrows are lines whose own width is not seen.
    arrows = 3 if name == "half_spaces" else 0
    assert found["page"] == found["column"] and len(found["page"]) > arrows
    ratios = [slide / page for slide, page in zip(found["slide"], found["page"], strict=True)]
    assert sum(ratio == pytest.approx(1.8) for ratio in ratios) == len(ratios) - arrows


def test_the_width_that_a_caller_asks_for_is_drawn_on_a_slide() -> None:
    with plots.style("slide"):
        ax = plots.relearning(EXAMPLES["relearning"](), linewidth=1.25)
    assert [line.get_linewidth() for line in ax.lines] == [1.25] * 3


@pytest.mark.parametrize("name", ["half_spaces", "relearning"])
def test_a_key_stands_close_below_what_is_drawn(name: str) -> None:
    with plots.style("column"):
        figure = figure_of(name)
        figure.dpi = POINTS
        figure.canvas.draw()
        (ax,) = figure.axes
        low = ax.xaxis.get_tightbbox() if ax.axison else ax.get_window_extent()
        assert low.y0 - ax.get_legend().get_window_extent().y1 == pytest.approx(5, abs=0.5)


def nothing_covers_another(figure: Figure) -> None:
    boxes = [(kind, box, text) for kind, box, text in shown(figure) if text.strip()]
    page = figure.bbox.padded(1.4)
    for kind, box, text in boxes:
        assert page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1), (kind, text)
    for (kind, box, text), (other, beside, words) in combinations(boxes, 2):
        wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        tall = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        # The boxes around slanted words cover each other, what is written does not.
        both_slanted = kind == other == "slanted"
        assert both_slanted or wide < 0.7 or tall < 0.7, (kind, text, other, words, wide, tall)


@pytest.mark.parametrize("name", ["contours", "facets", "heatmap", "text"])
def test_a_picture_saves_text_as_text_outside_of_a_style_too(name: str, tmp_path: Path) -> None:
    figure = figure_of(name)
    whole, _ = fonts_and_sizes(figure, tmp_path / "a.pdf")
    assert b"/Type3" not in whole
    figure.savefig(tmp_path / "a.svg")
    page = (tmp_path / "a.svg").read_text(encoding="utf-8")
    words = {re.sub(r"\W.*", "", t.get_text().strip(), flags=re.DOTALL) for t in written(figure)}
    assert "<text" in page and all(word in page for word in words if word.isascii())


def test_a_style_leaves_the_session_as_it_was_also_after_an_error() -> None:
    before = dict(mpl.rcParams)
    with pytest.raises(ZeroDivisionError), plots.style("slide"):
        assert mpl.rcParams["pdf.fonttype"] == mpl.rcParams["ps.fonttype"] == 42
        assert mpl.rcParams["svg.fonttype"] == "none"
        raise ZeroDivisionError
    assert dict(mpl.rcParams) == before
    ax = plots.heatmap(EXAMPLES["heatmap"]())
    assert ax.figure.get_figwidth() > 5
    pyplot.close(ax.figure)


def test_styles_nest_and_unknown_ones_are_refused() -> None:
    with plots.style("page"):
        with plots.style("column"):
            assert figure_of("profile").get_figwidth() == 3.3
        assert figure_of("profile").get_figwidth() == 6.9
    with pytest.raises(
        ValueError, match=r"`name` should be 'column', 'page', 'slide'\. Found 'A4'"
    ):
        plots.style("A4").__enter__()


def test_maps_of_two_units_have_a_scale_each_in_a_column_too() -> None:
    with plots.style("column"):
        figure = plots.facets(two_units(), plots.heatmap, "effect")
    said = [ax.get_xlabel() for ax in figure.axes if "nats" in ax.get_xlabel()]
    assert sorted("per token" in label for label in said) == [False, True]


@pytest.mark.parametrize(("panels", "height"), [(2, None), (6, TALLEST), (9, 9 * LOWEST)])
def test_panels_below_each_other_take_a_page_while_they_can_be_read(
    panels: int, height: float | None
) -> None:
    table = stack({f"{n}": grown(-1) for n in range(panels)}, "run")
    with style("column"):
        figure = facets(table, trajectory, "run")
    assert figure.get_figheight() == height if height else figure.get_figheight() < TALLEST
