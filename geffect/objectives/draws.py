"""Tokens drawn at random, each by a seed and by the text that it is drawn for.

No generator is drawn from: a draw is a hash. So it costs no synchronisation, changes no other
random number, and does not depend on what was drawn before.
"""

from typing import Any

import torch
from torch import Tensor

from geffect.batch import IGNORED, Batch, first_in_text, labels_of, masks_in, original_of, texts_in
from geffect.numbers import is_whole
from geffect.risk import predicts_next

STEP = 0x1E3779B97F4A7C15
"""Between the numbers that are hashed one after the other."""

# The constants of splitmix64, as signed integers.
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def drawn(model: Any, batch: Batch, vocabulary: int, seed: int) -> Tensor:
    """A token for every label that the model predicts, `Int[sample, position]`.

    Each is uniform among `vocabulary` tokens, and follows from the seed, the tokens of its text up
    to the last that is scored, and how many scored ones stand before it there. Padding, packing and
    the rows beside it change nothing. Positions are those of `token_log_probabilities`.

    >>> ids = torch.tensor([[3, 5, 7], [3, 5, 7]])
    >>> one, same = drawn(lambda input_ids: None, {"input_ids": ids, "labels": ids}, 50_000, seed=0)
    >>> torch.equal(one, same), one.tolist()
    (True, [37600, 38462])
    """
    batch = original_of(batch)
    labels, is_next = labels_of(batch), predicts_next(model)
    scored = labels != IGNORED
    if is_next:
        scored &= ~first_in_text(batch)
    text = texts_in(batch)
    count, total = _so_far(scored.long(), text)
    tokens = batch.get("input_ids", labels)
    attended = torch.ones_like(tokens, dtype=torch.bool)
    for mask in masks_in(batch):
        if mask.shape == tokens.shape:
            attended = mask.to(tokens.device) != 0
    if is_next and tokens.shape == labels.shape:
        attended &= count - scored.long() < total  # up to the last that is scored
        place, _ = _so_far(attended.long(), text)
        _, key = _so_far(_hashed(tokens.long() + STEP * place) * attended, text)
    else:  # the tokens of an encoder, which are one text
        place = attended.long().cumsum(dim=1)
        key = (_hashed(tokens.long() + STEP * place) * attended).sum(dim=1, keepdim=True)
    numbers = _hashed(_hashed(key ^ seed) + STEP * count)
    draws = (numbers & torch.iinfo(torch.long).max) % vocabulary
    return draws[:, 1:] if is_next else draws


def check_seed(owner: str, seed: int) -> None:
    """Refuse what is no seed."""
    if not (is_whole(seed, 0) and seed < 2**63):
        raise ValueError(
            f"`seed` of {owner} should be a whole number of 0 or more, below 2^63. Found "
            f"`seed = {seed!r}`. Pass a number such as {owner}(seed=0)."
        )


def _so_far(values: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of values up to each position of its text, and the sum over the text."""
    totals = values.new_zeros(len(values), text.shape[1] + 1).scatter_add(1, text, values)
    before = (totals.cumsum(dim=1) - totals).gather(1, text)
    return values.cumsum(dim=1) - before, totals.gather(1, text)


def _hashed(numbers: Tensor) -> Tensor:
    """Integers of 64 bits mixed as by splitmix64."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifted to the right, as unsigned numbers are."""
    shifted: Tensor = (numbers >> bits) & (2 ** (64 - bits) - 1)
    return shifted
