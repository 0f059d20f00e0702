"""Whether a run file is whole, and what is lost where it is not."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from geffect.gram import inner, norm

from .layout import checksummed
from .opening import opened
from .reader import Floats, Run, open_run
from .rows import is_written
from .schema import ESTIMATES, NO_DAMAGE, ChecksumError, RunFileError

ROUNDING = 1e-9

NORMS, TINY = 1e-3, 2.0**-126
"""How far, beside what an encoding loses, a norm may be from that in the Gram matrix: in parts of
it, and for each coordinate, where numbers become subnormal."""


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
    """Read all of a run, hold it against its checksums, and check what any Gram matrix must have.

    So also of gradients that are kept whole: each is read, and its norm is held against the Gram
    matrix. A file of format 2 has no checksums, which is remarked on.

    Raises what `open_run` raises where the file cannot be opened at all.
    """
    run = open_run(path)
    complete = run.state == "complete"
    remarks = [] if complete else ["the recorder was not closed: being recorded, or killed"]
    if run.contents.version < 3:
        remarks.append(
            "format 2, which has no checksums: a number that changed and still could be one is "
            "not seen"
        )
    if changed := list(_changed(run)):
        return Health(len(run.steps), complete, tuple(changed), tuple(remarks))
    if _half_written(run):
        remarks.append("one step was written but not committed, and is not shown")
    return Health(len(run.steps), complete, tuple(_problems(run)), tuple(remarks))


def _changed(run: Run) -> Iterator[str]:
    """What differs from its checksum, or cannot be read."""
    reads: list[Callable[[], object]] = [
        partial(run.read, name) for name in checksummed(run.shapes)
    ]
    try:
        reads += [partial(run.table, name) for name in run.tables]
    except NO_DAMAGE:
        raise
    except RunFileError as error:
        yield str(error)
    for read in reads:
        try:
            read()
        except ChecksumError as error:
            yield f"{error.what} is not what was written: its checksum differs"
        except NO_DAMAGE:
            raise
        except RunFileError as error:
            yield str(error)


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
    if not _experts_add_up(run, K, slack):
        problems.append("the experts of a tensor do not add up to it")
    return [*problems, *dict.fromkeys(_gradients(run, K, keys))]


def _experts_add_up(run: Run, K: Floats, slack: Floats) -> bool:
    """Whether single experts, where they were measured, are parts of their tensors."""
    held = [i for i, parameter in enumerate(run.layers) if parameter.experts]
    if not held:
        return True
    begins = np.cumsum([0, *(run.layers[i].experts for i in held[:-1])])
    sums = np.add.reduceat(run.read("expert_gram"), begins, axis=1)
    return not (np.abs(sums - K[:, held]) > slack[:, held, None, None]).any()


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


def _gradients(run: Run, K: Floats, keys: list[tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with the gradients that are kept whole."""
    if run.contents.gradients is None:
        return
    segments, numbers = run.segments(), run.read("stored")
    exact = run.manifest.get("rows") != ESTIMATES
    for row, source in np.argwhere(numbers >= 0).tolist():
        name, key = run.sources[source], keys[row]
        try:
            layers = segments.read(run.path, name, int(numbers[row, source]), key)
        except NO_DAMAGE:
            raise
        except RunFileError as error:
            yield str(error)
            continue
        squares = K[row, :, source, source]
        for layer, found in zip(segments.layers, layers, strict=True):
            indices = [segments.stored.parameters[i] for i in segments.layers[layer]]
            if exact and not _is_as_long(found, squares[indices], segments.encoding.loss):
                yield (
                    f"the gradient of `{name}` in {layer} at step {key[1]} is not as long as its "
                    "Gram matrix says"
                )


def _is_as_long(found: NDArray[np.float32], squares: Floats, loss: float) -> bool:
    """Whether a gradient that an encoding changed by up to `loss` of its norm has these squares."""
    with np.errstate(invalid="ignore", over="ignore"):
        is_norm = float(np.linalg.norm(found.astype(np.float64)))
        should = float(np.sqrt(squares.sum()))
    if not (np.isfinite(is_norm) and np.isfinite(should)):
        return not np.isfinite(should) or loss > 0  # the largest numbers round to infinity
    slack = (loss + NORMS) * should + TINY * found.size**0.5
    return bool(abs(is_norm - should) <= slack)


def _half_written(run: Run) -> bool:
    """Whether the row after the last that counts was begun."""
    with opened(run.path) as file:
        return is_written(file, "gram", len(run.drawn), run.shapes["gram"])
