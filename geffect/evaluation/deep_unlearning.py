"""Deep unlearning: whether a fact is gone together with what it follows from, and what else is."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .edu_relat import Family, Target
from .minimal_sets import follows


@dataclass(frozen=True)
class DeepUnlearning:
    """How deeply a target is unlearned, and what is left of everything else; shares from 0 to 1.

    `minimal_set` is the one that is deleted most, M*. `succeeded`: the target no longer follows
    from the relationships that are left.
    """

    recall: float
    accuracy_relationships: float
    accuracy_biographies: float
    accuracy: float
    succeeded: bool
    minimal_set: tuple[int, ...]


def deep_unlearning(
    family: Family,
    target: Target,
    relationships_right: Sequence[bool] | NDArray[np.bool_],
    biographies_right: Sequence[bool] | NDArray[np.bool_],
    right_before: Sequence[bool] | NDArray[np.bool_] | None = None,
) -> DeepUnlearning:
    """Recall and accuracy of unlearning one target, from which questions are answered right.

    - `relationships_right`, `biographies_right`: one flag a fact, in the order of the family.
    - `right_before`: those of the relationships before unlearning. A fact that was not known then
      is not counted as unlearned, nor as lost. If left out, all were known.

    With U the unlearned relationships, n all of them, M a minimal set, and b biographies:

        recall = max over M of |U and M| / |M|,   M* the maximiser
        accuracy_relationships = 1 - |U without M*| / (n - |M*|)
        accuracy_biographies = the mean of their flags
        accuracy = (b accuracy_biographies + (n - |M*|) accuracy_relationships) / (b + n - |M*|)

    Of several maximisers M* is the one with the highest accuracy, then the smallest, then the
    first. Minimal sets are a sample, so that recall is a lower bound. From arXiv 2410.15153.
    """
    if not target.minimal_sets:
        raise ValueError(
            f"`target` should have minimal sets. Found none for the fact {target.fact}. Take some "
            "from geffect.evaluation.minimal_sets."
        )
    right = _flags("relationships_right", relationships_right, len(family.relationships))
    kept = _flags("biographies_right", biographies_right, len(family.biographies))
    before = right | True
    if right_before is not None:
        before = _flags("right_before", right_before, len(right))
    unlearned = {*np.flatnonzero(before & ~right).tolist()}

    def shares(chosen: Sequence[int]) -> tuple[Fraction, Fraction, Fraction]:
        inside, others = len(unlearned & {*chosen}), len(right) - len(chosen)
        left = others - (len(unlearned) - inside)
        relationships = Fraction(left, others) if others else Fraction(1)
        everything = Fraction(left + int(kept.sum()), others + len(kept))
        return Fraction(inside, len(chosen)), everything, relationships

    def order(chosen: tuple[int, ...]) -> tuple[Fraction, Fraction, int, tuple[int, ...]]:
        recall, everything, _ = shares(chosen)
        return -recall, -everything, len(chosen), chosen

    best = min(target.minimal_sets, key=order)
    recall, everything, relationships = shares(best)
    return DeepUnlearning(
        recall=float(recall),
        accuracy_relationships=float(relationships),
        accuracy_biographies=float(kept.mean()),
        accuracy=float(everything),
        succeeded=not follows(family.closure, target.fact, unlearned),
        minimal_set=best,
    )


def _flags(name: str, given: Sequence[bool] | NDArray[np.bool_], facts: int) -> NDArray[np.bool_]:
    flags = np.asarray(given)
    if flags.shape != (facts,) or not np.isin(flags, (0, 1)).all():
        raise ValueError(
            f"`{name}` should be {facts} flags, 1 where the answer is right, one a fact. Found "
            f"shape {flags.shape} of {flags.dtype}. Pass a flag for each fact of the family, in "
            "its order."
        )
    return flags.astype(bool)
