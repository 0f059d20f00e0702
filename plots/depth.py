"""Depth of forgetting: how much of an answer each block of a model still holds."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .conventions import Asked, picture
from .curves import curves_of_models


@picture(Line2D)
def depth(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A line a model, over the blocks from input to output.

    - `table`: `model`, `block`, the number of it, and `value`, with what the values are.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. A model whose line runs like that of the original holds the answer there.

    >>> table = pd.DataFrame({"model": "unlearned", "block": [0, 1], "value": [0.1, 2.0],
    ...                       "score": "fall of log p of the answer", "unit": "nats per token"})
    >>> depth(table).get_xlabel()
    'block, from input to output'
    """
    return curves_of_models(table, "block", "block, from input to output", ax, asked)
