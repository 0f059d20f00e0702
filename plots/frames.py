"""What panels share: their scale and blocks, and the colours and ticks that follow from these."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.colors import Colormap, LogNorm, Normalize, SymLogNorm

from geffect.scores import SAYS, score_of, scores_in

from .fit import blocks_in
from .inks import DIVERGING, NO_OR_YES, POSITIVE

LINEAR_SHARE = 0.8  # of a decade, on either side of zero, between the two logarithmic halves
MOST_DECADES = 6

FRAMES = "frames"
"""The attribute of a table that is a panel among others: the frame of each unit."""


@dataclass(frozen=True)
class Frame:
    """What panels side by side share: the largest magnitude, where the scale turns linear, blocks.

    >>> table = pd.DataFrame({"layer": ["head"] * 3, "value": [-3e2, 0.0, 2e-4]})
    >>> Frame.of(table)
    Frame(limit=300.0, threshold=0.001, blocks=['head'])
    """

    limit: float
    threshold: float
    blocks: list[str]

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Frame":
        """The frame handed on with the table by `framed`, else the table's own."""
        if said := table.attrs.get(FRAMES):
            return cls(**said[scores_in(table)[0].unit])
        magnitudes = table["value"].abs().to_numpy(dtype=float)
        magnitudes = magnitudes[np.isfinite(magnitudes) & (magnitudes > np.finfo(float).tiny)]
        largest = float(magnitudes.max(initial=0.0)) or 1.0
        # A few stray near-zeros would stretch the scale over decades that hold nothing.
        smallest = (
            float(np.quantile(magnitudes, 0.05, method="lower")) if magnitudes.size else largest
        )
        top = np.ceil(np.log10(largest))
        decade = np.clip(np.floor(np.log10(smallest)), top - MOST_DECADES, top - 1)
        limits = score_of(table).limits or (-largest, largest)
        return cls(max(map(abs, limits)), float(10.0**decade), blocks_in(table))


def framed(part: pd.DataFrame, whole: pd.DataFrame) -> pd.DataFrame:
    """The part, to be drawn on the scales of the whole, where it has a value to be scaled.

    Scales are those of the rows with the units of the part, blocks those of the whole.
    """
    if "value" not in whole:
        return part
    units = [score.unit for score in scores_in(part)]
    frames = {
        unit: asdict(replace(Frame.of(of_unit(whole, unit)), blocks=blocks_in(whole)))
        for unit in units
    }
    framed_part = part.copy()
    framed_part.attrs = {**whole.attrs, FRAMES: frames}
    return framed_part


def of_unit(table: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The rows whose values have this unit; all where the table names none."""
    return table[table["unit"].fillna("") == unit] if {*SAYS} <= {*table.columns} else table


def are_above_zero(table: pd.DataFrame) -> bool:
    """Whether values are of a score that is never negative, and none is zero.

    >>> weights = pd.DataFrame({"value": [0.1, 2.0], "score": "weight", "unit": "weight"})
    >>> are_above_zero(weights), are_above_zero(weights.assign(value=0.0))
    (True, False)
    """
    values = table["value"].dropna()
    return score_of(table).is_positive and len(values) > 0 and bool((values > 0).all())


def colours_of(table: pd.DataFrame) -> tuple[Colormap, Normalize]:
    """Map and norm: diverging and symmetric about zero, two colours where values are 0 or 1.

    >>> table = pd.DataFrame({"layer": ["embedding", "head"], "value": [-2.0, 0.5]})
    >>> cmap, norm = colours_of(table)
    >>> norm.vmin, norm.vmax
    (-2.0, 2.0)
    """
    score, frame = score_of(table), Frame.of(table)
    if are_above_zero(table):
        known = table["value"].to_numpy(dtype=float)
        known = known[np.isfinite(known)]
        return POSITIVE, LogNorm(known.min(), known.max() * (1 + 1e-9))
    if score.scale == "symlog":
        norm = SymLogNorm(
            linthresh=frame.threshold, linscale=LINEAR_SHARE, vmin=-frame.limit, vmax=frame.limit
        )
        return DIVERGING, norm
    if score.is_rate:
        return NO_OR_YES, Normalize(0.0, 1.0)
    return DIVERGING, Normalize(-frame.limit, frame.limit)


def all_blocks(table: pd.DataFrame) -> list[str]:
    """The blocks of the frame handed on with the table, else the table's own."""
    frames = table.attrs.get(FRAMES)
    return next(iter(frames.values()))["blocks"] if frames else blocks_in(table)


def units_of_sides(table: pd.DataFrame) -> list[str]:
    """The units of a table that a panel has room for: of effects, which have a sign, two."""
    found = {score.unit: score for score in scores_in(table)}
    have_signs = all(score.scale == "symlog" for score in found.values())
    return [*found] if have_signs and len(found) == 2 else [score_of(table).unit]
