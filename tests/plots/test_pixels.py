"""A figure as pixels."""

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from geffect.plots import pixels


@pytest.mark.parametrize("dpi", [40, 100])
def test_pixels_are_those_that_are_drawn(dpi: int) -> None:
    figure = Figure(figsize=(3.3, 2.1), dpi=dpi)
    figure.add_subplot().plot([0, 1, 0], color="crimson")
    found = pixels(figure, dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(canvas.buffer_rgba())[..., :3])


def test_what_is_transparent_is_on_white() -> None:
    figure = Figure(figsize=(1, 1), facecolor=(0.0, 0.0, 0.0, 0.5))
    assert np.abs(pixels(figure).astype(int) - 127).max() <= 1
    figure.set_facecolor("none")
    assert (pixels(figure) == 255).all()


def test_pixels_are_those_of_the_file() -> None:
    figure, stored = Figure(figsize=(1, 1)), io.BytesIO()
    figure.add_subplot()
    figure.savefig(stored, dpi=100)
    stored.seek(0)
    np.testing.assert_array_equal(pixels(figure), np.round(255 * imread(stored)[..., :3]))
