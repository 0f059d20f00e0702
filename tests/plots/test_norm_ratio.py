"""The norm ratio and what clipping did."""

import numpy as np
import pytest

from geffect.plots import norm_ratio
from tests.utils.pictures import ratios

pytestmark = pytest.mark.usefixtures("untouched")


def test_both_are_drawn_over_the_same_steps() -> None:
    table = ratios()
    above, below = norm_ratio(table).axes
    line = next(line for line in above.lines if len(line.get_xdata()) == len(table))
    np.testing.assert_array_equal(line.get_ydata(), table["value"])
    np.testing.assert_array_equal(below.lines[0].get_ydata(), table["clip_scale"])
    assert any(list(line.get_ydata()) == [1.0, 1.0] for line in above.lines)


def test_of_gradients_of_zero_there_is_nothing_to_scale(recwarn: pytest.WarningsRecorder) -> None:
    above, _ = norm_ratio(ratios().assign(value=np.nan)).axes
    assert above.get_yscale() == "linear" and not recwarn.list


def test_where_clipping_is_not_known_that_is_said() -> None:
    (ax,) = norm_ratio(ratios().assign(clip_scale=np.nan)).axes
    assert ax.get_title(loc="right") == "what clipping did is not known"
