"""Many methods in one picture: lines that end at the level, names that do not overlap."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from geffect.plots import crossings
from geffect.plots.crossings import APART, spread, within


def losses(count: int, reached: int) -> pd.DataFrame:
    """Methods that begin alike and end apart, of which some reach the level 3."""
    rows = [
        {"variant": variant, "method": f"m{i}", "step": step, "forget_nll": nll,
         "retain_nll": 0.01 * (1 + i) * (1 + step), "at_level": nll == 3.0}
        for variant in ("plain", "select")
        for i in range(count)
        for step, nll in enumerate([0.0, 1.5, 3.0 if i < reached else 2.0, 5.0])
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_every_method_is_named_at_the_level_or_below() -> None:
    figure = crossings(losses(9, 7), "variant", "retain_nll", level=3.0, label="retain NLL outside")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["plain", "select"]
    of_level = [ax.get_title(loc="right") for ax in figure.axes]
    assert of_level == ["retrained without the forget data", ""]
    for ax in figure.axes:
        *names, missed = ax.texts
        assert [text.get_text() for text in names] == [f"m{i}" for i in range(7)]
        assert missed.get_text() == "not reached: m7, m8"
        heights = [text.get_position()[1] for text in names]
        assert all(high - low >= APART - 1e-9 for low, high in pairwise(heights))
        assert heights[0] >= 0 and heights[-1] <= 1
        # Nothing is shown beyond the level.
        assert max(line.get_xdata()[-1] for line in ax.lines if len(line.get_xdata())) <= 3.0
    assert figure.axes[0].get_ylabel() == "retain NLL outside (nats per token)"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_method_has_one_look_in_every_panel_whatever_its_place_there() -> None:
    table = losses(8, 8)
    is_turned = table["variant"] == "select"
    table.loc[is_turned, "retain_nll"] = 1 / table.loc[is_turned, "retain_nll"]
    figure = crossings(table, "variant", "retain_nll", level=3.0, label="")
    orders, looks = zip(*(looks_of(ax) for ax in figure.axes), strict=True)
    assert orders[0] == orders[1][::-1]
    assert looks[0] == looks[1]
    assert len({*looks[0].values()}) == 8


def looks_of(ax: Axes) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """The names from below to above, and colour and dashes of the line of each."""
    names = [text.get_text() for text in ax.texts]
    lines = [line for line in ax.lines if len(line.get_xdata()) == 3]  # up to the level
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines]
    return names, dict(zip(names, looks, strict=True))


def test_places_are_apart_and_as_near_as_they_can_be() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 7, 20):
        places = sorted(draw.uniform(0, 1, count))
        found = spread(places, 0.02)
        assert all(high - low >= 0.02 - 1e-9 for low, high in pairwise(found))
        assert np.mean(found) == pytest.approx(np.mean(places))
        held = within(found, 0.02)
        assert all(high - low >= 0.02 - 1e-9 for low, high in pairwise(held))
        assert held[0] >= 0 and held[-1] <= 1


def test_tables_that_are_refused() -> None:
    with pytest.raises(ValueError, match="Found no at_level"):
        crossings(
            losses(2, 1).drop(columns="at_level"), "variant", "retain_nll", level=3.0, label=""
        )


def test_a_point_at_the_level_that_is_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"should be `level`, 2\. Found 3\."):
        crossings(losses(2, 1), "variant", "retain_nll", level=2.0, label="")
