"""Relearning curves: how fast each model takes up again what it should have forgotten."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .conventions import Asked, picture
from .curves import curves_of_models


@picture(Line2D)
def relearning(table: pd.DataFrame, ax: Axes | None, asked: Asked) -> Axes:
    """A line a model, over the steps of further training.

    - `table`: `model`, `step` and `value`, with what the values are.
    - `ax`, `palette`, `hue_order`, `xlim`, `ylim`, `title`, keywords of lines: see
      `geffect.plots.conventions`.

    Returns the axes. An unlearned model that relearns faster than a retrained one had not
    forgotten.

    >>> table = pd.DataFrame({"model": "unlearned", "step": [0, 4], "value": [3.0, 0.5],
    ...                       "score": "NLL of the forget set", "unit": "nats per token"})
    >>> ax = relearning(table)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('step of further training', 'NLL of the forget set\\n(nats per token)')
    """
    return curves_of_models(table, "step", "step of further training", ax, asked)
