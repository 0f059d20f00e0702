"""What a batch is, what a pair of batches is, and where its answers are."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask`, `labels`, each (sample, position); label -100 is not scored."""

Pair = Mapping[str, Batch]
"""A batch of each side: {"forget": Batch, "retain": Batch}. A side may hold a batch of each of
several answers, {"original": Batch, "alternate": Batch}: its risk is that of the original."""

IGNORED = -100

ORIGINAL = "original"
"""Of several answers in a side the one whose risk is that of the side."""


def original_of(batch: Mapping[str, Any]) -> Batch:
    """The batch that the risk of a side is of: itself, or the original of several answers.

    >>> original_of({"original": {"labels": 1}, "alternate": {"labels": 2}})
    {'labels': 1}
    """
    found: Batch = batch.get(ORIGINAL, batch)
    return found


def batches_in(side: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Batch]]:
    """The batches of a side or a pair by their names; one inside of a side is `forget.alternate`.

    >>> pair = {"forget": {"original": {"labels": 1}, "alternate": {"labels": 2}}}
    >>> dict(batches_in(pair))
    {'forget.original': {'labels': 1}, 'forget.alternate': {'labels': 2}}
    """
    if not any(isinstance(inside, Mapping) for inside in side.values()):
        yield name, side
        return
    for inner, inside in side.items():
        yield from batches_in(inside, f"{name}.{inner}" if name else inner)


def side_of(pair: Mapping[str, Any], name: str) -> Batch:
    """The batch of a side, or of one inside of a side, `forget.alternate`.

    >>> pair = {"forget": {"original": {"labels": 1}, "alternate": {"labels": 2}}}
    >>> side_of(pair, "forget.alternate")
    {'labels': 2}
    """
    outer, _, inner = name.partition(".")
    found: Batch = pair[name] if name in pair else pair[outer][inner]
    return found


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch, or pair, with its tensors on a device; what is no tensor stays as it is."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return on_device(value, device)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in batch.items()}


def labels_of(batch: Batch) -> Tensor:
    """The labels `Int[sample, position]`; an error if there are none."""
    batch = original_of(batch)
    if "labels" not in batch:
        raise ValueError(
            "`batch` should have the key `labels`, with -100 where a token is not scored, or "
            f"several answers, one of them the `{ORIGINAL}`. Found the keys {', '.join(batch)}. "
            "Add labels that mark the answer tokens."
        )
    return batch["labels"]
