"""Examples, and the batches that they are cut into."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from geffect.batch import IGNORED, Batch


@dataclass(frozen=True)
class Example:
    """The tokens of a row, and its labels: the tokens again where they are scored, else -100."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def batched(
    examples: Sequence[Example],
    size: int,
    *,
    seed: int | None = None,
    least: int = 1,
    even: bool = False,
    padding: int = 0,
) -> list[Batch]:
    """All examples once, in batches of at most `size` that differ by one example at most.

    Each is padded on the right to its own longest with the token `padding`, which is neither seen
    nor scored. With a `seed` the examples are shuffled before. Batches are smaller where there
    would be fewer than `least`, or an odd number and `even` is set, as far as there are examples.

    >>> three = [Example((5, 6, 7), (-100, 6, 7)), Example((5,), (5,)), Example((8, 9), (-100, 9))]
    >>> [batch["labels"].tolist() for batch in batched(three, 2)]
    [[[-100, 6, 7]], [[5, -100], [-100, 9]]]
    """
    if size < 1:
        raise ValueError(
            f"`batch_size` should be at least 1. Found {size}. Pass how many examples the memory "
            "holds at a time."
        )
    order = list(range(len(examples)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    count = max(-(-len(order) // size), min(least, len(order)))
    count += even and count % 2 and count < len(order)
    bounds = [len(order) * i // count for i in range(count + 1)]
    return [
        _batch([examples[i] for i in order[start:stop]], padding)
        for start, stop in pairwise(bounds)
    ]


def _batch(examples: Sequence[Example], padding: int) -> Batch:
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
