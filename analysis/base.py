"""The one way from a run to numbers: sum its Gram matrices over blocks of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from geffect.layers import Parameter, in_network_order
from geffect.scores import BLOCKS, Score
from geffect.sources import is_risk
from geffect.store import Run

Floats = NDArray[np.float64]

By = str | Callable[[Parameter], str]
"""What is summed over: "parameter", "layer", "group", "model", or a function that names a group."""

_LABELS: dict[str, Callable[[Parameter], str]] = {
    "parameter": lambda parameter: parameter.name,
    "layer": lambda parameter: parameter.layer,
    "group": lambda parameter: parameter.group,
    "model": lambda parameter: "model",
}
assert tuple(_LABELS) == BLOCKS


def summed_gram(run: Run, by: By, *, stepped_only: bool = False) -> tuple[list[str], Floats]:
    """The blocks in network order, and their Gram matrices (step, block, source, source).

    Inner products and squared norms of disjoint blocks add up; cosines do not, so they are taken
    from the sums. `by` may be a function from a parameter to the name of its block. With
    `stepped_only` the sum is over the parameters that the step moves, and NaN where it moves none
    of a block.
    """
    labels = list(map(label_of(by), run.layers))
    blocks = in_network_order(run.layers, labels)
    belongs = np.array([[label == block for label in labels] for block in blocks])
    gram = run.gram()
    stepped = run.stepped() if stepped_only else np.ones(gram.shape[:2], dtype=np.bool_)
    gram[~stepped] = 0.0
    summed = np.stack([gram[:, members].sum(axis=1) for members in belongs], axis=1)
    moved = np.stack([stepped[:, members].any(axis=1) for members in belongs], axis=1)
    summed[~moved] = np.nan
    return blocks, summed


def column_of(by: By) -> str:
    """The name of the column that holds the blocks."""
    return by if isinstance(by, str) else "group"


def risks_of(run: Run) -> Sequence[str]:
    """The sources that are risks: neither the objective, nor a part of it, nor derived."""
    return list(filter(is_risk, run.sources))


def in_space(run: Run, score: Score) -> Score:
    """The score, labelled where gradients are those of adapter factors: they do not compare."""
    adapted = run.manifest.get("model", {}).get("space") == "adapter"
    return replace(score, label=f"{score.label}, adapter space") if adapted else score


def label_of(by: By) -> Callable[[Parameter], str]:
    if callable(by):
        return by
    if by not in _LABELS:
        raise ValueError(
            f"`by` should be one of {', '.join(_LABELS)}, or a function from a parameter to the "
            f"name of its group. Found `by = {by!r}`. Choose one of those."
        )
    return _LABELS[by]
