"""The Gram panel."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geffect.plots import angles
from tests.utils.pictures import angles_of_a_step

pytestmark = pytest.mark.usefixtures("untouched")


def drawn(table: pd.DataFrame) -> Axes:
    return angles(table, ax=Figure().subplots())


def words(ax: Axes) -> dict[tuple[int, int], str]:
    return {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}


def test_every_pair_stands_in_its_cell_and_lengths_on_the_diagonal() -> None:
    found = words(drawn(angles_of_a_step()))
    assert found[1, 0] == found[0, 1] == "-0.80" and found[2, 1] == "0.40"
    assert [found[i, i] for i in range(3)] == ["|g|\n2", "|g|\n3", "|g|\n4"]


def test_of_several_steps_it_is_the_median() -> None:
    one = angles_of_a_step()
    steps = [
        one.assign(step=s, value=v, length=10.0 * s) for s, v in ((1, 0.1), (2, 0.9), (3, 0.2))
    ]
    ax = drawn(pd.concat(steps))
    assert words(ax)[1, 0] == "0.20" and words(ax)[0, 0] == "|g|\n20"
    assert ax.get_title(loc="right") == "median of 3 steps"


def test_no_cosine_is_written_as_minus_zero() -> None:
    assert words(drawn(angles_of_a_step().assign(value=-0.002)))[1, 0] == "0.00"


def test_what_is_undefined_is_grey_and_has_no_words() -> None:
    table = angles_of_a_step()
    absent = (table["source"] == "retain") | (table["other"] == "retain")
    table.loc[absent, ["value"]] = np.nan
    table.loc[table["source"] == "retain", "length"] = np.nan
    ax = drawn(table)
    assert words(ax)[2, 0] == words(ax)[2, 2] == ""
    assert ax.collections[0].get_array().mask.sum() == 4
    assert "undefined" in ax.collections[0].colorbar.ax.get_ylabel()


def test_several_blocks_are_refused() -> None:
    one = angles_of_a_step().drop(columns="model")
    table = pd.concat([one.assign(layer="layer 0"), one.assign(layer="head", step=4)])
    with pytest.raises(ValueError, match=r"of one block\. Found 2, among them layer 0, head"):
        drawn(table)
