"""How well a score tells members from texts that no model has seen, beside a retrained model.

The target is the AUC of the retrained model on the same two sets, not 0.5: which texts are held out
moves it by far.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .resampling import DRAWS, check_bootstrap, numbered, resamples
from .tokens import Floats

ENOUGH = 50
"""Items of either set below which an AUC says too little for a verdict."""

_AT_ONCE = 2**22


@dataclass(frozen=True)
class Membership:
    """The AUC of an unlearned and of a retrained model, and by how much they differ.

    - `unlearned`, `retrained`: P(score of holdout > score of forget), ties half; 1 where forget
      looks like training data.
    - `difference`: unlearned - retrained, positive where something is left; `low` and `high` are
      the bounds of its interval.
    - `privleak`: 100 ((1 - AUC_u) - (1 - AUC_g)) / (1 - AUC_g), see `privleak`.
    - `n_forget`, `n_holdout`: items with a score.
    """

    unlearned: float
    retrained: float
    difference: float
    low: float
    high: float
    privleak: float
    n_forget: int
    n_holdout: int

    @property
    def is_enough(self) -> bool:
        """Whether both sets have 50 items or more."""
        return min(self.n_forget, self.n_holdout) >= ENOUGH


@dataclass(frozen=True)
class Scores:
    """A score of each item of two sets under one model, as `geffect.evaluation.privacy` gives."""

    forget: ArrayLike
    holdout: ArrayLike


def auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """P(s_holdout > s_forget) + P(s_holdout = s_forget) / 2, over all pairs.

    - `forget`, `holdout`: scores that are high for what was not trained on. NaN is left out.

    1 where forget looks like training data, below the retrained model's where it is over-forgotten.

    >>> round(auc([0.2, 0.4, 1.0], [0.5, 0.9, 1.4, 2.0]), 6)
    0.833333
    """
    first, second = (_known(name, s) for name, s in (("forget", forget), ("holdout", holdout)))
    ordered = np.sort(first)
    below = np.searchsorted(ordered, second, side="left").sum()
    not_above = np.searchsorted(ordered, second, side="right").sum()
    return float((below + not_above) / (2 * len(first) * len(second)))


def privleak(unlearned: float, retrained: float | None) -> float:
    """100 ((1 - AUC_u) - (1 - AUC_g)) / (1 - AUC_g), of MUSE (arXiv 2407.06460).

    0 as retrained, negative where members still look like members, positive where they are
    over-forgotten. `unlearned` and `retrained` are AUCs of `auc`; nothing stands in for the
    retrained one. NaN where that is 1.

    >>> round(privleak(10 / 12, 0.52), 2)
    -65.28
    """
    for name, value in (("unlearned", unlearned), ("retrained", retrained)):
        if value is None or not 0 <= value <= 1:
            raise ValueError(
                f"`{name}` should be an AUC, from 0 to 1. Found {value}. Measure it by `auc` on "
                "the same two sets: without a retrained model there is no PrivLeak."
            )
    assert retrained is not None
    return 100 * (retrained - unlearned) / (1 - retrained) if retrained < 1 else float("nan")


def membership(
    unlearned: Scores,
    retrained: Scores,
    *,
    forget_subjects: Sequence[Hashable] | None = None,
    holdout_subjects: Sequence[Hashable] | None = None,
    replicates: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Membership:
    """The AUCs of both models and the interval of their difference, a paired bootstrap by subject.

    - `unlearned`, `retrained`: one and the same score of the same items under the two models. An
      item with NaN in either is left out of both.
    - `forget_subjects`, `holdout_subjects`: what each item is about. Items of one subject are drawn
      together; without them each item is its own. Of one subject alone there is no interval: NaN.
    - `replicates`: how often subjects of both sets are drawn anew, with replacement.

    >>> forget, holdout = [0.2, 0.4, 1.0], [0.5, 0.9, 1.4, 2.0]
    >>> same = membership(Scores(forget, holdout), Scores(forget, holdout), replicates=100)
    >>> same.difference, same.low, same.high, same.privleak
    (0.0, 0.0, 0.0, 0.0)
    """
    check_bootstrap(level, replicates)
    forget = _paired("forget", unlearned.forget, retrained.forget, forget_subjects)
    holdout = _paired("holdout", unlearned.holdout, retrained.holdout, holdout_subjects)
    first, second = (auc(forget.scores[i], holdout.scores[i]) for i in (0, 1))
    rng = np.random.default_rng(seed)
    drawn = [resamples(side.subjects, replicates, rng) for side in (forget, holdout)]
    pairs = drawn[0].sum(1) * drawn[1].sum(1)
    wins = [_wins(forget, holdout, model, drawn) for model in (0, 1)]
    differences = (wins[0] - wins[1]) / pairs
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    if 1 in (forget.count, holdout.count):
        low = high = np.nan
    return Membership(
        unlearned=first,
        retrained=second,
        difference=first - second,
        low=float(low),
        high=float(high),
        privleak=privleak(first, second),
        n_forget=len(forget.subjects),
        n_holdout=len(holdout.subjects),
    )


@dataclass(frozen=True)
class _Side:
    """One set: scores under both models `Float[model, item]`, and the number of each subject."""

    scores: Floats
    subjects: NDArray[np.int64]

    @property
    def count(self) -> int:
        """How many subjects there are."""
        return int(self.subjects.max()) + 1


def _paired(
    name: str, first: ArrayLike, second: ArrayLike, subjects: Sequence[Hashable] | None
) -> _Side:
    both = [np.asarray(values, dtype=np.float64) for values in (first, second)]
    of = list(range(both[0].size) if subjects is None else subjects)
    if both[0].ndim != 1 or both[0].shape != both[1].shape or len(of) != both[0].size:
        raise ValueError(
            f"Scores of `{name}` should be one for each item, under both models and with a subject "
            f"each. Found shapes {both[0].shape} and {both[1].shape}, and {len(of)} subjects. "
            "Evaluate both models on the same items."
        )
    known = np.array([not np.isnan(pair).any() for pair in zip(*both, strict=True)], dtype=np.bool_)
    _known(name, both[0][known])
    left = [subject for subject, is_known in zip(of, known, strict=True) if is_known]
    return _Side(np.stack(both)[:, known], numbered(left))


def _wins(forget: _Side, holdout: _Side, model: int, drawn: Sequence[Floats]) -> Floats:
    """The pairs of each replicate that holdout wins, ties half, `Float[replicate]`."""
    first, second = forget.scores[model], holdout.scores[model]
    total = np.zeros(len(drawn[0]))
    step = max(1, _AT_ONCE // len(second))
    for start in range(0, len(first), step):
        own = first[start : start + step, None]
        won = (second > own) + 0.5 * (second == own)
        total += np.einsum("ri,ih,rh->r", drawn[0][:, start : start + step], won, drawn[1],
                           optimize=True)  # fmt: skip
    return total


def _known(name: str, scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError(
            f"`{name}` should have scores of some items. Found none that is a number. See whether "
            "its items have answers."
        )
    return values
