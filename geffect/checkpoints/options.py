"""The options of a replay: its models, its data files, its run file."""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch

from geffect.capture.store_options import StoreOptions
from geffect.near import meant

from .loading import Folder

OnBatch = Callable[[str, int, int], None]
"""Told after each batch: the name of the checkpoint, how many batches it has had, of how many."""

Shown = Callable[[str, str], None]
"""Told of each file: the name of the set, and its first row as the model reads it, with what is
scored between [[ and ]]."""


class ReplayOptions(TypedDict, total=False):
    """The options of `geffect.replay`, each a keyword of it."""

    reference: Folder | None
    base: Folder | None
    device: str | torch.device | None
    tokenizer: Any
    template: bool
    max_length: int | None
    batch_size: int
    seed: int | None
    update: bool
    store: str | StoreOptions
    metadata: Mapping[str, Any] | None
    overwrite: bool
    report: OnBatch | None
    show: Shown | None


DEFAULTS: ReplayOptions = {
    "reference": None,
    "base": None,
    "device": None,
    "tokenizer": None,
    "template": True,
    "max_length": None,
    "batch_size": 4,
    "seed": 0,
    "update": False,
    "store": "gram",
    "metadata": None,
    "overwrite": False,
    "report": None,
    "show": None,
}


def resolved(options: ReplayOptions) -> ReplayOptions:
    """All options, with their defaults where they are not given.

    >>> resolved({"batch_size": 8})["seed"]
    0
    >>> resolved({"batchsize": 8})
    Traceback (most recent call last):
    TypeError: An option of `replay` should be one of reference, base, ... Found `batchsize`. ...
    """
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(
                f"An option of `replay` should be one of {', '.join(DEFAULTS)}. Found `{name}`."
                f"{meant(name, DEFAULTS)} Choose one of those."
            )
    return {**DEFAULTS, **options}
