"""Plots: what stands on the Axes, on synthetic tables."""

from collections.abc import Callable
from functools import partial

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import SymLogNorm, to_hex, to_rgba
from matplotlib.figure import Figure

from geffect.plots import (
    contours,
    facets,
    heatmap,
    profile,
    rectification,
    sheet,
    spans,
    text,
    tradeoff,
    trajectory,
)
from geffect.plots.inks import NAMED, RETAINING, SPARE, UNDEFINED, UNLEARNING, inks
from geffect.plots.ticks import decades, thinned
from geffect.plots.words import wrapped
from geffect.scores import COSINE as UNIT
from geffect.scores import YES_OR_NO, Score, said, stack, tidy

LAYERS = ["embedding", *(f"layer {index}" for index in range(6)), "final norm", "head"]
STEPS = np.arange(0, 100, 4)
G_EFFECT = Score("G-effect", "nats")
COSINE = Score("cosine (no unit)", UNIT)


pytestmark = pytest.mark.usefixtures("untouched")


def grown(sign: float, layers: list[str] = LAYERS) -> pd.DataFrame:
    """G-effects that grow from 1e-4 to 3e2; of mixed sign where `sign` is positive."""
    magnitude = np.geomspace(1e-4, 3e2, len(STEPS))[:, None] * np.ones(len(layers))
    signs = np.sign(np.cos(np.arange(magnitude.size))).reshape(magnitude.shape)
    values = -magnitude if sign < 0 else magnitude * signs / 10
    return tidy(values, G_EFFECT, steps=STEPS, blocks=layers, by="layer")


def effects(layers: list[str] = LAYERS) -> pd.DataFrame:
    return stack({"unlearning": grown(-1, layers), "retaining": grown(1, layers)}, "effect")


def cosines() -> pd.DataFrame:
    values = np.linspace(-0.4, 0.6, len(STEPS) * len(LAYERS)).reshape(len(STEPS), -1)
    values[:3, 0] = np.nan
    return tidy(values, COSINE, steps=STEPS, blocks=LAYERS, by="layer")


def runs() -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {
                "method": method,
                "variant": variant,
                "step": np.arange(5),
                "forget_nll": np.linspace(0.2, 3.0, 5),
                "retain_nll": np.geomspace(0.2, 5.0, 5) * cost,
                "at_level": np.arange(5) == 3,
            }
        )
        for method in ("ga", "npo")
        for variant, cost in (("plain", 1.0), ("gru", 0.5), ("gru-update", 0.2))
    ]
    return pd.concat(frames, ignore_index=True)


def blank() -> Axes:
    return Figure(layout="constrained").subplots()


def mesh_of(ax: Axes) -> QuadMesh:
    (mesh,) = (artist for artist in ax.collections if isinstance(artist, QuadMesh))
    return mesh


def legend_of(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def ticks_of(ax: Axes, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(ax, f"get_{axis}ticklabels")()]


def data_lines(ax: Axes) -> list[mpl.lines.Line2D]:
    """The lines without the one at zero."""
    return [line for line in ax.lines if len(line.get_xdata()) != 2 or line.get_label()[0] != "_"]


# --- heatmap


def test_heatmap_has_the_network_from_top_to_bottom_and_the_steps_on_x() -> None:
    shuffled = grown(-1).sample(frac=1.0, random_state=0)
    ax = heatmap(shuffled, ax=blank())
    assert ticks_of(ax, "y") == LAYERS
    top, bottom = reversed(ax.get_ylim())
    assert top < bottom  # y points down: the embedding is on top
    assert ax.get_ylabel() == "layer"
    assert ax.get_xlabel() == "optimizer step"
    expected = grown(-1)["value"].to_numpy().reshape(len(STEPS), -1).T
    np.testing.assert_array_equal(mesh_of(ax).get_array(), expected)


def test_heatmap_of_uneven_steps_puts_each_step_in_its_own_cell() -> None:
    table = tidy(
        np.eye(3), G_EFFECT, steps=np.array([0, 1, 10]), blocks=["a", "b", "c"], by="layer"
    )
    corners = mesh_of(heatmap(table, ax=blank())).get_coordinates()[0, :, 0]
    np.testing.assert_allclose(corners, [-0.5, 0.5, 5.5, 14.5])


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_symmetric_log_norm_is_centred_at_zero(scale: float) -> None:
    table = effects().query("effect == 'retaining'")
    table["value"] *= scale
    mesh = mesh_of(heatmap(table, ax=blank()))
    assert isinstance(mesh.norm, SymLogNorm)
    assert mesh.norm.vmax == -mesh.norm.vmin == pytest.approx(30 * scale)
    assert mesh.norm(0.0) == pytest.approx(0.5)
    assert 1e-6 * scale < mesh.norm.linthresh < 1 * scale
    assert min(mesh.cmap(0.5)[:3]) > 0.9  # zero is near white


def test_limits_of_the_score_hold() -> None:
    norm = mesh_of(heatmap(cosines(), ax=blank())).norm
    assert (norm.vmin, norm.vmax) == (-1.0, 1.0)
    assert not isinstance(norm, SymLogNorm)


def test_score_without_negative_values_starts_at_white() -> None:
    conflict = Score("conflict", YES_OR_NO)
    table = tidy(np.array([[0.0, 1.0]]), conflict, steps=STEPS[:1], blocks=["a", "b"], by="layer")
    mesh = mesh_of(heatmap(table, ax=blank()))
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.0, 1.0)
    assert min(mesh.cmap(0.0)[:3]) > 0.9


def test_undefined_is_grey_and_said() -> None:
    ax = heatmap(cosines(), ax=blank())
    mesh = mesh_of(ax)
    assert to_hex(mesh.cmap.get_bad()) == UNDEFINED
    assert mesh.get_array().mask.sum() == 3
    assert mesh.colorbar.ax.get_ylabel() == "cosine (no unit)\n(grey: undefined)"
    defined = heatmap(grown(-1), ax=blank())
    assert mesh_of(defined).colorbar.ax.get_ylabel() == "G-effect (nats)"


def test_infinite_values_do_not_set_the_scale() -> None:
    table = grown(-1)
    table.loc[0, "value"] = -np.inf
    mesh = mesh_of(heatmap(table, ax=blank()))
    assert mesh.norm.vmax == pytest.approx(3e2)
    assert mesh.get_array().mask.sum() == 1


# --- profile and trajectory


def test_profile_is_the_median_over_steps_of_each_effect() -> None:
    table = effects()
    ax = profile(table, ax=blank())
    assert ticks_of(ax, "x") == LAYERS
    assert legend_of(ax) == ["unlearning", "retaining"]
    unlearning, retaining = data_lines(ax)
    assert unlearning.get_color() == UNLEARNING.colour
    assert retaining.get_color() == RETAINING.colour
    assert (unlearning.is_dashed(), retaining.is_dashed()) == (False, True)
    np.testing.assert_allclose(
        unlearning.get_ydata(), np.median(grown(-1)["value"].to_numpy().reshape(-1, 9), axis=0)
    )
    assert len(ax.collections) == 2  # a band each
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylabel() == "G-effect (nats)"
    assert ax.get_title(loc="right") == "median and quartiles over steps"


def test_a_long_heading_and_how_to_read_the_panel_share_no_line() -> None:
    table = effects()
    named = table.assign(effect=table["effect"].astype(str) + ", rectified")
    panels = facets(named, by="effect", plot=profile).axes
    assert [ax.get_title(loc="left") for ax in panels] == [
        "unlearning, rectified\n",
        "retaining, rectified\n",
    ]


def test_profile_leaves_undefined_values_out_of_the_median() -> None:
    table = tidy(
        np.array([[np.nan, 1.0], [2.0, 3.0]]),
        COSINE,
        steps=STEPS[:2],
        blocks=["a", "b"],
        by="layer",
    )
    assert list(profile(table, ax=blank()).lines[-1].get_ydata()) == [2.0, 2.0]


def test_trajectory_has_a_line_a_block_from_dark_to_light() -> None:
    ax = trajectory(grown(-1), ax=blank())
    lines = data_lines(ax)
    assert [line.get_label() for line in lines] == LAYERS == legend_of(ax)
    lightness = [sum(to_rgba(line.get_color())[:3]) for line in lines]
    assert lightness == sorted(lightness)
    assert any(list(line.get_ydata()) == [0.0, 0.0] for line in ax.lines)  # the zero line
    assert ax.get_xlabel() == "optimizer step"


def test_trajectory_of_one_block_has_a_line_an_effect() -> None:
    ax = trajectory(effects(["model"]), ax=blank())
    assert legend_of(ax) == ["unlearning", "retaining"]
    assert ax.get_title(loc="left") == "model"


def test_two_columns_are_told_apart_by_colour_and_dashes() -> None:
    table = stack({"plain": effects(["model"]), "gru": effects(["model"])}, "variant")
    lines = data_lines(trajectory(table, ax=blank()))
    looks = {line.get_label(): (line.get_color(), line.is_dashed()) for line in lines}
    assert len(set(looks.values())) == 4
    assert looks["unlearning, plain"][0] == looks["unlearning, gru"][0] == UNLEARNING.colour
    assert looks["unlearning, gru"][1] == looks["retaining, gru"][1]


def test_a_single_effect_keeps_its_colour_and_says_its_name() -> None:
    table = effects()
    ax = profile(table[table["effect"] == "retaining"], ax=blank())
    assert ax.lines[-1].get_color() == RETAINING.colour
    assert ax.get_title(loc="left") == "retaining"


def test_limits_of_the_score_hold_on_y_and_steps_without_a_value_stay_on_x() -> None:
    table = cosines()
    table.loc[table["step"] < 20, "value"] = np.nan
    ax = trajectory(table, ax=blank())
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim() == pytest.approx((-1.06, 1.06))
    assert ax.get_xlim()[0] < 0


# --- trade-off


def test_tradeoff_has_a_line_a_run_and_both_keys() -> None:
    ax = tradeoff(runs(), level=2.0, ax=blank())
    assert ax.get_yscale() == "log"
    assert "nats per token" in ax.get_xlabel()
    assert "nats per token" in ax.get_ylabel()
    assert legend_of(ax) == ["plain", "gru", "gru-update", "ga", "npo"]
    curves = [line for line in ax.lines if len(line.get_xdata()) == 5]
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == len(curves) == 6
    crossings = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert len(crossings) == 6


def test_tradeoff_marks_the_level_and_what_lies_beyond() -> None:
    ax = tradeoff(runs(), level=4.0, ax=blank())
    assert any(list(line.get_xdata()) == [4.0, 4.0] for line in ax.lines)
    assert ax.get_title(loc="right") == "retrained without the forget data"
    assert 4.0 < ax.get_xlim()[1] < 5.0  # in view, and the shade does not stretch the axis


def test_tradeoff_of_other_columns() -> None:
    table = runs().assign(recognition_taught=0.5, kept=0.1)
    ax = tradeoff(table, level=0.6, x="recognition_taught", y="kept", ax=blank())
    assert ax.get_xlabel().replace("\n", " ") == "recognition after the others were taught"
    assert ax.get_ylabel() == "kept"
    assert {tuple(line.get_xdata()) for line in ax.lines} == {(0.5,) * 5, (0.5,), (0.6, 0.6)}


def test_tradeoff_of_single_steps_is_points_and_so_is_its_legend() -> None:
    last = runs().groupby(["method", "variant"]).tail(1).assign(step=0, at_level=True)
    ax = tradeoff(last, ax=blank())
    assert legend_of(ax) == ["plain", "gru", "gru-update", "ga", "npo"]
    legend = ax.get_legend()
    assert all(line.get_linestyle() == "None" for line in legend.get_lines())
    assert [line.get_marker() for line in legend.get_lines()] == ["o", "s"]
    swatches = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert swatches == [NAMED[name].colour for name in ("plain", "gru", "gru-update")]


def test_tradeoff_of_one_method_names_it_above() -> None:
    ax = tradeoff(runs().query("method == 'npo'"), ax=blank())
    assert legend_of(ax) == ["plain", "gru", "gru-update"]
    assert ax.get_title(loc="left") == "npo"


# --- several panels


def test_facets_share_the_scale_of_the_whole() -> None:
    small = grown(-1)
    small["value"] /= 1e3
    figure = facets(stack({"large": grown(-1), "small": small}, "run"), heatmap, "run")
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == ["large", "small"]
    first, second = (mesh_of(ax) for ax in panels)
    assert first.norm.vmax == second.norm.vmax == pytest.approx(3e2)
    assert first.norm.linthresh == second.norm.linthresh
    assert len(figure.axes) == 3  # one colour bar for both


def test_a_single_panel_is_named_once() -> None:
    one = pd.DataFrame(
        {"method": "ga", "variant": "plain", "forget_nll": [0.1, 2.0], "retain_nll": [0.1, 0.5]}
    )
    figure = facets(one.assign(step=[0, 1]), tradeoff, "method")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["ga"]
    assert "ga" not in figure.get_suptitle()


def test_facets_keep_the_colour_of_a_run_that_a_panel_lacks() -> None:
    table = stack({"a": effects(["model"]), "b": effects(["model"])}, "run").astype({"run": str})
    lacking = table[(table["effect"] == "unlearning") | (table["run"] == "b")]
    figure = facets(lacking, trajectory, "effect")
    both, alone = figure.axes
    colour = {line.get_label(): line.get_color() for line in both.lines}["b"]
    assert SPARE[1].colour == colour
    assert alone.get_title(loc="left") == "retaining"


def test_facets_draw_a_tradeoff_for_each_method() -> None:
    figure = facets(runs(), partial(tradeoff, level=2.0), "method")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["ga", "npo"]
    assert [bool(legend_of(ax)) for ax in figure.axes] == [False, False]
    (legend,) = figure.legends  # one for all panels, with every variant once
    named = [text.get_text() for text in legend.get_texts()]
    assert named == list(dict.fromkeys(named))
    assert set(runs()["variant"]) <= set(named)
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_sheet_has_three_panels_an_effect_and_clips_nothing() -> None:
    figure = sheet(effects())
    assert figure.get_suptitle() == "G-effect (nats), by layer"
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == ["unlearning"] * 3 + ["retaining"] * 3
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


# --- any table that is fit


ODD = {
    "one step": lambda: tidy(
        np.ones((1, 9)), G_EFFECT, steps=np.array([3]), blocks=LAYERS, by="layer"
    ),
    "undefined": lambda: tidy(
        np.full((25, 9), np.nan), G_EFFECT, steps=STEPS, blocks=LAYERS, by="layer"
    ),
    "zero": lambda: tidy(np.zeros((25, 9)), G_EFFECT, steps=STEPS, blocks=LAYERS, by="layer"),
    "one block": lambda: grown(-1, ["model"]),
    "undefined cosine": lambda: tidy(
        np.full((1, 9), np.nan), COSINE, steps=STEPS[:1], blocks=LAYERS, by="layer"
    ),
    "no attrs": lambda: pd.DataFrame({"step": [0, 1], "layer": ["a", "a"], "value": [1.0, 2.0]}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_tables_are_drawn(name: str) -> None:
    figure = sheet(ODD[name]())
    figure.draw_without_rendering()


def test_many_parameters_keep_readable_ticks() -> None:
    names = [f"model.layers.{index}.mlp.{side}.weight" for index in range(97) for side in "abc"]
    values = -np.ones((2, len(names)))
    table = tidy(values, G_EFFECT, steps=STEPS[:2], blocks=names, by="parameter")
    ticks = ticks_of(heatmap(table, ax=blank()), "y")
    assert len(ticks) <= 20
    assert (ticks[0], ticks[-1]) == ("0.a", "96.c")
    assert len(ticks_of(profile(table, ax=blank()), "x")) <= 20
    ax = trajectory(table, ax=blank())
    assert len(data_lines(ax)) == len(names)
    assert len(legend_of(ax)) <= 14


@pytest.mark.parametrize("count", [1, 2, 20, 21, 34, 40, 41, 291])
def test_thinned_places_hold_both_ends(count: int) -> None:
    places = thinned(count)
    assert (places[0], places[-1]) == (0, count - 1)
    assert len(places) <= 20
    assert places == sorted(set(places))


@pytest.mark.parametrize("limit", [1e-10, 1.0, 7e2, 1e15])
def test_ticks_stay_within_the_scale_and_mirror(limit: float) -> None:
    ticks = decades(limit * 1e-4, limit)
    assert ticks == sorted(ticks) == [-tick for tick in reversed(ticks)]
    assert ticks[-1] <= limit * (1 + 1e-6)
    assert 3 <= len(ticks) <= 7


@pytest.mark.parametrize("height", [1.8, 2.4, 4.0])
@pytest.mark.parametrize("plot", [trajectory, heatmap])
def test_powers_of_ten_stand_apart_however_short_their_axis_is(plot, height: float) -> None:
    figure = Figure(figsize=(4.0, height), layout="constrained")
    plot(grown(1), ax=figure.subplots())
    figure.draw_without_rendering()
    axis = figure.axes[-1].yaxis  # of the values, or of the bar of their colours
    low, high = axis.get_view_interval()
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = sorted((tick.label2 if plot is heatmap else tick.label1).get_window_extent().y0
                   for tick in ticks)  # fmt: skip
    size = ticks[0].label1.get_fontsize() * figure.dpi / 72
    assert len(ticks) >= 3
    assert 0.0 in [tick.get_loc() for tick in ticks]
    assert (np.diff(boxes) >= 0.99 * size).all()


def test_a_label_is_broken_into_lines_of_about_one_length() -> None:
    words = "accumulated predicted fall of the risk"
    lines = wrapped(f"{words} (nats per token)", 26).split("\n")
    assert lines == ["accumulated predicted", "fall of the risk", "(nats per token)"]
    assert wrapped("conflict of objective and retain (%)", 30).split("\n") == [
        "conflict of", "objective and retain (%)"
    ]  # fmt: skip
    wide = wrapped("accumulated predicted fall of the risk (nats per token)", 44)
    assert wide.split("\n") == ["accumulated predicted fall of the risk", "(nats per token)"]
    assert wrapped("ab objectives and more", 12).split("\n") == ["ab", "objectives", "and more"]


def test_named_inks_are_distinct_within_a_figure() -> None:
    sources, models = ["objective", "forget", "retain"], ["original", "retrained", "unlearned"]
    variants = [name for name in NAMED if name not in {*sources, *models}][2:]
    assert variants[:2] == ["plain", "gru"]
    for names in (sources, models, variants, [f"run {n}" for n in range(7)]):
        given = list(inks(names).values())
        assert len(set(given)) == len(names)


# --- unfit tables


@pytest.mark.parametrize("plot", [heatmap, profile, trajectory, sheet])
def test_empty_tables_are_refused(plot) -> None:
    with pytest.raises(ValueError, match=r"`table` should .* Found none\. Widen"):
        plot(grown(-1).iloc[:0])


@pytest.mark.parametrize("plot", [heatmap, profile, trajectory, sheet])
@pytest.mark.parametrize("column", ["step", "layer", "value"])
def test_missing_columns_are_refused(plot, column: str) -> None:
    with pytest.raises(ValueError, match=r"`table` should have .* Found .* Pass a table"):
        plot(grown(-1).drop(columns=column))


def test_tradeoff_refuses_a_missing_column() -> None:
    with pytest.raises(ValueError, match="Found no retain_nll among method, variant"):
        tradeoff(runs().drop(columns="retain_nll"))


def of_two_units(layers: list[str]) -> pd.DataFrame:
    """Effects of a gradient and, a million times smaller, of an update."""
    update = Score("G-effect of the update", "nats per token")
    parts = (
        effects(layers),
        effects(layers).assign(effect=lambda t: t["effect"].astype(str) + ", update"),
    )
    smaller = said(parts[1].assign(value=-1e-6 * parts[1]["value"]), update)
    return pd.concat([parts[0], smaller], ignore_index=True)


@pytest.mark.parametrize(("plot", "layers"), [(profile, LAYERS), (trajectory, ["model"])])
@pytest.mark.parametrize("alone", [True, False])
def test_two_units_have_a_scale_each(plot, layers: list[str], alone: bool) -> None:
    table = of_two_units(layers)
    left = plot(table) if alone else plot(table, ax=blank())
    right = next(ax for ax in left.figure.axes if ax is not left)
    assert left.get_ylabel() == "G-effect (nats)"
    assert right.get_ylabel() == "G-effect of the update\n(nats per token)"
    assert right.spines["right"].get_visible() and not left.spines["right"].get_visible()
    names = ["unlearning", "retaining"]
    assert legend_of(left) == [*names, *(f"{name}, update (right)" for name in names)]
    for ax, ending in ((left, ""), (right, ", update")):
        low, high = ax.get_ylim()
        assert low == -high  # zero is at one height
        lines = [line for line in ax.lines if not line.get_label().startswith("_")]
        for line, name in zip(lines, names, strict=True):
            own = table[table["effect"] == name + ending]
            values = (
                own.groupby("layer", observed=True)["value"].median()
                if plot is profile
                else own.set_index("step")["value"]
            )
            np.testing.assert_allclose(line.get_ydata(), values.to_numpy())
    pyplot.close(left.figure)


@pytest.mark.parametrize(("plot", "layers"), [(profile, LAYERS), (trajectory, ["model"])])
def test_panels_of_two_units_have_the_same_scales(plot, layers: list[str]) -> None:
    """A third one of one unit among them, as of a run that no rectifier acted on."""
    table = of_two_units(layers)
    runs = {"a": table, "b": table.assign(value=100 * table["value"]), "c": effects(layers)}
    panels = facets(stack(runs, "run"), plot, "run").axes
    lefts = [next(ax for ax in panels if ax.get_title(loc="left") == name) for name in runs]
    rights = [ax for ax in panels if ax.get_ylabel().startswith("G-effect of the update")]
    assert len(rights) == 2 and lefts[0].get_ylabel() == "G-effect (nats)"
    for sides, ending in ((lefts[:2], ""), (rights, ", update")):
        assert len({ax.get_ylim() for ax in sides}) == 1
        for ax, own in zip(sides, runs.values(), strict=False):
            low, high = ax.get_ylim()
            lines = [line for line in ax.lines if not line.get_label().startswith("_")]
            for line, name in zip(lines, ("unlearning", "retaining"), strict=True):
                rows = own[own["effect"] == name + ending]
                of_blocks = rows.groupby("layer", observed=True)["value"].median()
                values = of_blocks if plot is profile else rows.set_index("step")["value"]
                np.testing.assert_allclose(line.get_ydata(), values.to_numpy())
                assert low < values.min() and values.max() < high
    pyplot.close(lefts[0].figure)


@pytest.mark.parametrize(("plot", "layers"), [(profile, LAYERS), (trajectory, ["model"])])
def test_panels_of_two_units_have_room_for_their_labels(plot, layers: list[str]) -> None:
    table = of_two_units(layers)
    figure = facets(stack(dict.fromkeys("abc", table), "run"), plot, "run")
    figure.draw_without_rendering()
    lefts = [ax for ax in figure.axes if ax.get_title(loc="left")]
    rights = [ax for ax in figure.axes if ax.get_ylabel().startswith("G-effect of the update")]
    inside = [ax.get_window_extent() for ax in lefts]
    assert all(box.width > 1.5 * figure.dpi and box.height > 1.3 * figure.dpi for box in inside)
    for right, left in zip(rights, lefts[1:], strict=False):
        ends = right.yaxis.label.get_window_extent().x1
        assert ends < left.yaxis.label.get_window_extent().x0


@pytest.mark.parametrize("plot", [heatmap, profile, trajectory, sheet])
@pytest.mark.parametrize("value", [lambda v: v.astype(str), lambda v: v.astype(object)])
def test_values_that_are_no_numbers_are_refused(plot, value) -> None:
    table = grown(-1)
    with pytest.raises(ValueError, match=r"numbers in the column `value`.* Found .* Convert"):
        plot(table.assign(value=value(table["value"])))


@pytest.mark.parametrize("plot", [profile, trajectory])
def test_three_units_are_refused_and_leave_no_figure(plot) -> None:
    further = grown(1, ["model"]).assign(effect="cosine", score="cosine", unit="cosine")
    table = pd.concat([of_two_units(["model"]), further], ignore_index=True)
    before = pyplot.get_fignums()
    with pytest.raises(ValueError, match=r"values of one unit.* Found 'nats', 'nats per token', "):
        plot(table)
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("plot", [heatmap, trajectory])
def test_several_effects_in_one_panel_are_refused(plot) -> None:
    with pytest.raises(
        ValueError, match=r"effect \('unlearning', 'retaining'\).*facets\(table"
    ) as refusal:
        plot(effects())
    assert "table[table['effect'] == 'unlearning']" in str(refusal.value)


def test_two_rows_in_one_place_are_refused() -> None:
    table = grown(-1)
    with pytest.raises(ValueError, match="the first at step 0, layer embedding"):
        profile(pd.concat([table, table]))


def test_facets_by_a_missing_column_are_refused() -> None:
    with pytest.raises(ValueError, match="Found no run among"):
        facets(grown(-1), heatmap, "run")


# --- the reader's session


def test_given_axes_open_no_figure_and_figures_are_not_held() -> None:
    for plot in (heatmap, profile, trajectory):
        ax = blank()
        assert plot(grown(-1), ax=ax) is ax
    sheet(grown(-1))
    facets(effects(), heatmap, "effect")
    with pytest.raises(ValueError, match="should"):
        heatmap(effects())
    assert pyplot.get_fignums() == []


def test_without_axes_one_figure_is_opened() -> None:
    ax = heatmap(grown(-1))
    assert pyplot.get_fignums() == [ax.figure.number]
    assert ax.figure.get_layout_engine().__class__.__name__ == "ConstrainedLayoutEngine"


def test_tables_are_left_as_they_were() -> None:
    table = effects()
    before, attrs = table.copy(), dict(table.attrs)
    sheet(table)
    facets(table, profile, "effect")
    pd.testing.assert_frame_equal(table, before)
    assert table.attrs == attrs


@pytest.mark.parametrize(
    "plot",
    [
        contours,
        heatmap,
        profile,
        rectification,
        sheet,
        spans,
        text,
        tradeoff,
        trajectory,
        partial(facets, plot=profile, by="effect"),
    ],
    ids=lambda plot: getattr(plot, "__name__", "facets"),
)
def test_what_is_no_table_is_refused_by_its_kind(plot: Callable[[object], object]) -> None:
    for given, kind in ((Recorded(), "Recorded"), ("run.h5", "str")):
        with pytest.raises(TypeError, match=rf"should be a table .* Found `{kind}`\. Pass a score"):
            plot(given)


class Recorded:
    """Stands for a run, which a plot does not take."""


@pytest.mark.parametrize("before", range(20, 60))
def test_no_label_and_no_title_breaks_within_a_word(before: int) -> None:
    label = f"{'a' * (before // 2)} {'b' * (before - before // 2)} G-effect of the low-rank update"
    table = tidy(
        np.ones((2, 1)), Score(label, "nats"), steps=STEPS[:2], blocks=["model"], by="model"
    ).assign(run=label)
    ax = trajectory(table, ax=blank())
    for lines in (ax.get_ylabel(), ax.get_title(loc="left")):
        whole = [word for line in lines.splitlines() for word in line.split() if "…" not in word]
        assert len(lines.splitlines()) > 1
        assert {*whole} <= {*label.split(), "(nats)", "update,", "model"}
