"""Extraction strength: how much of an answer has to be given for the model to say the rest."""

from collections.abc import Collection

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
) -> NDArray[np.float64]:
    """ES = 1 - k/n of every sample: 1 where the question alone brings the whole answer out.

    k is the smallest number of tokens of the answer y_1 ... y_n that have to stand behind the
    question for greedy decoding to say y_{k+1} ... y_n (arXiv 2406.09179). It is the place of the
    last token that is not the most likely one behind all of the answer before it: one forward tells
    it exactly. A wrong last token gives 0.

    - `ends`: tokens that end an answer; by default those of the model's configuration.
    - `include_end`: whether such a token at the end of an answer is part of it.

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
    ended = chosen_ends(model, ends)
    device = next(model.parameters(), torch.empty(0)).device
    found: list[float] = []
    with undisturbed(model), torch.no_grad():
        for batch in as_batches(batches):
            check_one_answer(batch, "an extraction strength")
            logits, labels = label_logits(model, on_device(batch, device))
            right, labels = (logits.argmax(dim=-1) == labels).cpu(), labels.cpu()
            answer = labels != IGNORED
            if not include_end:
                answer &= ~_are_ends(labels, ended)
            of_batch = strengths(right, answer)
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


def _are_ends(labels: Tensor, ended: set[int]) -> Tensor:
    """Where the last scored token of a row ends an answer, `Bool[row, position]`."""
    scored = labels != IGNORED
    is_last = scored & (scored.flip(1).cumsum(dim=1).flip(1) == 1)
    return is_last & torch.isin(labels, torch.tensor(sorted(ended), dtype=labels.dtype))


def _without_answer(index: int) -> ValueError:
    return ValueError(
        "Each sample should have an answer token: a label that is not -100, before a token "
        f"that ends the answer. Found none in sample {index}. Leave it out, or mark its answer."
    )
