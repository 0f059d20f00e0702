"""The data of charts: what the browser is told, and how colours and labels are chosen."""

import json
import math

import numpy as np
import pytest

from geffect.pages import Lines, Map, Scale, Series
from geffect.pages.charts import as_json, marked
from tests.utils.hostile import HOSTILE

UNIT = Scale("linear", 0.0, 1.0)


def test_values_are_those_of_tables_and_what_is_no_number_is_null() -> None:
    values = [1 / 3, -2e-7 / 3, math.nan, math.inf, 0.0, 123456.0]
    told = Lines("v", UNIT, [Series("a", range(6), values, "#000000")]).told()
    ((steps, shown),) = told["tables"]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert shown == [0.3333, -6.667e-08, None, None, 0.0, 123500.0]
    assert [f"{v:.4g}" for v in values if math.isfinite(v)] == [
        f"{v:.4g}" for v in shown if v is not None
    ]


def test_curves_share_their_steps_and_keep_their_order() -> None:
    lengths = {"a": 2, "b": 2, "c": 3}
    series = [Series(name, range(n), [float(n)] * n, "#000000") for name, n in lengths.items()]
    told = Lines("v", UNIT, series).told()
    assert told["tables"] == [[[0, 1], [2.0, 2.0], [2.0, 2.0]], [[0, 1, 2], [3.0] * 3]]
    assert [one["name"] for one in told["series"]] == ["a", "b", "c"]


def test_colours_of_a_map() -> None:
    values = np.array([[-1.0, 0.0], [math.nan, 9.0]])
    palette = ["#000000", "#888888", "#ffffff"]
    chart = Map("v", Scale("linear", -1.0, 1.0), [0, 1], ["a", "b"], values, palette)
    assert chart.colours().tolist() == [[0, 1], [-1, 2]]
    assert chart.told()["rows"] == [[-1.0, 0.0], [None, 9.0]]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_name_ends_the_script_that_holds_it(name: str) -> None:
    chart = Map(name, UNIT, [0], [name], np.array([[0.5]]), ["#000000", "#ffffff"])
    written = as_json(chart)
    assert "<" not in written and json.loads(written)["kind"] == "map"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 33, 100, 257])
@pytest.mark.parametrize("most", [1, 2, 5, 12])
def test_the_first_and_the_last_row_have_labels(count: int, most: int) -> None:
    found = marked(count, most)
    assert found == sorted(set(found)) and len(found) <= max(most, 2)
    assert not count or ({0, count - 1} >= {found[0], found[-1]} and count - 1 in found)
