"""The picture of a rectifier: what stands on its axes, on synthetic tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from geffect.plots import rectification
from geffect.plots.inks import GRU, GRU_COORDINATE, PLAIN, UNDEFINED
from geffect.scores import Score, stack, tidy

STEPS = np.array([0, 5, 10, 15])
LAYERS = ["embedding", "layer 0", "head"]


pytestmark = pytest.mark.usefixtures("untouched")


def values(seed: int, blocks: int) -> dict[str, np.ndarray]:
    """Quantities (step, block): the second step was left alone, and what it did is undefined."""
    rng = np.random.default_rng(seed)
    before, applied = rng.uniform(-0.8, 0.3, (2, len(STEPS), blocks))
    before[1] = applied[1] = np.nan
    return {
        "inner_before": 1e4 * before,  # another unit, which no scale may follow
        "cosine_before": before,
        "cosine_after": np.maximum(before, 0.0),
        "cosine_applied": applied,
        "fired": (before < 0).astype(float),
        "violated": np.where(np.isnan(applied), np.nan, applied < 0),
    }


def table(sets: Sequence[str] = ("retain",), blocks: Sequence[str] = ("model",)) -> pd.DataFrame:
    by = "model" if len(blocks) == 1 else "layer"
    made = {name: values(seed, len(blocks)) for seed, name in enumerate(sets)}
    return stack(
        {
            quantity: stack(
                {
                    name: tidy(made[name][quantity], Score("what it did"),
                               steps=STEPS, blocks=blocks, by=by)
                    for name in sets
                },
                "against",
            )
            for quantity in made[sets[0]]
        },
        "quantity",
    )  # fmt: skip


def meshes(ax: Axes) -> list[QuadMesh]:
    return [artist for artist in ax.collections if isinstance(artist, QuadMesh)]


def panels(figure: Figure, count: int) -> list[Axes]:
    """The axes without those of colour bars."""
    return figure.axes[:count]


def labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_one_block_has_its_courses_and_marks() -> None:
    made = values(0, 1)
    above, below = rectification(table()).axes
    zero, *lines = above.lines
    assert set(zero.get_ydata()) == {0.0}
    assert [line.get_label() for line in lines] == ["before", "rectified", "as applied"]
    for line, quantity in zip(
        lines, ["cosine_before", "cosine_after", "cosine_applied"], strict=True
    ):
        np.testing.assert_array_equal(line.get_xdata(), STEPS)
        np.testing.assert_array_equal(line.get_ydata(), made[quantity][:, 0])
    assert [line.get_color() for line in lines] == [
        PLAIN.colour,
        GRU.colour,
        GRU_COORDINATE.colour,
    ]
    assert [line.is_dashed() for line in lines] == [False, True, True]
    assert above.get_ylabel() == "cosine with the retain average"
    assert labels(below) == ["fired", "update violates"]
    top, bottom = below.get_ylim()[::-1]
    assert top < bottom, "fired is above"
    fired, violated = meshes(below)
    np.testing.assert_array_equal(fired.get_array()[0], made["fired"][:, 0])
    assert violated.get_array().mask[0].tolist() == [False, True, False, False]
    assert below.get_xlabel() == "optimizer step"


def test_a_mark_is_in_colour_and_what_is_undefined_grey() -> None:
    _, below = rectification(table()).axes
    for mesh, ink in zip(meshes(below), (GRU, GRU_COORDINATE), strict=True):
        nothing, marked = (to_hex(mesh.cmap(mesh.norm(value))) for value in (0.0, 1.0))
        assert marked == ink.colour
        assert len({nothing, marked, UNDEFINED}) == 3
        assert to_hex(mesh.cmap.get_bad()) == UNDEFINED


def test_shares_are_of_the_steps_at_which_it_is_known() -> None:
    made = values(0, 1)
    _, below = rectification(table()).axes
    said = [text.get_text() for text in below.texts]
    assert said == [
        f"{100 * made['fired'].mean():.0f} %",
        f"{100 * np.nanmean(made['violated']):.0f} %",
    ]


def test_what_nobody_looked_at_is_undefined_and_not_in_the_key() -> None:
    unseen = table()
    unseen.loc[unseen["quantity"].isin(["cosine_applied", "violated"]), "value"] = np.nan
    above, below = rectification(unseen).axes
    named = [text.get_text() for text in above.get_legend().get_texts()]
    assert named == ["before", "rectified"]
    assert [text.get_text() for text in below.texts][1] == "undefined"


def test_order_of_rows_and_single_steps() -> None:
    shuffled = table().sample(frac=1.0, random_state=0)
    for line, expected in zip(
        rectification(shuffled).axes[0].lines, rectification(table()).axes[0].lines, strict=True
    ):
        np.testing.assert_array_equal(line.get_ydata(), expected.get_ydata())
    first = table()
    above, _ = rectification(first[first["step"] == 0]).axes
    assert all(line.get_marker() == "o" for line in above.lines[1:]), "a line of one step is none"


def test_every_retain_set_has_its_panel_on_one_scale() -> None:
    figure = rectification(table(("retain", "world")))
    retain, world = panels(figure, 2)
    assert [ax.get_title(loc="left") for ax in (retain, world)] == [
        "against retain",
        "against world",
    ]
    assert retain.get_ylim() == world.get_ylim()
    assert retain.get_legend() is None and world.get_legend() is not None
    for ax, seed in zip((retain, world), (0, 1), strict=True):
        expected = values(seed, 1)["cosine_before"][:, 0]
        np.testing.assert_array_equal(ax.lines[1].get_ydata(), expected)


@pytest.mark.parametrize("sets", [("retain",), ("retain", "world")])
def test_several_blocks_have_a_map_each(sets: tuple[str, ...]) -> None:
    figure = rectification(table(sets, LAYERS))
    grid = np.array(panels(figure, 4 * len(sets))).reshape(len(sets), 4)
    for seed, (name, axes) in enumerate(zip(sets, grid, strict=True)):
        where = f", against {name}" if len(sets) > 1 else ""
        titles = [ax.get_title(loc="left") for ax in axes]
        assert titles == [f"{of}{where}" for of in ("before", "rectified", "fired",
                                                    "update violates")]  # fmt: skip
        made = values(seed, len(LAYERS))
        for ax, quantity in zip(
            axes, ["cosine_before", "cosine_after", "fired", "violated"], strict=True
        ):
            (mesh,) = meshes(ax)
            np.testing.assert_array_equal(mesh.get_array().filled(np.nan), made[quantity].T)
        assert labels(axes[0]) == LAYERS
        before, after = (meshes(ax)[0].norm for ax in axes[:2])
        assert (before.vmin, before.vmax) == (after.vmin, after.vmax)
        assert -1 <= before.vmin == -before.vmax, "the scale is that of the cosines"
        fired = axes[2].get_title(loc="right")
        assert fired == f"{100 * made['fired'].mean():.0f} %"
    zero = table(sets, LAYERS)
    zero.loc[(zero["quantity"] == "cosine_after") & (zero["step"] == 0), "value"] = np.nan
    assert len(rectification(zero).axes) == len(figure.axes), "one colour bar for both maps"
    bars = figure.axes[4 * len(sets) :]
    assert len(bars) == len(sets)
    assert all(
        "cosine with the retain average" in " ".join(bar.get_ylabel().split()) for bar in bars
    )


def test_the_reader_gets_a_figure_of_his_own() -> None:
    figure = rectification(table())
    assert isinstance(figure, Figure)
    assert pyplot.get_fignums() == []


def test_tables_that_it_cannot_draw_are_refused() -> None:
    whole = table()
    with pytest.raises(ValueError, match=r"should have the columns .* Found no against"):
        rectification(whole.drop(columns="against"))
    with pytest.raises(ValueError, match=r"should have the quantities .*violated\. Found inner_b"):
        rectification(whole[whole["quantity"] != "violated"])
    with pytest.raises(ValueError, match="should have one row for each step, model, against, qua"):
        rectification(pd.concat([whole, whole]))
    with pytest.raises(ValueError, match="at least one row"):
        rectification(whole[:0])
