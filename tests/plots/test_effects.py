"""Plots of PG-effects: what stands on the Axes, on synthetic tables."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm, to_rgba
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from geffect.plots import contours, text
from geffect.plots.inks import DIVERGING, UNDEFINED
from geffect.plots.text import cells, flow, lines
from geffect.scores import Score, said

SCORE = Score("PG-effect", "nats")


pytestmark = pytest.mark.usefixtures("untouched")


def blank(width: float = 6.0, height: float = 4.0) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


# --- text


WORDS = ["One", "day", "a", "mouse", "wrote", "four", "letters", "to", "our", "baker", "."]


def sample(words: list[str] = WORDS, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    tokens = [f" {word}" for word in words]
    table = pd.DataFrame(
        {
            "sample": 4,
            "position": np.arange(len(tokens)) + 7,
            "token": tokens,
            "p": 0.5,
            "risk": "forget",
            "value": draw.normal(size=len(tokens)) * 10.0 ** draw.uniform(-3, 2, len(tokens)),
        }
    )
    return said(table, SCORE)


def boxes(ax: Axes) -> list[Rectangle]:
    return [box for box in ax.patches if isinstance(box, Rectangle)] + [
        box for box in ax.artists if isinstance(box, Rectangle)
    ]


def norm_of(ax: Axes) -> SymLogNorm:
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    norm = bar._colorbar.norm
    assert isinstance(norm, SymLogNorm)
    return norm


def test_text_reads_in_the_order_of_the_positions() -> None:
    table = sample()
    ax = text(table.sample(frac=1.0, random_state=0))
    assert [drawn.get_text() for drawn in ax.texts] == table["token"].tolist()
    assert ax.get_title(loc="left") == "sample 4, forget"
    assert not ax.axison


def test_text_colours_are_symmetric_about_zero() -> None:
    table = sample()
    table.loc[3, "value"] = 0.0
    table.loc[5, "value"] = np.nan
    ax = text(table)
    norm = norm_of(ax)
    assert norm.vmax == -norm.vmin == pytest.approx(table["value"].abs().max())
    for box, value in zip(boxes(ax), table["value"], strict=True):
        expected = UNDEFINED if np.isnan(value) else DIVERGING(float(norm(value)))
        assert box.get_facecolor() == pytest.approx(to_rgba(expected), abs=0.01)
    assert min(boxes(ax)[3].get_facecolor()[:3]) > 0.9
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert bar.get_xlabel() == "PG-effect (nats) (grey: undefined)"


def test_text_is_readable_on_every_colour() -> None:
    ax = text(sample())
    for box, drawn in zip(boxes(ax), ax.texts, strict=True):
        lightness = float(np.dot(to_rgba(drawn.get_color())[:3], [0.299, 0.587, 0.114]))
        beneath = float(np.dot(box.get_facecolor()[:3], [0.299, 0.587, 0.114]))
        assert abs(lightness - beneath) > 0.35


@pytest.mark.parametrize("width", [3.0, 6.0, 9.0])
def test_text_stays_on_its_axes_and_no_token_on_another(width: float) -> None:
    ax = text(sample(WORDS * 3), ax=blank(width))
    ax.figure.draw_without_rendering()
    inside = ax.get_window_extent()
    seen = [box.get_window_extent() for box in boxes(ax)]
    for box in seen:
        assert inside.x0 - 1 <= box.x0 and box.x1 <= inside.x1 + 1
        assert inside.y0 - 1 <= box.y0 and box.y1 <= inside.y1 + 1
    for one, other in pairwise(seen):
        assert other.x0 >= one.x1 - 0.01 or other.y1 <= one.y0 + 0.01
    for box, drawn in zip(seen, ax.texts, strict=True):
        letters = drawn.get_window_extent()
        assert box.x0 - 1 <= letters.x0 and letters.x1 <= box.x1 + 1


def test_text_of_a_figure_of_its_own_is_as_tall_as_its_lines() -> None:
    short, tall = text(sample(WORDS)), text(sample(WORDS * 9))
    assert tall.figure.get_figheight() > short.figure.get_figheight() + 1.0
    assert tall.texts[0].get_fontsize() == short.texts[0].get_fontsize() == 9.0


def test_text_is_set_smaller_where_there_is_less_room() -> None:
    ax = text(sample(WORDS * 9), ax=blank(4.0, 2.6))
    assert ax.texts[0].get_fontsize() < 9.0


def test_lines_break_between_words_and_after_line_breaks() -> None:
    tokens = ["Al", "-K", "uw", " is", " here", "↵", "So"]
    placed = list(flow(tokens, 9))
    assert "".join(part.text for part in placed) == "".join(tokens)
    assert [part.line for part in placed] == [0, 0, 0, 0, 1, 1, 2]
    assert [part.column for part in placed] == [0, 2, 4, 6, 0, 5, 0]


def test_what_is_longer_than_a_line_is_cut() -> None:
    placed = list(flow(["ab", " abcdefghij", "k"], 4))
    assert "".join(part.text for part in placed) == "ab abcdefghijk"
    assert max(cells(part.text) + part.column for part in placed) <= 4
    wide = list(flow(["日本語日本語"], 4))
    assert [part.text for part in wide] == ["日本", "語日", "本語"]
    assert lines(["日本語日本語"], 4) == 3


def test_text_shows_ids_line_breaks_and_signs_as_they_are() -> None:
    table = sample(["a"] * 4)
    table["token"] = pd.Series([12, "\n", "", "$x_1$"], dtype=object)
    drawn = text(table).texts
    assert [entry.get_text() for entry in drawn] == [" 12", "↵", "∅", "$x_1$"]
    assert not drawn[3].get_parse_math()


@pytest.mark.parametrize("column", ["sample", "risk"])
def test_text_of_several_samples_or_risks_is_refused(column: str) -> None:
    other = sample().assign(**{column: 5 if column == "sample" else "retain"})
    with pytest.raises(ValueError, match=rf"should hold one {column}.* Found 2: .* Choose with"):
        text(pd.concat([sample(), other], ignore_index=True))
    with pytest.raises(ValueError, match=r"one row for each position"):
        text(pd.concat([sample(), sample()], ignore_index=True))
    with pytest.raises(ValueError, match=r"Found no token"):
        text(sample().drop(columns="token"))


# --- contours


def points(count: int, spread: float = 1.0, seed: int = 0, most: float = 1.0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    weight = draw.uniform(0.0, most, count)
    forget = -np.exp(spread * (draw.normal(size=count) + 3 * weight))
    retain = 0.3 * draw.normal(size=count) * np.exp(spread * draw.normal(size=count))
    table = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(count), 2),
            "risk": ["forget", "retain"] * count,
            "weight": np.repeat(weight, 2),
            "value": np.stack([forget, retain], axis=1).reshape(-1),
        }
    )
    return said(table, SCORE)


def legend_of(ax: Axes) -> list[str]:
    return [entry.get_text() for entry in ax.get_legend().get_texts()]


def densities(ax: Axes) -> list[ContourSet]:
    return [artist for artist in ax.collections if isinstance(artist, ContourSet)]


def dots(ax: Axes) -> list[np.ndarray]:
    return [
        np.asarray(artist.get_offsets())
        for artist in ax.collections
        if not isinstance(artist, ContourSet)
    ]


def test_contours_are_of_the_samples_of_each_range_of_weights() -> None:
    table = points(60)
    ax = contours(table, ax=blank())
    weights = table["weight"].to_numpy()[::2]
    numbers, counts = np.unique(np.floor(weights / 0.2), return_counts=True)
    assert legend_of(ax) == [
        f"{0.2 * number:.1f} to {0.2 * number + 0.2:.1f} ({count})"
        for number, count in zip(numbers, counts, strict=True)
    ]
    values = table["value"].to_numpy().reshape(-1, 2)
    for number, drawn in zip(numbers, dots(ax), strict=True):
        expected = values[np.floor(weights / 0.2) == number]
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0))
    assert ax.get_xlabel() == "forget: PG-effect (nats)"
    assert ax.get_ylabel() == "retain: PG-effect (nats)"


def test_larger_weights_are_darker() -> None:
    ax = contours(points(100), ax=blank())
    handles = ax.get_legend().legend_handles
    lightness = [np.dot(to_rgba(line.get_color())[:3], [0.299, 0.587, 0.114]) for line in handles]
    assert lightness == sorted(lightness, reverse=True)


def test_weights_on_an_edge_belong_to_the_range_above() -> None:
    table = points(3)
    table["weight"] = np.repeat([0.2, 0.6, 1.0], 2)
    assert legend_of(contours(table, ax=blank())) == [
        "0.2 to 0.4 (1)", "0.6 to 0.8 (1)", "1.0 to 1.2 (1)"
    ]  # fmt: skip


def test_lines_enclose_their_shares_of_the_points() -> None:
    draw = np.random.default_rng(0)
    table = points(2000, spread=0.0).drop(columns="weight")
    table["value"] = draw.normal(size=4000)
    table["unit"] = ""
    ax = contours(table, ax=blank())
    assert ax.get_xscale() == "linear" and ax.get_legend() is None
    (density,), (drawn,) = densities(ax), dots(ax)
    inside = [path.contains_points(drawn).mean() for path in density.get_paths()]
    np.testing.assert_allclose(inside, [0.9, 0.6, 0.3], atol=0.05)


@pytest.mark.parametrize("spread", [0.1, 2.0], ids=["linear", "symlog"])
def test_the_density_is_that_of_gaussian_kernels_on_the_scales_that_are_shown(
    spread: float,
) -> None:
    """A kernel a point, one after the other, as wide as their covariance by Scott's rule."""
    ax = contours(points(40, spread, most=0.2), ax=blank())
    (drawn,), (lines_of_density,) = dots(ax), densities(ax)
    shown = ax.transScale.transform(drawn)
    kernel = np.cov(shown.T) * len(shown) ** (-2 / 6)
    halves = np.linalg.inv(np.linalg.cholesky(kernel))

    def density(places: np.ndarray) -> np.ndarray:
        return sum(np.exp(-(((places - x) @ halves.T) ** 2).sum(axis=1) / 2) for x in shown)

    low, high = shown.min(axis=0), shown.max(axis=0)
    margin = 3 * np.sqrt(np.diag(kernel))
    sides = [np.linspace(*ends, 300) for ends in zip(low - margin, high + margin, strict=True)]
    everywhere = np.sort(density(np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)))[::-1]
    enclosed = everywhere.cumsum() / everywhere.sum()
    for path, share in zip(lines_of_density.get_paths(), (0.9, 0.6, 0.3), strict=True):
        along = density(ax.transScale.transform(path.vertices))
        expected = everywhere[np.searchsorted(enclosed, share)]
        np.testing.assert_allclose(along, expected, rtol=0.1)


@pytest.mark.parametrize(("spread", "scale"), [(0.1, "linear"), (2.0, "symlog")])
def test_the_scale_is_symmetric_log_where_values_lie_far_apart(spread: float, scale: str) -> None:
    ax = contours(points(80, spread), ax=blank())
    assert ax.get_xscale() == scale
    low, high = ax.get_xlim()
    assert low < points(80, spread)["value"].min() and high > 0  # zero is always on view
    for density in densities(ax):
        for path in density.get_paths():
            assert low <= path.vertices[:, 0].min() and path.vertices[:, 0].max() <= high


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("values", ["any", "one", "zero", "in line", "undefined"])
@pytest.mark.filterwarnings("error")
def test_few_or_degenerate_samples_are_drawn_as_points(count: int, values: str) -> None:
    table = points(count, most=0.2)
    forget, retain = table["risk"] == "forget", table["risk"] == "retain"
    if values == "one":
        table["value"] = 0.1 + 0.2
    elif values == "zero":
        table.loc[retain, "value"] = 0.0
    elif values == "in line":
        table.loc[retain, "value"] = 2 * table.loc[forget, "value"].to_numpy()
    elif values == "undefined" and count > 1:
        table.loc[0, "value"] = np.nan
    ax = contours(table, ax=blank())
    ax.figure.draw_without_rendering()
    defined = count - (values == "undefined" and count > 1)
    assert sum(map(len, dots(ax))) == defined
    # What is in line may not be so on the scales that are shown.
    broad = values in ("any", "undefined") or (values == "in line" and ax.get_xscale() == "symlog")
    assert len(densities(ax)) == (defined >= 5 and broad)


def test_steps_are_pooled_and_what_is_missing_is_said() -> None:
    table = pd.concat([points(6).assign(step=step) for step in (5, 10)], ignore_index=True)
    assert sum(map(len, dots(contours(table, ax=blank())))) == 12
    with pytest.raises(ValueError, match=r"each risk: forget, retain. Found none of retain. Pass"):
        contours(table[table["risk"] == "forget"])
    with pytest.raises(ValueError, match=r"one row for each sample, risk"):
        contours(table.drop(columns="step"))
