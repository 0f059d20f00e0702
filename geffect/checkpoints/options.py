"""The options of a replay and of an edit: models, data files, the run file."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from geffect.capture.store_options import StoreOptions
from geffect.near import meant
from geffect.relearning import Relearned

from .folders import Folder

OnBatch = Callable[[str, int, int], None]
"""Told after each batch: the name of the checkpoint, how many batches it has had, of how many."""

Shown = Callable[[str, str], None]
"""Told of each file: the name of the set, and its first row as the model reads it, with what is
scored between [[ and ]]."""


class DataOptions(TypedDict, total=False):
    """How data files are read."""

    tokenizer: Any
    template: bool
    max_length: int | None
    batch_size: int
    seed: int | None
    show: Shown | None


class ReplayOptions(DataOptions, total=False):
    """The options of `geffect.replay`, each a keyword of it."""

    reference: Folder | None
    base: Folder | None
    device: str | torch.device | None
    relearned: Relearned | None
    update: bool
    store: str | StoreOptions
    metadata: Mapping[str, Any] | None
    overwrite: bool
    report: OnBatch | None


OF_DATA: DataOptions = {
    "tokenizer": None,
    "template": True,
    "max_length": None,
    "batch_size": 4,
    "seed": 0,
    "show": None,
}

DEFAULTS: ReplayOptions = {
    "reference": None,
    "base": None,
    "device": None,
    "relearned": None,
    "update": False,
    "store": "gram",
    "metadata": None,
    "overwrite": False,
    "report": None,
    **OF_DATA,
}


class EditOptions(DataOptions, total=False):
    """The options of `geffect.edit`, each a keyword of it."""

    run: Path | str | None
    base: Folder | None
    merge: bool
    device: str | torch.device | None
    store: str | StoreOptions
    metadata: Mapping[str, Any] | None


OF_EDITS: EditOptions = {
    "run": None,
    "base": None,
    "merge": False,
    "device": None,
    "store": "gram",
    "metadata": None,
    **OF_DATA,
    "seed": None,
}


def resolved(options: ReplayOptions) -> ReplayOptions:
    """All options, with their defaults where they are not given.

    >>> resolved({"batch_size": 8})["seed"]
    0
    >>> resolved({"batchsize": 8})
    Traceback (most recent call last):
    TypeError: An option of `replay` should be one of reference, base, ... Found `batchsize`. ...
    """
    _check_known("replay", options, DEFAULTS)
    return {**DEFAULTS, **options}


def resolved_edit(options: EditOptions) -> EditOptions:
    """The same of the options of an edit.

    >>> resolved_edit({"merge": True})["batch_size"]
    4
    """
    _check_known("edit", options, OF_EDITS)
    return {**OF_EDITS, **options}


def _check_known(of: str, options: Collection[str], known: Collection[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(
                f"An option of `{of}` should be one of {', '.join(known)}. Found `{name}`."
                f"{meant(name, known)} Choose one of those."
            )
