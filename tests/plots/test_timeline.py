"""The timeline of a conflict: where, and how often."""

import numpy as np
import pytest

from geffect.plots import timeline
from tests.utils.pictures import LAYERS, STEPS, conflicts, grown

pytestmark = pytest.mark.usefixtures("untouched")


def test_the_rate_is_that_of_the_column_above() -> None:
    table = conflicts()
    above, below, *_ = timeline(table).axes
    cells = above.collections[0].get_array()
    assert cells.shape == (len(LAYERS), len(STEPS)) and cells.mask.sum() == 1
    rates = [table[table["step"] == step]["value"].mean() for step in STEPS]
    np.testing.assert_allclose(below.lines[-1].get_ydata(), 100 * np.array(rates))
    assert above.get_shared_x_axes().joined(above, below)


def test_other_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="score that is 0 or 1"):
        timeline(grown(-1))
