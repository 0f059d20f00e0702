"""The walk between forgetting and damage."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geffect.plots import walk
from geffect.plots.long import rolling_median, window
from geffect.scores import stack
from tests.utils.pictures import long_walk, measured_rarely, of_two_blocks, risen

pytestmark = pytest.mark.usefixtures("untouched")


def drawn(table: pd.DataFrame) -> Axes:
    return walk(table, ax=Figure().subplots())


def ways(ax: Axes) -> list[object]:
    return [line for line in ax.lines if not str(line.get_label()).startswith("_")]


def test_each_step_is_one_risk_over_the_other() -> None:
    table = risen()
    ax = drawn(table)
    for line in ways(ax):
        own = table[table["how"] == line.get_label()]
        for found, risk in ((line.get_xdata(), "forget"), (line.get_ydata(), "retain")):
            np.testing.assert_array_equal(found, own[own["risk"] == risk]["value"])
    assert [line.get_label() for line in ways(ax)] == ["predicted", "measured"]
    assert "forget" in ax.get_xlabel() and "retain" in ax.get_ylabel()


def test_of_several_runs_each_has_a_colour_and_measured_is_dashed() -> None:
    ax = drawn(stack({"ga": risen(), "npo": risen()}, "run"))
    looks = [(line.get_label(), line.get_color(), line.is_dashed()) for line in ways(ax)]
    assert [(name, dashed) for name, _, dashed in looks] == [
        ("ga", False), ("ga", True), ("npo", False), ("npo", True),
    ]  # fmt: skip
    assert len({colour for _, colour, _ in looks}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ga", "npo"]


def test_the_end_is_marked_where_the_last_value_is_known() -> None:
    table = risen()
    table.loc[table["step"] == table["step"].max(), "value"] = np.nan
    ends = [line for line in drawn(table).lines if line.get_marker() == "o"]
    assert len(ends) == 2 and all(np.isfinite(end.get_xdata()).all() for end in ends)


def test_of_a_long_run_the_rolling_median_stands_before_all_that_was_measured() -> None:
    ax = drawn(long_walk())
    predicted, faint, median = [line for line in ax.lines if len(line.get_xdata()) > 2]
    for axis in ("get_xdata", "get_ydata"):
        rolled = rolling_median(pd.Series(getattr(faint, axis)()), window(500))
        assert np.array_equal(getattr(median, axis)(), rolled, equal_nan=True)
    assert faint.get_alpha() < 0.5 and predicted.get_alpha() is None
    assert ax.get_title(loc="right").endswith(f"measured: median of {window(500)} points")


def test_one_window_for_runs_of_two_lengths() -> None:
    ax = drawn(stack({"long": long_walk(2000), "short": long_walk(500)}, "run"))
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    for faint, median in (lines[1:3], lines[4:6]):
        rolled = rolling_median(pd.Series(faint.get_ydata()), window(500))
        assert np.array_equal(median.get_ydata(), rolled)
    assert [len(line.get_xdata()) for line in lines] == [2000] * 3 + [500] * 3
    assert ax.get_title(loc="right").endswith(f"measured: median of {window(500)} points")


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize(("every", "over"), [(100, 1), (4, 5)])
def test_the_window_is_of_points_that_were_measured(every: int, over: int, absent: bool) -> None:
    ax = drawn(measured_rarely(long_walk(2000), every, absent=absent))
    _, *measured = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert [len(line.get_xdata()) for line in measured] == [2000 // every] * (1 + (over > 1))
    points = pd.Series(measured[0].get_ydata())
    assert np.array_equal(measured[-1].get_ydata(), rolling_median(points, over))
    assert ("median of" in ax.get_title(loc="right")) == (over > 1)
    assert over == 1 or f"median of {over} points" in ax.get_title(loc="right")


def test_several_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one block\. Found 2, among them embedding, head"):
        drawn(of_two_blocks())


def test_a_table_without_a_risk_and_one_of_two_columns_of_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Found none of retain"):
        drawn(risen().query("risk == 'forget'"))
    twice = stack({"a": risen(), "b": risen()}, "run")
    with pytest.raises(ValueError, match="one column that tells runs apart"):
        drawn(stack({"x": twice, "y": twice}, "seed"))
