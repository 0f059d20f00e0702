"""What every picture takes, asked of each that there is."""

from collections.abc import Callable
from inspect import Parameter, signature
from io import BytesIO
from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex, to_rgba
from matplotlib.figure import Figure

from geffect import plots
from geffect.plots.conventions import OURS, TAKEN, Asked, coloured, in_order, taken
from tests.utils.pictures import EXAMPLES, LAYERS, effects

pytestmark = pytest.mark.usefixtures("untouched")

SHARED = {"ax", "xlim", "ylim", "title"}
OTHERS = {"spans", "style", "pixels"}
"""What is public and no picture of matplotlib: text as HTML, a context, a figure as an array."""


def returned(name: str) -> object:
    return signature(getattr(plots, name), eval_str=True).return_annotation


ON_AXES = sorted(name for name in plots.__all__ if returned(name) is Axes)
FIGURES = sorted(name for name in plots.__all__ if returned(name) is Figure)


def drawn(name: str, **keywords: Any) -> Axes:
    return getattr(plots, name)(EXAMPLES[name](), ax=Figure().subplots(), **keywords)


def test_every_picture_is_on_axes_or_a_figure_and_has_an_example() -> None:
    assert {*ON_AXES, *FIGURES} == {*plots.__all__} - OTHERS == {*EXAMPLES}
    assert len(ON_AXES) > 6 and len(FIGURES) > 3


@pytest.mark.parametrize("name", ON_AXES)
def test_a_picture_on_axes_is_called_as_all_are(name: str) -> None:
    table, *others = signature(getattr(plots, name)).parameters.values()
    assert table.name == "table"
    by_name = {found.name: found for found in others}
    words = by_name.pop("keywords")
    assert words.kind is Parameter.VAR_KEYWORD
    assert all(found.kind is Parameter.KEYWORD_ONLY for found in by_name.values())
    assert {*by_name} >= SHARED
    assert all(by_name[name].default is None for name in SHARED)
    assert all(found.default is not Parameter.empty for found in by_name.values())
    assert ("cmap" in by_name) != ({"palette", "hue_order"} <= {*by_name})


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_that_it_is_one(name: str) -> None:
    function = getattr(plots, name)
    assert "figure" in function.__doc__.splitlines()[0]
    assert {"title"} <= {*signature(function).parameters}
    figure = EXAMPLES[name]()
    assert isinstance(figure, Figure)


@pytest.mark.parametrize("name", ON_AXES)
def test_limits_and_title_are_those_asked_for(name: str) -> None:
    ax = drawn(name, xlim=(0.5, 7.0), ylim=(0.25, 9.0), title="mine")
    assert (ax.get_xlim(), ax.get_ylim()) == ((0.5, 7.0), (0.25, 9.0))
    assert ax.get_title(loc="left").strip() == "mine"
    low, high = drawn(name, xlim=(None, 7.0)).get_xlim()
    assert high == 7.0 and low != 7.0


NO_LIMITS = [3.0, (1.0,), (0.0, 1.0, 2.0), "ab", (np.nan, 1.0), ("0", "1")]


@pytest.mark.parametrize(
    ("name", "limits"),
    [*zip(ON_AXES, cycle(NO_LIMITS), strict=False), *product(ON_AXES[:1], NO_LIMITS)],
)
def test_limits_that_are_none_are_refused(name: str, limits: object) -> None:
    """Each by every picture would tell no more: one function looks at those of all."""
    with pytest.raises(ValueError, match=r"`xlim` should be the two ends .* Found .* Pass, say"):
        drawn(name, xlim=limits)


@pytest.mark.parametrize("name", ON_AXES)
def test_a_keyword_that_the_artist_does_not_know_is_refused_by_the_picture(name: str) -> None:
    with pytest.raises(TypeError, match=rf"`{name}` should be given .* Found `nonsense`\."):
        drawn(name, nonsense=1)
    for word in ("label", "data", "xdata"):
        with pytest.raises(TypeError, match=rf"Found `{word}`"):
            drawn(name, **{word: "x"})


@pytest.mark.parametrize("name", ON_AXES)
def test_a_misspelt_keyword_is_guessed(name: str) -> None:
    with pytest.raises(TypeError, match=r"Found `titel`\. Did you mean `title`\?"):
        drawn(name, titel="x")
    with pytest.raises(TypeError, match=r"Found `zordr`\. Did you mean `zorder`\?"):
        drawn(name, zordr=1)


def artists(ax: Axes) -> list[Any]:
    return [*ax.lines, *ax.collections, *ax.texts]


@pytest.mark.parametrize("name", ON_AXES)
def test_keywords_reach_the_artist_and_win(name: str) -> None:
    assert any(artist.get_zorder() == 17.5 for artist in artists(drawn(name, zorder=17.5)))
    assert any(artist.get_alpha() == 0.375 for artist in artists(drawn(name, alpha=0.375)))


@pytest.mark.parametrize(
    "name", [n for n in ON_AXES if "palette" in signature(getattr(plots, n)).parameters]
)
def test_colours_of_names_follow_the_palette_and_their_order(name: str) -> None:
    def legend(**keywords: Any) -> list[tuple[str, str]]:
        shown = drawn(name, **keywords).get_legend()
        return [
            (text.get_text(), to_hex(handle.get_color()))
            for text, handle in zip(shown.get_texts(), shown.legend_handles, strict=True)
        ]

    names = [of for of, _ in legend()]
    first, second, *_ = names
    others = dict.fromkeys([*names, *LAYERS], "#0000ff")
    palette = {**others, first: "#ff0000", second: "#00ff00"}
    assert legend(palette=palette)[:2] == [(first, "#ff0000"), (second, "#00ff00")]
    turned = [of for of, _ in legend(hue_order=[second, first])]
    assert turned[:2] == [second, first]
    left_out = {*names[2:]} - ({"ga", "npo"} if name == "tradeoff" else set())
    assert not left_out & {*turned}
    with pytest.raises(ValueError, match=r"`hue_order` should have names of the table"):
        drawn(name, hue_order=["nobody"])
    with pytest.raises(ValueError, match=r"`palette` should have a colour for each"):
        drawn(name, palette=["red"])


@pytest.mark.parametrize(
    "name", [n for n in ON_AXES if "cmap" in signature(getattr(plots, n)).parameters]
)
def test_colours_of_numbers_follow_the_map(name: str) -> None:
    def shown(**keywords: Any) -> bytes:
        saved = BytesIO()
        drawn(name, **keywords).figure.savefig(saved, format="raw", dpi=40)
        return saved.getvalue()

    assert shown() == shown()
    assert shown(cmap="coolwarm") != shown()
    with pytest.raises(ValueError, match=r"Found 'coolwram'\. Did you mean `coolwarm`\?"):
        drawn(name, cmap="coolwram")


def test_a_mesh_takes_the_ends_of_its_scale_and_a_scale() -> None:
    one = effects().query("effect == 'retaining'")
    mesh = plots.heatmap(one, ax=Figure().subplots(), vmin=-5, vmax=5).collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-5, 5)
    mine = Normalize(-2, 2)
    mesh = plots.heatmap(one, ax=Figure().subplots(), norm=mine).collections[0]
    assert type(mesh.norm) is Normalize and (mesh.norm.vmin, mesh.norm.vmax) == (-2, 2)


def test_two_names_of_one_keyword_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`profile` should be given each keyword once"):
        drawn("profile", lw=1, linewidth=2)
    assert drawn("profile", lw=4.5).lines[-1].get_linewidth() == 4.5


def test_facets_hand_their_keywords_to_each_panel() -> None:
    figure = plots.facets(effects(), plots.trajectory, "effect", linewidth=4.5)
    for ax in figure.axes:
        assert {line.get_linewidth() for line in ax.lines[1:]} == {4.5}


@pytest.mark.parametrize("artist", TAKEN)
def test_no_keyword_sets_the_data(artist: type) -> None:
    assert not taken(artist) & OURS and {"alpha", "zorder"} <= taken(artist)


def test_names_that_panels_lack_may_be_ordered() -> None:
    assert in_order(["a"], ["b", "a"], known=["a", "b"]) == ["a"]
    assert in_order(["a"], ["b"], known=["a", "b"]) == []
    assert in_order(["a", "b"], "b") == ["b"]
    assert in_order(["a", "b"], ["b", "b"]) == ["b"]


@pytest.mark.parametrize("palette", ["husl", "viridis", ["r", "g", "b"], [(0, 0, 1), "k", "w"]])
def test_a_palette_gives_every_name_its_own(palette: object) -> None:
    colours = coloured(["a", "b", "c"], palette)
    assert list(colours) == ["a", "b", "c"] and len(set(colours.values())) == 3


def test_a_palette_that_runs_out_is_refused_where_a_dictionary_may_share() -> None:
    names = [f"n{i}" for i in range(12)]
    with pytest.raises(ValueError, match="Found 10 in 'deep'"):
        coloured(names, "deep")
    assert set(coloured(names, dict.fromkeys(names, "red")).values()) == {"#ff0000"}
    with pytest.raises(ValueError, match="Found none of n11"):
        coloured(names, dict.fromkeys(names[:-1], "red"))


def test_what_is_not_asked_is_ours() -> None:
    inks = Asked().inks(["unlearning", "retaining"])
    assert to_rgba(inks["unlearning"].colour) != to_rgba(inks["retaining"].colour)
    assert (
        Asked(palette=["r", "b"]).inks(["x", "y"])["x"].dashes
        == Asked().inks(["x", "y"])["x"].dashes
    )


def test_tables_stay_as_they_were() -> None:
    made: dict[str, Callable[[], pd.DataFrame]] = EXAMPLES
    for name in ON_AXES:
        table = made[name]()
        before = table.copy()
        getattr(plots, name)(table, ax=Figure().subplots())
        pd.testing.assert_frame_equal(table, before)
