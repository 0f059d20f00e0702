"""Tables of effects beside a run: a run file keeps their columns, and nothing of the rest."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect.scores import BLOCKS, SAYS, said
from geffect.store import Run

from .base import check_run
from .instances import SCORE

SAMPLES, TOKENS = "samples", "tokens"
"""The names under which the tables of `instances` and of `tokens` are kept."""

METRICS = "metrics"
"""That of what others measured of the model that a run left: columns `metric` and `value`."""


def as_columns(table: pd.DataFrame) -> Mapping[str, NDArray[np.generic] | list[str]]:
    """The columns as `recorder.keep_table(name, columns)` takes them: numbers, and lists of texts.

    >>> as_columns(pd.DataFrame({"sample": [0, 0], "layer": ["head", "head"]}))
    {'sample': array([0, 0]), 'layer': ['head', 'head']}
    """
    return {
        str(name): column.to_numpy()
        if pd.api.types.is_numeric_dtype(column)
        else [str(x) for x in column]
        for name, column in table.items()
    }


def kept(run: Run, name: str) -> pd.DataFrame:
    """The table that was kept under the name `SAMPLES` or `TOKENS`, as it was made.

    Blocks and risks are ordered categories again, in the order in which they come.

    >>> columns = {"value": np.array([1.0, 2.0]), "risk": ["retain", "forget"]}
    >>> list(kept(example_run(tables={TOKENS: columns}), TOKENS)["risk"].cat.categories)
    ['retain', 'forget']
    """
    check_run(run)
    table = pd.DataFrame(run.table(name))
    for column in (*BLOCKS, "risk"):
        if column in table:
            order = list(dict.fromkeys(table[column]))
            table[column] = pd.Categorical(table[column], categories=order, ordered=True)
    # An earlier geffect did not keep what the values are.
    return table if {*SAYS} <= {*table.columns} else said(table, SCORE)
