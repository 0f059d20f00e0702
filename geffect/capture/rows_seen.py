"""A row of a run as a rule that stops sees it: about to be written, or in a file already."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geffect.gram import inner, norm
from geffect.sources import FORGET, RETAIN, UPDATE
from geffect.store.reader import Run

from .rows import Entry

WATCHED = (FORGET, RETAIN, UPDATE)
"""The sources that the Gram matrix of a row is of, as a rule sees it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """A row, as far as a rule looks at it.

    `K` is the Gram matrix of forget gradient, retain gradient and update, summed over what the step
    moves; NaN for what the row has not.
    """

    step: int
    risk: float
    K: Floats
    lr: float

    @property
    def gain(self) -> float:
        """By how much the update raises the forget risk, to first order."""
        return float(inner(self.K, 0, 2))

    @property
    def harm(self) -> float:
        """By how much the update raises the retain risk, to first order."""
        return float(inner(self.K, 1, 2))

    @property
    def across(self) -> float:
        """The length of the forget gradient across the retain gradient."""
        along = float(inner(self.K, 0, 1)) / float(norm(self.K, 1)) if norm(self.K, 1) else 0.0
        across = float(inner(self.K, 0, 0)) - along**2
        return math.nan if math.isnan(across) else math.sqrt(max(0.0, across))


def entry_seen(entry: Entry) -> Seen:
    """A row that is about to be written, as a rule sees it."""
    measured = entry.measured
    risk, gram = measured.losses.get(FORGET, math.nan), measured.gram.numpy()
    K = _watched(measured.names, gram if entry.stepped is None else gram[[*entry.stepped]])
    return Seen(entry.step, risk, K, entry.lr)


def rows_seen(run: Run | None) -> Iterator[Seen]:
    """The steps of a run that a rule looks at: those that were not skipped."""
    if run is None:
        return
    gram, stepped, lr, skipped = run.gram(), run.stepped(), run.column("lr"), run.column("skipped")
    risks = run.losses().get(FORGET, np.full(len(run.steps), np.nan))
    for row, step in enumerate(run.steps):
        if not skipped[row]:
            K = _watched(run.sources, gram[row, stepped[row]])
            yield Seen(int(step), float(risks[row]), K, float(lr[row]))


def _watched(names: Sequence[str], gram: Floats) -> Floats:
    """Float64[3, 3], of what a rule looks at, from the Gram matrices of what the step moves."""
    summed = gram.sum(axis=0) if len(gram) else np.full(gram.shape[1:], np.nan)
    K = np.full((len(WATCHED), len(WATCHED)), np.nan)
    there = [i for i, name in enumerate(WATCHED) if name in names]
    of = [list(names).index(WATCHED[i]) for i in there]
    K[np.ix_(there, there)] = summed[np.ix_(of, of)]
    return K
