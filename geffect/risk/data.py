"""The data of a risk: what it may be, and which of it is this process's share."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from geffect import distributed
from geffect.batch import IGNORED, Batch
from geffect.beside import random_numbers_kept
from geffect.notes import noting

RiskSet = Batch | Iterable[Batch]
"""The data of a risk: one batch, or what yields its batches in each pass over it."""


def as_batches(batches: RiskSet) -> Iterable[Batch]:
    """The batches of a risk, one after the other, as often as they are asked for."""
    if isinstance(batches, Mapping):
        return [batches]
    should = (
        "The data of a risk should be a batch, a list of batches or a loader, to be read "
        f"at each captured step. Found `{type(batches).__name__}`."
    )
    if isinstance(batches, str | os.PathLike | bytes):
        raise TypeError(
            f"{should} Read a file by `geffect.data.examples.read(path, tokenizer)`, and make "
            "batches of that by `geffect.data.collate.batched`."
        )
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(f"{should} Pass a list of it.")
    return batches


def noting_risk(risk: str) -> AbstractContextManager[None]:
    """A block whose errors say in a note which risk its data are of."""
    return noting(f"It was found in the data of risk `{risk}`.")


def check_each(sets: Mapping[str, RiskSet], check: Callable[[RiskSet], object]) -> None:
    """Run a check of data on each set; what it raises says in a note which one it is of."""
    for name, batches in sets.items():
        with noting_risk(name):
            check(batches)


def check_data(batches: RiskSet) -> None:
    """Refuse data whose first batch is none: not named tensors, or without labels.

    Leaves the random numbers as they were, also where a loader draws some to shuffle.

    >>> check_data([{"input_ids": [[5, 6]], "labels": [[5, 6]]}])
    Traceback (most recent call last):
    TypeError: A batch should map names to tensors. Found `list` as its `input_ids`. ...
    """
    with random_numbers_kept():
        first = next(iter(as_batches(batches)), None)
    if first is None:
        raise _without_batches()
    if not isinstance(first, Mapping):
        raise TypeError(
            "A batch should map names to tensors: `input_ids`, `attention_mask`, `labels`. Found "
            f"`{type(first).__name__}`. Pass such mappings, or a loader that collates its samples."
        )
    for name, value in first.items():
        if isinstance(value, list | tuple | np.ndarray):
            raise TypeError(
                f"A batch should map names to tensors. Found `{type(value).__name__}` as its "
                f"`{name}`. Make tensors of equal length of it, as a collator does that pads."
            )
    labels = first.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        found = (
            f"them with shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else f"the keys {', '.join(map(str, first))}"
        )
        raise ValueError(
            "A batch should have `labels`, a token for each position of each sample, with -100 "
            f"where it is not scored. Found {found}. Mark the answer tokens in labels, and put "
            "samples into batches."
        )


def share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of this process: every one there is, or of n processes every n-th.

    Each process gets as many as the others, since passes through FSDP2 are taken together: where
    its last is missing it gets one in which nothing is scored.
    """
    processes, rank = distributed.world_size(), distributed.rank()
    index = -1
    for index, batch in enumerate(batches):
        if index % processes == rank:
            yield batch
    if index < 0:
        raise _without_batches()
    if index % processes < rank:
        yield {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def _without_batches() -> ValueError:
    return ValueError(
        "The data of a risk should yield a batch in each pass over them. Found none. See "
        "whether the loader drops its last batch, or the list was filtered to nothing."
    )
