"""A figure as an array of pixels, for what shows images."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray


def pixels(figure: Figure, *, dpi: float = 100.0) -> NDArray[np.uint8]:
    """The figure on white, as UInt8[row, column, colour] in red, green and blue.

    - `dpi`: pixels per inch.

    >>> from matplotlib.figure import Figure
    >>> pixels(Figure(figsize=(2, 1)), dpi=50).shape
    (50, 100, 3)
    """
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=dpi)
    stored.seek(0)
    drawn = np.asarray(imread(stored, format="png"))
    opacity = drawn[..., 3:]
    colours: NDArray[np.uint8] = np.round(255 * (drawn[..., :3] * opacity + 1 - opacity))
    return colours.astype(np.uint8)
