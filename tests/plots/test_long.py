"""Long courses, seeds and intervals: what lines, bands and maps are, by loops over their steps."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from geffect.plots import heatmap, profile, tradeoff, trajectory
from geffect.plots.inks import NAMED, RETAINING, SPARE, depth_colours, inks
from geffect.plots.long import rolling_median
from geffect.scores import PER_RATE, WEIGHT, YES_OR_NO, Score, stack, tidy
from geffect.spans import envelope, largest_of_spans, rates_of_spans, spans, thinned_course
from tests.utils.pictures import losses

pytestmark = pytest.mark.usefixtures("untouched")

EFFECT = Score("G-effect", PER_RATE)


def blank() -> Axes:
    return Figure(layout="constrained").subplots()


def walk(steps: int, blocks: int, seed: int = 0, score: Score = EFFECT) -> pd.DataFrame:
    """Courses with a spike of their own at step 37 of the first block."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(steps, blocks)) + np.arange(blocks)
    values[37 % steps, 0] = 1e4
    names = [f"layer {index}" for index in range(blocks)] if blocks > 1 else ["model"]
    by = "layer" if blocks > 1 else "model"
    return tidy(values, score, steps=np.arange(steps), blocks=names, by=by)


def bands(ax: Axes) -> list[FillBetweenPolyCollection]:
    return [of for of in ax.collections if isinstance(of, FillBetweenPolyCollection)]


def reach(band: FillBetweenPolyCollection) -> tuple[float, float]:
    heights = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
    return float(np.nanmin(heights)), float(np.nanmax(heights))


@pytest.mark.parametrize("count", [1, 2, 7, 50, 500])
def test_spans_lose_no_extreme(count: int) -> None:
    draw = np.random.default_rng(count)
    steps = np.sort(draw.choice(1000, 300, replace=False)).astype(float)
    values = draw.standard_cauchy((300, 4))
    values[draw.uniform(size=values.shape) < 0.3] = np.nan
    values[20:60, 1] = np.nan
    starts = [*spans(steps, count), len(steps)]
    assert starts[0] == 0 and starts == sorted(set(starts)) and len(starts) <= count + 1
    at, low, high = envelope(steps, values, count)
    biggest = largest_of_spans(steps, values.T, count)[1]
    rates = rates_of_spans(steps, values.T, count)[1]
    for index, (first, last) in enumerate(itertools.pairwise(starts)):
        part = values[first:last]
        assert at[index] == steps[first]
        known = [x for x in part.ravel() if x == x]
        if known:
            assert (low[index], high[index]) == (min(known), max(known))
        for course in range(4):
            own = [x for x in part[:, course] if x == x]
            if own:
                assert abs(biggest[course, index]) == max(map(abs, own))
                assert biggest[course, index] in own
                assert rates[course, index] == pytest.approx(sum(own) / len(own))
            else:
                assert np.isnan(biggest[course, index]) and np.isnan(rates[course, index])


@pytest.mark.parametrize("undefined", [0.0, 0.2, 1.0])
def test_a_thinned_course_has_all_extremes_in_order_and_its_gaps(undefined: float) -> None:
    draw = np.random.default_rng(3)
    steps, values = np.arange(900.0), draw.standard_cauchy(900)
    values[draw.uniform(size=900) < undefined] = np.nan
    at, kept = thinned_course(steps, values, 20)
    assert len(at) <= 3 * 20 + 2 and (at[0], at[-1]) == (0, 899) and (np.diff(at) > 0).all()
    np.testing.assert_array_equal(kept, values[at.astype(int)])
    starts = [*spans(steps, 20), 900]
    for first, last in itertools.pairwise(starts):
        own = [x for x in values[first:last] if x == x]
        shown = kept[(at >= first) & (at < last)]
        assert not own or {min(own), max(own)} <= {*shown}
        assert np.isnan(values[first:last]).any() == np.isnan(shown).any()
    assert thinned_course(steps, values, 300)[0] is steps


def test_the_rolling_median_is_that_of_the_values_about_each_step() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=50)
    values[[3, 4, 5, 30]] = np.nan
    found = rolling_median(pd.Series(values), 5)
    for step in range(50):
        about = [x for x in values[max(0, step - 2) : step + 3] if x == x]
        expected = np.median(about) if values[step] == values[step] else np.nan
        assert found[step] == pytest.approx(expected, nan_ok=True)


def test_a_long_course_is_its_median_before_a_band_that_holds_the_spike() -> None:
    table = walk(1000, 1)
    ax = trajectory(table, ax=blank())
    (line,) = ax.lines[1:]
    assert np.nanmax(line.get_ydata()) < 10
    (band,) = bands(ax)
    assert reach(band)[1] == 1e4
    assert ax.get_title(loc="right") == "median of 11 steps; band: all values"
    raw = trajectory(table, ax=blank(), smooth=1)
    assert raw.lines[-1].get_ydata().max() == 1e4 and not bands(raw)
    short = trajectory(walk(100, 1), ax=blank())
    assert len(short.lines[-1].get_ydata()) == 100 and not bands(short)


def test_hundreds_of_long_courses_are_medians_of_neighbours_before_one_band() -> None:
    table = walk(400, 80)
    ax = trajectory(table, ax=blank())
    assert len(ax.lines[1:]) == 8 and len(bands(ax)) == 1
    assert reach(bands(ax)[0])[1] == 1e4
    grid = table.pivot(index="step", columns="layer", values="value")
    first = grid.iloc[:, :10].median(axis=1).rolling(5, center=True, min_periods=1).median()
    assert {*np.round(ax.lines[1].get_ydata(), 9)} <= {*np.round(first, 9)}
    assert "median of 5 steps and 10 layers" in ax.get_title(loc="right")


def test_a_long_map_keeps_the_spike() -> None:
    ax = heatmap(walk(3000, 3), ax=blank())
    mesh = ax.collections[0]
    assert mesh.get_array().shape[1] < 1000 and mesh.get_array().max() == 1e4
    assert ax.get_title(loc="right").startswith("of about ")
    x = mesh.get_coordinates()[0, :, 0]
    assert (x[0], x[-1]) == (-0.5, 2999.5)


def test_zeros_and_ones_of_many_steps_are_rates_in_a_map_and_over_a_window() -> None:
    draw = np.random.default_rng(0)
    values = (draw.uniform(size=(400, 2)) < 0.3).astype(float)
    score = Score("conflict", YES_OR_NO)
    table = tidy(values, score, steps=np.arange(400), blocks=["a", "b"], by="layer")
    mesh = heatmap(table, ax=blank()).collections[0]
    np.testing.assert_allclose(mesh.get_array()[0, 0], values[:10, 0].mean())
    assert mesh.colorbar.ax.get_ylabel() == "rate of conflict (%)"
    ax = trajectory(table[table["layer"] == "a"], ax=blank())
    line = ax.lines[-1]
    assert line.get_ydata()[200] == pytest.approx(100 * values[180:221, 0].mean())
    assert "rate of 41 steps" in ax.get_title(loc="right").replace("\n", " ")


def seeded(as_text: bool = False) -> pd.DataFrame:
    tables = {seed: walk(30, 3, seed) for seed in range(4)}
    if as_text:
        return stack({str(seed): table for seed, table in tables.items()}, "seed")
    return pd.concat([table.assign(seed=seed) for seed, table in tables.items()])


@pytest.mark.parametrize("as_text", [False, True])
def test_bands_are_the_range_of_the_seeds_and_lines_their_mean(as_text: bool) -> None:
    table = seeded(as_text)
    ax = profile(table, ax=blank())
    medians = table.groupby(["layer", "seed"], observed=True)["value"].median().unstack()
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), medians.mean(axis=1))
    assert reach(bands(ax)[0]) == pytest.approx((medians.min().min(), medians.max().max()))
    assert "band: range of 4 seeds" in ax.get_title(loc="right")
    ax = trajectory(table, ax=blank())
    means = table.groupby(["layer", "step"], observed=True)["value"].mean()
    for line, layer in zip(ax.lines[1:], ["layer 0", "layer 1", "layer 2"], strict=True):
        np.testing.assert_allclose(line.get_ydata(), means[layer])
    assert len(bands(ax)) == 3 and "mean and range of 4 seeds" in ax.get_title(loc="right")
    cells = heatmap(table, ax=blank()).collections[0].get_array()
    np.testing.assert_allclose(cells[1], means["layer 1"])


def test_bands_are_intervals_where_a_table_has_them() -> None:
    table = walk(20, 2)
    table = table.assign(low=table["value"] - 1, high=table["value"] + 3)
    ax = trajectory(table, ax=blank())
    assert len(bands(ax)) == 2 and "bootstrap interval" in ax.get_title(loc="right")
    assert reach(bands(ax)[0])[1] == 1e4 + 3
    one = table[table["step"] == 5]
    ax = profile(one, ax=blank())
    assert reach(bands(ax)[0]) == pytest.approx((one["low"].min(), one["high"].max()))
    unknown = table.assign(low=np.nan, high=np.nan)
    assert not bands(trajectory(unknown, ax=blank()))


def test_of_methods_and_variants_the_variant_has_the_colour_and_the_method_the_mark() -> None:
    runs = {m: stack({v: walk(9, 1) for v in ("plain", "gru")}, "variant") for m in ("ga", "npo")}
    lines = trajectory(stack(runs, "method"), ax=blank()).lines[1:]
    looks = {of.get_label(): (of.get_color(), of.get_marker(), of.is_dashed()) for of in lines}
    assert looks["gru, ga"][0] == looks["gru, npo"][0] == NAMED["gru"].colour
    assert looks["plain, ga"][1:] == looks["gru, ga"][1:] != looks["gru, npo"][1:]
    ax = tradeoff(losses(), ax=blank())
    curves = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len({(line.get_color(), line.get_marker(), line.is_dashed()) for line in curves}) == 6
    assert len({line.get_color() for line in curves}) == 3


def test_no_colour_stands_for_two_things() -> None:
    assert not {ink.colour for ink in SPARE} & {ink.colour for ink in NAMED.values()}
    assert len({ink.colour for ink in SPARE}) == len(SPARE)
    many = inks([f"run {index}" for index in range(30)])
    assert len(set(many.values())) == 30
    for families, members in [(8, 2), (2, 12), (1, 7), (30, 1)]:
        names = [f"method {i}, beta {j}" for i in range(families) for j in range(members)]
        assert len(set(inks(names).values())) == len(names)
    assert RETAINING.colour != NAMED["select"].colour


@pytest.mark.parametrize("count", [2, 5, 34])
def test_layers_are_told_apart_in_grey(count: int) -> None:
    colours = [*depth_colours([str(index) for index in range(count)]).values()]
    rgb = np.array([[int(of[i : i + 2], 16) / 255 for i in (1, 3, 5)] for of in colours])
    grey = rgb @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > 0).all() and grey[-1] - grey[0] > 0.6 and grey[-1] < 0.85


def test_weights_above_zero_have_a_logarithmic_scale_and_others_none_below_zero() -> None:
    values = np.geomspace(1e-3, 1e4, 12).reshape(6, 2)
    weights = Score("implicit weight", WEIGHT)
    table = tidy(values, weights, steps=np.arange(6), blocks=["a", "b"], by="layer")
    assert trajectory(table, ax=blank()).get_yscale() == "log"
    assert profile(table, ax=blank()).get_yscale() == "log"
    assert isinstance(heatmap(table, ax=blank()).collections[0].norm, LogNorm)
    zero = table.assign(value=table["value"].where(table["step"] > 0, 0.0))
    assert trajectory(zero, ax=blank()).get_yscale() == "symlog"
