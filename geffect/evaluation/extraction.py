"""Extraction strength: how much of an answer has to be given for the model to say the rest."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geffect.batch import IGNORED, check_one_answer, on_device
from geffect.risk import RiskSet, as_batches, label_logits, undisturbed

from .ends import chosen_ends


def extraction_strength(
    model: nn.Module,
    batches: RiskSet,
    *,
    ends: Collection[int] | None = None,
    include_end: bool = False,
    legacy: Literal["open_unlearning", "uwc"] | None = None,
) -> NDArray[np.float64]:
    """ES = 1 - k/n of every sample: 1 where the question alone brings the whole answer out.

    k is the smallest number of tokens of the answer y_1 ... y_n that have to stand behind the
    question for greedy decoding to say y_{k+1} ... y_n (arXiv 2406.09179). It is the place of the
    last token that is not the most likely one behind all of the answer before it: one forward tells
    it exactly. A wrong last token gives 0.

    - `ends`: tokens that end an answer; by default those of the model's configuration.
    - `include_end`: whether such a token at the end of an answer is part of it.
    - `legacy`: what public code finds instead. "open_unlearning" leaves out the last labelled token
      whatever it is; if the last one left is wrong it gives 1/n, not 0, and 0 to an empty answer.
      "uwc", the code of arXiv 2406.09179, takes it for a match where the model ends too early, and
      bisects for k, which may miss the smallest. It also counts the words of the template: label
      the tokens from the length of the bare question on. Not done here: its limit of 200 tokens,
      and its text decoded and encoded again.

    Eval mode; the model stays as it was. Raises ValueError for a sample without an answer token.
    Where two tokens are nearly as likely, padding and precision may decide which is found.

    >>> from types import SimpleNamespace
    >>> class Next(nn.Module):  # a token is followed by the next one
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 9).float())
    >>> ids = torch.tensor([[1, 2, 3, 5], [1, 3, 4, 5]])
    >>> extraction_strength(Next(), {"input_ids": ids, "labels": ids}, ends=[5])
    array([1. , 0.5])
    """
    if legacy is not None and legacy not in LEGACY:
        raise ValueError(
            f"`legacy` should be one of {', '.join(LEGACY)}, or None. Found {legacy!r}. Leave it "
            "out."
        )
    measure = _exact if legacy is None else LEGACY[legacy]
    ended = chosen_ends(model, ends)
    stops = torch.tensor(sorted(ended), dtype=torch.long)
    device = next(model.parameters(), torch.empty(0)).device
    found: list[float] = []
    with undisturbed(model), torch.no_grad():
        for batch in as_batches(batches):
            check_one_answer(batch, "an extraction strength")
            logits, labels = label_logits(model, on_device(batch, device))
            likely, labels = logits.argmax(dim=-1).cpu(), labels.cpu()
            scored = labels != IGNORED
            answer = scored if include_end else scored & ~_are_ends(labels, ended)
            of_batch = measure(_Said(likely == labels, torch.isin(likely, stops), scored, answer))
            if bool(of_batch.isnan().any()):
                raise _without_answer(len(found) + int(of_batch.isnan().nonzero()[0]))
            found += of_batch.tolist()
    return np.array(found)


def strengths(right: Tensor, answer: Tensor) -> Tensor:
    """1 - k/n of every row, `Float64[row]`, where n tokens are its answer; NaN where none is.

    - `right`: whether a token is the most likely one behind all before it, `Bool[row, position]`.
    - `answer`: which tokens are those of the answer, in the same shape. k is the place among them
      of the last that is not right.

    >>> strengths(torch.tensor([[True, False, True, True]]), torch.tensor([[True] * 3 + [False]]))
    tensor([0.3333], dtype=torch.float64)
    """
    place = answer.cumsum(dim=1)
    last = place.where(answer & ~right, torch.zeros_like(place)).amax(dim=1)
    total = answer.sum(dim=1)
    return (total - last).double() / total


@dataclass(frozen=True)
class _Said:
    """What is most likely at the places of some labels, each `Bool[row, position]`.

    `right`: it is the label; `stops`: it ends an answer; `scored`, `answer`: labels, all of them
    and those that are counted.
    """

    right: Tensor
    stops: Tensor
    scored: Tensor
    answer: Tensor


def _exact(said: _Said) -> Tensor:
    return strengths(said.right, said.answer)


def _open_unlearning(said: _Said) -> Tensor:
    """As its loop over k, which ends at n - 1 at the latest."""
    answer = said.scored & ~_are_last(said.scored)
    total = answer.sum(dim=1).double()
    return strengths(said.right, answer).maximum(1 / total).where(total > 0, 0.0)


def _uwc(said: _Said) -> Tensor:
    """As its bisection, from the question on; of the whole answer it knows that it matches."""
    rows = zip(said.right, said.stops, said.answer, strict=True)
    return torch.tensor(
        [_bisected(right[of].tolist(), stops[of].tolist()) for right, stops, of in rows],
        dtype=torch.float64,
    )


def _bisected(right: list[bool], stops: list[bool]) -> float:
    total = len(right)
    if not total:
        return float("nan")
    matches = [True] * total  # behind k tokens, up to the first that is wrong
    for k in reversed(range(total)):
        matches[k] = stops[k] if not right[k] else k == total - 1 or matches[k + 1]
    low, high, before = 0, total, -1
    while (middle := (low + high) // 2) != before:
        low, high = (low, middle) if matches[middle] else (middle, high)
        before = middle
    return 1 - high / total


LEGACY: dict[str, Callable[[_Said], Tensor]] = {"open_unlearning": _open_unlearning, "uwc": _uwc}
"""What public code takes for an extraction strength, by its name."""


def _are_last(scored: Tensor) -> Tensor:
    return scored & (scored.flip(1).cumsum(dim=1).flip(1) == 1)


def _are_ends(labels: Tensor, ended: set[int]) -> Tensor:
    """Where the last scored token of a row ends an answer, `Bool[row, position]`."""
    is_last = _are_last(labels != IGNORED)
    return is_last & torch.isin(labels, torch.tensor(sorted(ended), dtype=labels.dtype))


def _without_answer(index: int) -> ValueError:
    return ValueError(
        "Each sample should have an answer token: a label that is not -100, before a token "
        f"that ends the answer. Found none in sample {index}. Leave it out, or mark its answer."
    )
