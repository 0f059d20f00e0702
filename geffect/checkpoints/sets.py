"""The data of a replay or of an edit: files that are read, or batches that are ready."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geffect.batch import Batch, batches_in, on_device
from geffect.data.collate import batched, check_length, check_tokens, lengths_of, pad_token_of
from geffect.data.examples import read, spelled
from geffect.data.pairs import Items
from geffect.risk.limits import vocabulary_of

from .folders import Folder, encodes_apart, tokenizer_of
from .options import DataOptions

Data = str | os.PathLike[str] | Sequence[Batch]
"""A file or folder that `geffect.data.examples.read` reads, or batches that are ready."""


def sets_of(
    given: Mapping[str, Data],
    options: DataOptions,
    folders: Sequence[Folder],
    device: torch.device,
    *,
    positions: int | None,
    answers: Mapping[str, Sequence[str]] | None = None,
    least: int = 1,
    even: bool = False,
) -> dict[str, list[Batch]]:
    """The batches of each set, on the device, with the answers beside the original that are taken.

    - `folders`: where a tokenizer may be.
    - `positions`: how many tokens the model takes.
    - `answers`: which, by set; none by default.
    - `least`, `even`: as for `batched`.
    """

    @cache
    def tokenizer() -> Any:
        named = options["tokenizer"]
        if isinstance(named, str | os.PathLike):
            return tokenizer_of([named])
        return tokenizer_of(folders) if named is None else named

    sets: dict[str, list[Batch]] = {}
    for name, data in given.items():
        if isinstance(data, str | os.PathLike):
            items = read(
                data,
                tokenizer(),
                template=options["template"],
                answers=(answers or {}).get(name, ()),
                seed=options["seed"] or 0,
                max_length=options["max_length"],
                positions=positions,
            )
            if options["show"] is not None:
                for side, item in batches_in({name: items[0]}):
                    options["show"](side, spelled(item, tokenizer()))
            data = batched(
                items,
                options["batch_size"],
                pad_token_id=pad_token_of(tokenizer()),
                seed=options["seed"],
                least=least,
                even=even,
            )
        else:
            _check_ready(name, data, positions)
        sets[name] = [on_device(batch, device) for batch in data]
    return sets


def check_files(given: Mapping[str, Data], model: Folder) -> None:
    """Refuse files for an encoder-decoder."""
    files = [name for name, data in given.items() if isinstance(data, str | os.PathLike)]
    if files and encodes_apart(model):
        raise ValueError(
            f"`{files[0]}` should be batches for an encoder-decoder such as `{Path(model).name}`: "
            "rows of a file are read for a causal model, with the answer behind its question. "
            "Found a file. Tokenize question and answer apart, and pass "
            "geffect.data.collate.batched(items, batch_size)."
        )


def check_known(sets: Mapping[str, Items], model: nn.Module) -> None:
    """Refuse batches, or items, with tokens that the model does not know."""
    vocabulary = vocabulary_of(model)
    for name, batches in sets.items():
        for index in range(len(batches)):
            for _, side in batches_in(batches[index]):
                if "input_ids" in side:
                    check_tokens(side["input_ids"], vocabulary, f"`{name}`")


def _check_ready(name: str, batches: Sequence[Batch], positions: int | None) -> None:
    if not batches:
        raise ValueError(
            f"`{name}` should have a batch or more. Found none. Pass some, or a data file."
        )
    for number, batch in enumerate(batches):
        for length in lengths_of(batch):
            check_length(length, positions, f"batch {number} of `{name}`")
