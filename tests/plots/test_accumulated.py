"""Accumulated risks: predicted as a line, measured as points, and how far they are apart."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geffect.plots import accumulated
from geffect.plots.inks import NAMED
from tests.utils.pictures import risen

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
    assert drawn(table).texts[0].get_text().splitlines()[2] == "retain 0.051 for -0.0019"


def test_steps_in_any_order_are_drawn_in_theirs() -> None:
    shuffled = risen().sample(frac=1.0, random_state=0)
    assert np.all(np.diff(drawn(shuffled).lines[1].get_xdata()) > 0)


def test_two_runs_in_one_table_are_refused() -> None:
    with pytest.raises(ValueError, match="one row for each step, risk, how"):
        drawn(pd.concat([risen(), risen()]))
