"""Accumulated risks: predicted as a line, measured as points, and how far they are apart."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geffect.plots import accumulated
from geffect.plots.inks import NAMED
from geffect.plots.long import rolling_median, window
from tests.utils.pictures import long_walk, measured_rarely, of_two_blocks, risen

pytestmark = pytest.mark.usefixtures("untouched")


def drawn(table: pd.DataFrame) -> Axes:
    return accumulated(table, ax=Figure().subplots())


def test_what_is_predicted_is_a_line_and_what_is_measured_points_in_its_colour() -> None:
    table = risen()
    _, *lines = drawn(table).lines
    for risk, line, points in zip(("forget", "retain"), lines[::2], lines[1::2], strict=True):
        own = table[table["risk"] == risk]
        for how, found in (("predicted", line), ("measured", points)):
            np.testing.assert_array_equal(found.get_ydata(), own[own["how"] == how]["value"])
        assert line.get_color() == points.get_color() == NAMED[risk].colour
        assert (line.get_linestyle(), points.get_linestyle()) == ("-", "None")


def test_the_gap_is_that_of_the_last_step_where_it_is_known() -> None:
    table = risen()
    last = table["step"] == table["step"].max()
    table.loc[last & (table["risk"] == "retain"), "gap"] = np.nan
    assert drawn(table).texts[0].get_text() == "gap at the end\nforget 30 %\nretain 10 %"
    assert not [*drawn(table.assign(gap=np.nan)).texts]


def test_a_gap_of_more_than_all_that_was_measured_is_told_in_both_numbers() -> None:
    table = risen()
    own, last = table["risk"] == "retain", table["step"] == table["step"].max()
    table.loc[own & last & (table["how"] == "predicted"), "value"] = 0.0512
    table.loc[own & last & (table["how"] == "measured"), "value"] = -0.00193
    table.loc[own & last, "gap"] = 27.5
    assert (
        drawn(table).texts[0].get_text().splitlines()[2]
        == "retain 0.051 predicted, -0.0019 measured"
    )


def test_of_a_long_run_the_rolling_median_of_what_was_measured_is_drawn() -> None:
    ax = drawn(long_walk())
    _, median, faint, *_ = [line for line in ax.lines if len(line.get_xdata()) > 2]
    rolled = rolling_median(pd.Series(faint.get_ydata()), window(500))
    assert np.array_equal(median.get_ydata(), rolled, equal_nan=True)
    assert faint.get_alpha() < 0.5 and median.get_color() == faint.get_color()
    assert ax.get_title(loc="right").endswith(f"dashed: median of {window(500)} points")


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize(("every", "over"), [(100, 1), (4, 5)])
def test_the_window_is_of_points_that_were_measured(every: int, over: int, absent: bool) -> None:
    table = measured_rarely(long_walk(2000), every, absent=absent)
    ax = drawn(table)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2000 // every]
    own = table[(table["how"] == "measured") & table["value"].notna()]
    medians = [line for line in lines if line.get_linestyle() == "--"]
    assert len(lines) == 2 + len(medians) and len(medians) == 2 * (over > 1)
    for risk, median in zip(("forget", "retain"), medians, strict=bool(medians)):
        values = own.loc[own["risk"] == risk, "value"].reset_index(drop=True)
        assert np.array_equal(median.get_ydata(), rolling_median(values, over))
    assert ("median of" in ax.get_title(loc="right")) == (over > 1)
    assert over == 1 or f"median of {over} points" in ax.get_title(loc="right")


def test_several_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one block\. Found 2, among them embedding, head"):
        drawn(of_two_blocks())


def test_steps_in_any_order_are_drawn_in_theirs() -> None:
    shuffled = risen().sample(frac=1.0, random_state=0)
    assert np.all(np.diff(drawn(shuffled).lines[1].get_xdata()) > 0)


def test_two_runs_in_one_table_are_refused() -> None:
    with pytest.raises(ValueError, match="one row for each step, risk, how"):
        drawn(pd.concat([risen(), risen()]))
