"""Whether a run file is whole, and what is lost where it is not."""

import os
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from geffect.gram import inner, norm

from .reader import Floats, Run, open_run, opened
from .schema import ESTIMATES, RunFileError
from .segments import Segments

ROUNDING = 1e-9


@dataclass(frozen=True)
class Health:
    """The verdict on a run file: how many steps it holds, and what is wrong, in sentences."""

    steps: int
    complete: bool
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every committed step can be trusted."""
        return not self.problems


def validate(path: str | os.PathLike[str]) -> Health:
    """Read every committed row and check what must hold of any Gram matrix.

    Gradients that are kept whole are only checked to be there.

    Raises what `open_run` raises where the file cannot be opened at all.
    """
    run = open_run(path)
    complete = run.state == "complete"
    remarks = [] if complete else ["the recorder was not closed: being recorded, or killed"]
    if _half_written(run):
        remarks.append("one step was written but not committed, and is not shown")
    return Health(len(run.steps), complete, tuple(_problems(run)), tuple(remarks))


def _problems(run: Run) -> list[str]:
    problems = []
    keys = list(map(tuple, run.keys().tolist()))
    if any(later <= earlier for earlier, later in pairwise(keys)):
        problems.append("the steps are not in increasing order")
    K = run.read("gram")
    # Of the longest gradient: a declared difference of two long ones is rounded like those.
    squares = np.nan_to_num(np.abs(K.diagonal(axis1=-2, axis2=-1)), nan=0.0, posinf=np.inf)
    slack = ROUNDING * squares.max(axis=-1, initial=0.0)
    transposed = K.swapaxes(-1, -2)
    with np.errstate(invalid="ignore"):
        apart = np.abs(K - transposed) > slack[..., None, None]
    if apart.any() or (np.isnan(K) != np.isnan(transposed)).any():
        problems.append("a Gram matrix is not symmetric")
    if run.manifest.get("rows") != ESTIMATES:
        problems += _beyond_bounds(run, K, slack)
    return [*problems, *_missing_gradients(run, keys)]


def _beyond_bounds(run: Run, K: Floats, slack: Floats) -> list[str]:
    """What no Gram matrix of vectors can have."""
    problems = []
    for i, source in enumerate(run.sources):
        if (inner(K, i, i) < -slack).any():
            problems.append(f"a squared norm of `{source}` is negative")
        for j in range(i):
            with np.errstate(invalid="ignore"):  # a norm that is no number was named above
                bound = norm(K, i) * norm(K, j)
            if (np.abs(inner(K, i, j)) > bound * (1 + ROUNDING) + slack).any():
                problems.append(f"`{source}` and `{run.sources[j]}` are beyond |a||b|")
    return problems


def _missing_gradients(run: Run, keys: list[tuple[int, ...]]) -> list[str]:
    if run.contents.gradients is None:
        return []
    segments = Segments(run.contents, run.layers)
    problems = []
    for row, key in zip(run.read("stored").max(axis=1).tolist(), keys, strict=True):
        try:
            if row >= 0:
                segments.check(run.path, row, key)
        except RunFileError as error:
            problems.append(str(error))
    return problems


def _half_written(run: Run) -> bool:
    with opened(run.path) as file:
        further = file["gram"][len(run.drawn) : len(run.drawn) + 1]
    return bool(np.isfinite(further).any())
