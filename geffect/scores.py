"""The tidy score table: what analyzers return and plots draw.

One row is one number. Columns are `step`, the name of the blocks (one of
`BLOCKS`), what tells rows of one step and block apart (`effect`, `risk`, ...), and `value`. Blocks
are ordered categories, so that a plot or a `groupby` keeps the order of the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class Score:
    """What the `value` of a table is: its name, its axis label with the unit, and how to draw it.

    `scale` is "symlog" for scores that span orders of magnitude around zero: a model that has
    memorised its data starts with almost no gradient and is six orders larger twenty steps later.
    """

    name: str
    label: str
    scale: Literal["linear", "symlog"] = "linear"
    limits: tuple[float, float] | None = None


BLOCKS = ("parameter", "layer", "group", "model", "tower", "expert")


def tidy(
    values: NDArray[np.float64],
    score: Score,
    *,
    steps: NDArray[np.int64],
    blocks: Sequence[str],
    by: str,
    **constants: pd.Categorical | str,
) -> pd.DataFrame:
    """The table of `values`, an array (step, block), with `constants` as further columns.

    >>> table = tidy(np.array([[1.0, 2.0]]), Score("twice", "twice"), steps=np.array([3]),
    ...              blocks=["embedding", "head"], by="layer")
    >>> table
       step      layer  value
    0     3  embedding    1.0
    1     3       head    2.0
    """
    n_steps, n_blocks = values.shape
    columns: dict[str, object] = {
        "step": np.repeat(steps, n_blocks),
        by: pd.Categorical(list(blocks) * n_steps, categories=list(blocks), ordered=True),
    }
    table = pd.DataFrame({**columns, **constants, "value": values.reshape(-1)})
    table.attrs["score"] = asdict(score)
    return table


def stack(tables: Mapping[str, pd.DataFrame], column: str) -> pd.DataFrame:
    """The tables below one another, told apart by a new `column` before `value`.

    >>> one = pd.DataFrame({"step": [0], "value": [1.0]})
    >>> stack({"ga": one, "npo": one}, "run")
       step  run  value
    0     0   ga    1.0
    1     0  npo    1.0
    """
    names = list(tables)
    labelled = []
    for name, table in tables.items():
        label = pd.Categorical([name] * len(table), categories=names, ordered=True)
        labelled.append(table.assign(**{column: label}))
    stacked = pd.concat(labelled, ignore_index=True)
    stacked.attrs = dict(labelled[0].attrs)
    return stacked[[*stacked.columns.drop([column, "value"]), column, "value"]]


def score_of(table: pd.DataFrame) -> Score:
    """What the values of the table are; a plain linear "value" where the table does not say."""
    said = table.attrs.get("score")
    return Score(**said) if said else Score("value", "value")


def blocks_of(table: pd.DataFrame) -> str:
    """The column that names the blocks: the first of `BLOCKS` that the table has."""
    for column in BLOCKS:
        if column in table.columns:
            return column
    raise ValueError(
        f"`table` should have one of the columns {', '.join(BLOCKS)}. "
        f"Found {', '.join(map(str, table.columns))}. Pass a table made by geffect.analysis."
    )
