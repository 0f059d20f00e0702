"""Shares with their intervals."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from geffect.plots import shares
from geffect.scores import Score, said
from tests.utils.pictures import recovered

pytestmark = pytest.mark.usefixtures("untouched")


def drawn(table: pd.DataFrame, **how: object) -> Axes:
    return shares(table, ax=Figure().subplots(), **how)


def test_each_mark_is_at_its_value_in_its_row_with_its_interval() -> None:
    table = recovered()
    ax = drawn(table)
    rows = [text.get_text() for text in ax.get_yticklabels()]
    marks = {line.get_gid(): line for line in ax.lines if line.get_gid()}
    bars = [line for line in ax.lines if len({*line.get_ydata()}) == 1 and not line.get_gid()]
    assert len(marks) == len(table)
    for row in table.to_dict("records"):
        mark = marks[f"{row['model']}, {row['label']}: {row['value']:.3g}"]
        assert mark.get_xdata()[0] == row["value"]
        assert round(mark.get_ydata()[0]) == rows.index(row["label"])
        own = [bar for bar in bars if bar.get_ydata()[0] == mark.get_ydata()[0]]
        if np.isnan(row["low"]):
            assert not own
        else:
            assert list(own[0].get_xdata()) == [row["low"], row["high"]]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top


def test_the_axis_says_what_the_values_are() -> None:
    assert drawn(recovered()).get_xlabel() == "value"
    shown = drawn(said(recovered(), Score("fall of the NLL", "nats")))
    assert shown.get_xlabel() == "fall of the NLL (nats)"


def test_what_is_unlearned_alone_is_filled() -> None:
    filled = {
        line.get_label(): to_hex(line.get_markerfacecolor()) != "#ffffff"
        for line in drawn(recovered()).lines
        if line.get_gid()
    }
    assert filled == {"original": False, "retrained": False, "unlearned": True}


def test_limits_are_lines_with_their_words() -> None:
    ax = drawn(recovered(), lines={"hidden": 0.3, "remembers": 0.5})
    assert [text.get_text().strip() for text in ax.texts] == ["hidden", "remembers"]
    at = [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]]
    assert at == [0.3, 0.5, 0.0]


def test_what_is_not_known_has_no_mark_and_a_table_of_such_is_refused() -> None:
    table = recovered()
    table.loc[0, "value"] = np.nan
    assert len([line for line in drawn(table).lines if line.get_gid()]) == len(table) - 1
    with pytest.raises(ValueError, match="at least one row"):
        drawn(table.assign(value=np.nan))
