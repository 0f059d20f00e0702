"""The tidy score table: what analyzers return and plots draw.

One row is one number. Columns are `step`, the name of the blocks (one of `BLOCKS`), what tells rows
of one step and block apart (`effect`, `risk`, ...), `value`, and what the value is: `score` in
words and its `unit`. So a table that was merged, or written as CSV and read again, says what it
holds. Blocks are ordered categories, so that a plot or a `groupby` keeps the order of the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

PER_RATE, PER_TOKEN = "nats per unit learning rate", "nats per token"
"""Units of effects, which span orders of magnitude around zero."""

COSINE, WEIGHT = "cosine", "weight"

YES_OR_NO = "0 or 1"
"""The unit of what holds or does not. Its mean is a rate, and its median says nothing."""

_LIMITS = {COSINE: (-1.0, 1.0), YES_OR_NO: (0.0, 1.0)}


@dataclass(frozen=True)
class Score:
    """What the `value` of a row is, in words, and its unit, which says how it is drawn.

    >>> Score("G-effect", PER_RATE).axis, Score("conflict", YES_OR_NO).axis
    ('G-effect (nats per unit learning rate)', 'rate of conflict (%)')
    """

    label: str
    unit: str = ""

    @property
    def scale(self) -> Literal["linear", "symlog"]:
        """How values are spread over an axis.

        Nats are "symlog": a model that has memorised its data starts with almost no gradient and is
        six orders larger twenty steps later. So are weights, which explode.
        """
        return "symlog" if self.unit.startswith("nats") or self.unit == WEIGHT else "linear"

    @property
    def limits(self) -> tuple[float, float] | None:
        """Between what the values lie, where the unit bounds them."""
        return _LIMITS.get(self.unit)

    @property
    def is_positive(self) -> bool:
        """Whether values are never below zero: weights."""
        return self.unit == WEIGHT

    @property
    def is_rate(self) -> bool:
        """Whether values are 0 or 1, and summed up by their rate."""
        return self.unit == YES_OR_NO

    @property
    def full(self) -> str:
        """The label with the unit, where that is not in the label already."""
        said = self.unit in ("", COSINE, WEIGHT, YES_OR_NO)
        return self.label if said else f"{self.label} ({self.unit})"

    @property
    def axis(self) -> str:
        """What an axis of summed up values is called."""
        return f"rate of {self.label} (%)" if self.is_rate else self.full


BLOCKS = ("parameter", "layer", "group", "model", "tower", "expert")

LEVEL = "level"
"""The column that says that a constraint is of other blocks than those of the table."""

SAYS = ("score", "unit")
"""The columns that say what the value of a row is."""


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

    >>> table = tidy(np.array([[1.0, 2.0]]), Score("twice", "s"), steps=np.array([3]),
    ...              blocks=["embedding", "head"], by="layer")
    >>> table
       step      layer  value  score unit
    0     3  embedding    1.0  twice    s
    1     3       head    2.0  twice    s
    """
    n_steps, n_blocks = values.shape
    columns: dict[str, object] = {
        "step": np.repeat(steps, n_blocks),
        by: _named(np.tile(np.arange(n_blocks), n_steps), blocks),
    }
    saying = dict(zip(SAYS, (score.label, score.unit), strict=True))
    return pd.DataFrame({**columns, **constants, "value": values.reshape(-1), **saying})


def said(table: pd.DataFrame, score: Score) -> pd.DataFrame:
    """The table with the columns that say what its values are.

    >>> said(pd.DataFrame({"value": [1.0]}), Score("twice", "s"))
       value  score unit
    0    1.0  twice    s
    """
    return table.assign(score=score.label, unit=score.unit)


def beside(
    table: pd.DataFrame, name: str, numbers: NDArray[np.float64] | pd.Series
) -> pd.DataFrame:
    """The table with a further column of numbers, which stands after `value`.

    >>> beside(pd.DataFrame({"value": [1.0], "unit": ["s"]}), "error", np.array([0.1]))
       value  error unit
    0    1.0    0.1    s
    """
    others = table.drop(columns=name, errors="ignore")
    others.insert(list(others).index("value") + 1, name, numbers)
    return others


def stack(tables: Mapping[str, pd.DataFrame], column: str) -> pd.DataFrame:
    """The tables below one another, told apart by a new `column` before `value`.

    >>> one = pd.DataFrame({"step": [0], "value": [1.0]})
    >>> stack({"ga": one, "npo": one}, "run")
       step  run  value
    0     0   ga    1.0
    1     0  npo    1.0
    """
    of = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
    stacked = pd.concat([*tables.values()], ignore_index=True)
    if column in stacked.columns:
        del stacked[column]
    stacked.insert(list(stacked.columns).index("value"), column, _named(of, list(tables)))
    return stacked


def _named(of: NDArray[np.int64], names: Sequence[str]) -> pd.Series:
    """A column of names, each told by its place among all, which is their order."""
    dtype = pd.CategoricalDtype(list(names), ordered=True)
    return pd.Series(pd.Categorical.from_codes(of, dtype=dtype))


def scores_in(table: pd.DataFrame) -> list[Score]:
    """What the values of the table are, each once; a plain "value" where it does not say.

    >>> scores_in(pd.DataFrame({"value": [1.0, 2.0], "score": ["a", "b"], "unit": ["s", "s"]}))
    [Score(label='a', unit='s'), Score(label='b', unit='s')]
    """
    if not {*SAYS} <= {*table.columns}:
        return [Score("value")]
    codes, names = [], []
    for column in SAYS:
        of, named = pd.factorize(table[column], use_na_sentinel=False)
        codes.append(of)
        # A unit that is empty comes back from a file as NaN.
        names.append(["" if pd.isna(name) else str(name) for name in named])
    labels, units = names
    pairs = [divmod(code, len(units)) for code in pd.unique(codes[0] * len(units) + codes[1])]
    found = dict.fromkeys(Score(labels[label], units[unit]) for label, unit in pairs)
    return [*found] or [Score("value")]


def score_of(table: pd.DataFrame) -> Score:
    """What the values of the table are together: they share a unit, and an axis.

    >>> score_of(pd.DataFrame({"value": [1.0, 2.0], "score": ["a", "b"], "unit": ["s", "s"]}))
    Score(label='a or b', unit='s')
    """
    found = scores_in(table)
    units = list(dict.fromkeys(score.unit for score in found))
    if len(units) > 1:
        raise ValueError(
            "`table` should have values of one unit, to share an axis. Found "
            f"{', '.join(repr(unit) for unit in units)}. Choose with "
            f"table[table['unit'] == {units[0]!r}], or draw a panel for each score with sheet or "
            "facets."
        )
    return Score(_together(list(dict.fromkeys(score.label for score in found))), units[0])


def _together(labels: Sequence[str]) -> str:
    """The labels as one, what they begin and end with said once.

    >>> _together(["cosine of a and b", "cosine of a before rectification and b"])
    'cosine of a (before rectification) and b'
    >>> _together(["G-effect before rectification", "G-effect of the update"])
    'G-effect before rectification or of the update'
    """
    if len(labels) == 1:
        return labels[0]
    words = [label.split() for label in labels]
    start = _alike(words)
    rest = [those[len(start) :] for those in words]
    end = _alike([those[::-1] for those in rest])[::-1]
    own = [" ".join(those[: len(those) - len(end)]) for those in rest]
    if not all(own) and any(own):
        return " ".join([*start, f"({' or '.join(filter(None, own))})", *end])
    return " ".join([*start, " or ".join(map(" ".join, rest))])


def _alike(several: Sequence[Sequence[str]]) -> list[str]:
    """What all of them begin with."""
    together = zip(*several, strict=False)
    return [word for word, *_ in takewhile(lambda those: len(set(those)) == 1, together)]


def in_common(table: pd.DataFrame) -> str:
    """What the values are, with the unit; of several scores the words that they begin with.

    >>> in_common(pd.DataFrame({"value": [1.0, 2.0], "score": ["a b", "a c"], "unit": "s"}))
    'a'
    """
    first, *others = scores_in(table)
    if not others:
        return first.full
    return " ".join(_alike([score.label.split() for score in (first, *others)]))


def blocks_of(table: pd.DataFrame) -> str:
    """The column that names the blocks: the first of `BLOCKS` that the table has."""
    for column in BLOCKS:
        if column in table.columns:
            return column
    raise ValueError(
        f"`table` should have one of the columns {', '.join(BLOCKS)}. "
        f"Found {', '.join(map(str, table.columns))}. Pass a table made by geffect.analysis."
    )
