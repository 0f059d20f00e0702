"""Truth ratios: how likely wrong answers are beside the right one, an item each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .tokens import Floats

Definition = Literal["share", "geometric", "tofu"]


def truth_ratio(
    right: ArrayLike, wrong: Sequence[ArrayLike], definition: Definition = "share"
) -> Floats:
    """The truth ratio of each item, by one of three definitions that are in use.

    - `right`: nll of the right answer, or of a paraphrase of it, `Float[item]`.
    - `wrong`: nll of each wrong answer, an array an item; their numbers may differ.
    - `definition`: with c = exp(-nll) of the right answer and w_j of the wrong ones,

          tofu = mean_j w_j / c               (arXiv 2401.06121)
          geometric = (prod_j w_j)^(1/k) / c  (its code for forget quality; open-unlearning)
          share = c / (c + w)                 with w the geometric mean; from 0 to 1

    NaN for an item without a wrong answer, where a nll is NaN, or where right and wrong answers are
    impossible. A high `share`, or a low ratio,
    says that the right answer is memorised.

    >>> truth_ratio([0.5, 2.0], [[1.0, 3.0], [1.0, 1.5]]).round(4)
    array([0.8176, 0.3208])
    """
    c, answers = _checked(right, wrong)
    if definition not in [*DEFINITIONS]:
        raise ValueError(
            '`definition` should be "share", "geometric" or "tofu". Found '
            f"{definition!r}. Choose one, and name it beside the numbers."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # infinitely likelier, or 0 / 0
        return DEFINITIONS[definition](c, answers)


def prob_options(right: ArrayLike, wrong: Sequence[ArrayLike]) -> Floats:
    """p_c / (p_c + sum_j p_j) of each item, with p = exp(-nll) of a whole answer (TOFU).

    The arguments are those of `truth_ratio`. 1/(k+1) where all k+1 answers are as likely.

    >>> prob_options([0.5, 2.0], [[1.0, 3.0], [1.0, 1.5]]).round(4)
    array([0.5922, 0.1863])
    """
    c, answers = _checked(right, wrong)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = _arithmetic(c, answers) * [len(w) for w in answers]
    return 1.0 / (1.0 + sums)


def closer_to_one(ratio: Floats) -> Floats:
    """min(r, 1/r) of truth ratios: 1 where right and wrong answers are as likely.

    So is a model that says anything, which is broken: never read it alone.
    """
    with np.errstate(divide="ignore"):
        return np.minimum(ratio, 1.0 / ratio)


def true_better(ratio: Floats) -> Floats:
    """max(0, 1 - r) of truth ratios: high where the right answer is likelier than wrong ones."""
    return np.maximum(0.0, 1.0 - ratio)


def _arithmetic(c: Floats, answers: Sequence[Floats]) -> Floats:
    return np.array([_mean(np.exp(c[i] - w)) for i, w in enumerate(answers)])


def _geometric(c: Floats, answers: Sequence[Floats]) -> Floats:
    ratio: Floats = np.exp(np.array([c[i] - _mean(w) for i, w in enumerate(answers)]))
    return ratio


DEFINITIONS: Mapping[Definition, Callable[[Floats, Sequence[Floats]], Floats]] = {
    "share": lambda c, answers: 1.0 / (1.0 + _geometric(c, answers)),
    "geometric": _geometric,
    "tofu": _arithmetic,
}


def _checked(right: ArrayLike, wrong: Sequence[ArrayLike]) -> tuple[Floats, list[Floats]]:
    c = np.asarray(right, dtype=np.float64)
    answers = [np.asarray(w, dtype=np.float64) for w in wrong]
    if c.shape != (len(answers),) or any(w.ndim != 1 for w in answers):
        raise ValueError(
            "`wrong` should be an array of nll for each item of `right`. Found shapes "
            f"{[w.shape for w in answers][:3]} and {c.shape}. Pass one array an item, empty where "
            "it has no wrong answer."
        )
    return c, answers


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
