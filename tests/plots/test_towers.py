"""Towers in pictures: a line between them, and none inside of one."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from geffect.plots import heatmap, profile
from geffect.scores import Score, tidy

LABELS = {
    "layer": ["vision embedding", "vision layer 0", "projector", "text layer 0", "text head"],
    "group": ["encoder shallow", "encoder deep", "decoder layers 0-9", "decoder layers 20+"],
    "expert": ["layer 0 router", "layer 0 expert 0", "layer 1"],
}
BETWEEN = {"layer": [1.5, 2.5], "group": [1.5], "expert": []}


@pytest.mark.parametrize("by", LABELS)
@pytest.mark.parametrize(("plot", "axis"), [(heatmap, 1), (profile, 0)])
def test_a_line_stands_between_towers(plot: object, axis: int, by: str) -> None:
    values = np.ones((2, len(LABELS[by])))
    steps = np.array([0, 1])
    table = tidy(values, Score("g_effect", "G-effect"), steps=steps, blocks=LABELS[by], by=by)
    ax = plot(table, ax=Figure().subplots())  # type: ignore[operator]
    across = [line for line in ax.lines if len(set(line.get_data()[axis])) == 1]
    places = {float(line.get_data()[axis][0]) for line in across}
    assert sorted(places) == BETWEEN[by]
