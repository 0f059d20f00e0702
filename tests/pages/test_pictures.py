"""Pictures of charts, read back as XML and as images."""

import base64
import io
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from geffect.pages import Lines, Map, Scale, Series
from geffect.pages.pictures import LEFT, LETTER, RIGHT, TALL, TOP, WIDTH, picture, png
from tests.utils.hostile import HOSTILE


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_an_image_has_the_colours_of_its_pixels() -> None:
    palette = ["#ff0000", "#00ff00", "#0000ff"]
    of = np.array([[0, 1, 2, -1], [2, 2, 0, 0]])
    pixels = imread(io.BytesIO(png(of, palette)))[..., :3]
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [189 / 255] * 3]
    assert pixels.reshape(-1, 3) == pytest.approx(np.array(expected)[of].reshape(-1, 3), abs=1e-6)


def test_a_curve_goes_through_its_values() -> None:
    values = [0.0, 1.0, math.nan, 0.5, math.nan, math.inf, 0.25, 1.0]
    chart = Lines("v", Scale("linear", 0.0, 1.0), [Series("a", range(8), values, "#123456")])
    (curve, _) = [e for e in parsed(picture(chart)).iter("path") if e.get("class") == "line"]
    at = [
        f"{LEFT + (WIDTH - LEFT - RIGHT) * step / 7:.1f} {TOP + TALL * (1 - value):.1f}"
        for step, value in enumerate(values)
        if math.isfinite(value)
    ]
    assert curve.get("d") == f"M{at[0]}h0L{at[1]}M{at[2]}h0M{at[3]}h0L{at[4]}"


def test_a_key_writes_names_whole_on_as_many_rows_as_they_need() -> None:
    names = ["graddiff-gru-update-seed0", "graddiff-gru-seed0", "satimp-plain-seed0", "n" * 90]
    unit = Scale("linear", 0.0, 1.0)
    chart = Lines("v", unit, [Series(name, [0], [0.5], "#123456") for name in names])
    texts = [
        e for e in parsed(picture(chart)).iter("text") if float(e.get("y", 0)) > TOP + TALL + 30
    ]
    assert [e.text for e in texts[:3]] == names[:3] and "…" in str(texts[3].text)
    for e in texts:
        assert float(e.get("x", 0)) + LETTER * len(str(e.text)) <= WIDTH


def test_a_map_is_as_wide_as_its_steps() -> None:
    """Steps 0, 1 and 4: the middle column reaches from 0.5 to 2.5 of -0.5 to 5.5."""
    values, palette = np.array([[0.0, 1.0, 0.0]]), ["#000000", "#ffffff"]
    chart = Map("v", Scale("linear", 0.0, 1.0), [0, 1, 4], ["a"], values, palette)
    image, _ = parsed(picture(chart)).iter("image")
    row = imread(io.BytesIO(base64.b64decode(image.get("href").partition(",")[2])))[0, :, 0]
    bright = np.flatnonzero(row > 0.5) / len(row)
    assert (bright[0], bright[-1]) == pytest.approx((1 / 6, 3 / 6), abs=0.01)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_text(name: str) -> None:
    unit = Scale("linear", 0.0, 1.0)
    for chart in (
        Map(name, unit, [0], [name], np.array([[0.5]]), ["#000000", "#ffffff"]),
        Lines(name, unit, [Series(name, [0], [0.5], "#000000")]),
    ):
        tags = {element.tag for element in parsed(picture(chart)).iter()}
        assert tags <= {"svg", "path", "text", "image"}


def test_long_runs_are_small() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(34, 2000))
    scale = Scale.symmetric(values.ravel(), "symlog")
    names, palette = [f"layer {i}" for i in range(34)], ["#000000", "#ffffff"]
    one = Map("v", scale, range(2000), names, values, palette)
    assert len(picture(one)) < 20_000
    curve = Lines("v", scale, [Series("a", range(2000), values[0], "#000000")])
    assert len(picture(curve)) < 8_000
