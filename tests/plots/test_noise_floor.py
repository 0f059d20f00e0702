"""Cosines over the band of chance."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geffect.plots import noise_floor
from tests.utils.pictures import LAYERS, STEPS, over_chance

pytestmark = pytest.mark.usefixtures("untouched")


def drawn(table: pd.DataFrame) -> Axes:
    return noise_floor(table, ax=Figure().subplots())


def test_one_block_is_drawn_over_the_steps() -> None:
    table = over_chance().query("layer == 'head'").assign(floor=np.linspace(0.1, 0.3, len(STEPS)))
    table["layer"] = table["layer"].cat.remove_unused_categories()
    ax = drawn(table)
    np.testing.assert_array_equal(ax.lines[-1].get_xdata(), STEPS)
    np.testing.assert_array_equal(ax.lines[-1].get_ydata(), table["value"])
    band = ax.collections[0].get_paths()[0].vertices
    for step, floor in zip(STEPS, table["floor"], strict=True):
        heights = band[np.isclose(band[:, 0], step)][:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((-floor, floor))


def test_of_several_blocks_the_medians_run_from_input_to_output() -> None:
    table = over_chance()
    expected = [table[table["layer"] == name]["value"].median() for name in LAYERS]
    np.testing.assert_allclose(drawn(table).lines[-1].get_ydata(), expected)
    assert drawn(table).get_title(loc="right") == "medians over the steps"
