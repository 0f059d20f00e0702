"""The one way from a run to numbers: sum its Gram matrices over blocks of parameters."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from geffect.groups import By, label_of, label_of_expert
from geffect.layers import in_network_order
from geffect.notes import OfArgument
from geffect.places import EXPERT
from geffect.scores import BLOCKS, Score
from geffect.sources import is_risk
from geffect.store import Run

Floats = NDArray[np.float64]

Members = slice | list[int]
"""The places of the parts of a block."""


def check_run(run: object) -> None:
    """Refuse what is no run, such as the path of its file.

    >>> check_run("run.h5")
    Traceback (most recent call last):
    TypeError: `run` should be an open run. Found `str`. Pass geffect.open_run(path).
    """
    if not isinstance(run, Run):
        raise TypeError(
            f"`run` should be an open run. Found `{type(run).__name__}`. Pass "
            "geffect.open_run(path)."
        )


def check_steps(run: Run) -> None:
    """Refuse a run of which there is nothing to show yet, or nothing any more.

    >>> check_steps(example_run().until(-1))
    Traceback (most recent call last):
    ValueError: The run `example` should have a step. Found none. Record one, with resume=True.
    """
    check_run(run)
    if not len(run.steps):
        raise ValueError(
            f"The run `{run.name}` should have a step. Found none. Record one, with resume=True."
        )


def summed_gram(run: Run, by: By, *, stepped_only: bool = False) -> tuple[list[str], Floats]:
    """The blocks in network order, and their Gram matrices (step, block, source, source).

    Inner products and squared norms of disjoint blocks add up; cosines do not, so they are taken
    from the sums. `by` is one of `geffect.groups.LABELS`, or a function from a parameter to its
    block. With `stepped_only` the sum is over the parameters that the step moves, and NaN where it
    moves none of a block.
    """
    if stepped_only and not run.stepped().all():
        return run.once(("stepped", by), lambda: _sums_of_stepped(run, by))
    return run.once(("all", by), lambda: _sums(run, by))


def _sums(run: Run, by: By) -> tuple[list[str], Floats]:
    of, labels, gram = parts_of(run, by)
    return block_sums(run, (of, labels), gram)


def _sums_of_stepped(run: Run, by: By) -> tuple[list[str], Floats]:
    of, labels, gram = parts_of(run, by)
    blocks, belongs = _members(run, of, labels)
    stepped = run.stepped()[:, of]
    summed = _summed(np.where(stepped[..., np.newaxis, np.newaxis], gram, 0.0), belongs)
    moved = np.stack([stepped[:, members].any(axis=1) for members in belongs], axis=1)
    summed[~moved] = np.nan
    return blocks, summed


def block_sums(
    run: Run, parts: tuple[NDArray[np.int64], list[str]], values: Floats
) -> tuple[list[str], Floats]:
    """The blocks in network order, and the sums over each of an array (step, part, ...).

    - `parts`: of `parts_of` the first two.

    What is NaN makes its own block NaN, and no other.
    """
    blocks, belongs = _members(run, *parts)
    return blocks, _summed(values, belongs)


def _members(
    run: Run, of: NDArray[np.int64], labels: Sequence[str]
) -> tuple[list[str], list[Members]]:
    """The blocks in network order, and the parts that belong to each."""
    blocks = in_network_order([run.layers[i] for i in of], labels)
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return blocks, [_together(places[block]) for block in blocks]


def _together(places: list[int]) -> Members:
    """Places as a slice where they follow each other: nothing is copied that is read by it."""
    first, last = places[0], places[-1]
    return slice(first, last + 1) if last - first < len(places) else places


def _summed(values: Floats, belongs: Sequence[Members]) -> Floats:
    return np.stack([values[:, members].sum(axis=1) for members in belongs], axis=1)


def parts_of(run: Run, by: By) -> tuple[NDArray[np.int64], list[str], Floats]:
    """What is summed: the parameter that each part is of, its label, and (step, part, ...)."""
    return _experts(run) if by == "expert" else _parameters(run, by)


def _parameters(run: Run, by: By) -> tuple[NDArray[np.int64], list[str], Floats]:
    """Those where each parameter is one."""
    return np.arange(len(run.layers)), list(map(label_of(by), run.layers)), run.gram()


def _experts(run: Run) -> tuple[NDArray[np.int64], list[str], Floats]:
    """The same, with a part for each of the experts that a tensor holds."""
    mixed = [parameter for parameter in run.layers if parameter.role == EXPERT]
    if not mixed:
        raise OfArgument(
            "by", f"be `expert` for a model with experts. Found none in `{run.path}`.", "layer"
        )
    of = np.repeat(np.arange(len(run.layers)), [max(1, p.experts) for p in run.layers])
    label = label_of("expert")
    labels = [
        text
        for p in run.layers
        for text in [label_of_expert(p, i) for i in range(p.experts)] or [label(p)]
    ]
    gram = run.gram()[:, of]
    held = np.array([run.layers[i].experts > 0 for i in of])
    if held.any():
        single = run.expert_gram()
        if np.isnan(single).all() and not np.isnan(gram[:, held]).all():
            raise OfArgument(
                "by",
                "be `expert` for a run of measured gradients, as an estimator such as same_batch "
                f"makes. Found that `{run.path}` holds estimates for whole tensors.",
                "layer",
            )
        gram[:, held] = single
    return of, labels, gram


def column_of(by: By) -> str:
    """The name of the column that holds the blocks."""
    return by if isinstance(by, str) and by in BLOCKS else "group"


def risks_of(run: Run) -> Sequence[str]:
    """The sources that are risks: neither the objective, nor a part of it, nor derived."""
    return list(filter(is_risk, run.sources))


def in_space(run: Run, score: Score) -> Score:
    """The score, labelled where gradients are those of adapter factors: they do not compare."""
    adapted = run.manifest.get("model", {}).get("space") == "adapter"
    return replace(score, label=f"{score.label}, adapter space") if adapted else score
