"""Places on a scale, held against matplotlib's scales and plain arithmetic."""

import math

import numpy as np
import pytest

from geffect.pages import Scale

SCALES = [
    Scale("linear", -2.0, 6.0),
    Scale("log", 1e-3, 50.0),
    Scale("symlog", -300.0, 20.0, 1e-3),
    Scale("linear", -1e-9, 1e-9),
    Scale("symlog", -1e-9, 1e-9, 1e-12),
]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_a_place_and_its_value(scale: Scale) -> None:
    assert (scale.place(scale.low), scale.place(scale.high)) == pytest.approx((0.0, 1.0))
    for place in (0.0, 0.25, 0.7, 1.0):
        assert scale.place(scale.value(place)) == pytest.approx(place, abs=1e-9)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_ticks_are_inside_in_order_and_written_as_they_are(scale: Scale) -> None:
    values = [value for value, _ in scale.ticks()]
    assert 2 <= len(values) <= 8 and values == sorted(set(values))
    assert scale.low <= values[0] and values[-1] <= scale.high
    assert [float(label) for _, label in scale.ticks()] == pytest.approx(values)


@pytest.mark.parametrize("largest", [5e-324, 1e-300, 1e-9, 0.03, 1.0, 7.0, 1e12, 1e300])
@pytest.mark.parametrize("kind", ["linear", "symlog"])
def test_any_size_has_a_scale_with_ticks(largest: float, kind: str) -> None:
    for scale in (
        Scale.symmetric([largest, 0.0, math.nan, math.inf], kind),
        Scale.signed([largest, math.nan], kind),
        Scale.signed([-largest, largest / 3], kind),
    ):
        assert math.isfinite(scale.place(largest)) and scale.low < scale.high
        assert len(scale.ticks()) >= 2


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, 0.0], [math.inf]], ids=str)
def test_nothing_to_scale(values: list[float]) -> None:
    for scale in (Scale.symmetric(values, "symlog"), Scale.signed(values, "linear"),
                  Scale.positive(values)):  # fmt: skip
        assert scale.low < scale.high and len(scale.ticks()) >= 2


def test_a_symmetric_scale_has_zero_in_its_middle() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50) * 10.0 ** rng.integers(-5, 3, size=50)
    scale = Scale.symmetric(values, "symlog")
    assert scale.place(0.0) == 0.5
    assert [scale.place(-v) for v in values] == pytest.approx([1 - scale.place(v) for v in values])
