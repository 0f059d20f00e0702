"""Folders of checkpoints: which step each is of, what it is, and what is read of it."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from geffect.risk.limits import POSITIONS, VOCABULARY, limit_in

from .hub import only_cached

Folder = str | os.PathLike[str]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_TOKENIZER = "tokenizer_config.json"
_SINGLE = ("adapter_model.safetensors", "model.safetensors")
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def by_step(folders: Sequence[Folder]) -> dict[int, Path]:
    """The checkpoints by the number of their step.

    Those named as trainers name them, `checkpoint-500`, have that number, and are put in its order;
    any other has the place after the one before it.

    >>> {step: str(folder) for step, folder in by_step(["original", "checkpoint-9"]).items()}
    {0: 'original', 9: 'checkpoint-9'}
    """
    paths = list(map(Path, folders))
    if not paths:
        raise ValueError("`checkpoints` should be one folder or more. Found none. Name some.")
    # Sorted among themselves: a shell gives checkpoint-10 before checkpoint-5.
    ordered = iter(
        sorted((p for p in paths if number_of(p) is not None), key=lambda p: number_of(p) or 0)
    )
    steps: dict[int, Path] = {}
    step = -1
    for path in (path if number_of(path) is None else next(ordered) for path in paths):
        own = number_of(path)
        previous, step = step, step + 1 if own is None else own
        if step <= previous:
            raise ValueError(
                f"The steps of `checkpoints` should increase. Found `{path}` after step "
                f"{previous}. Name them in the order of the run, each once; rename a folder to "
                "number it."
            )
        steps[step] = path
    return steps


def number_of(folder: Folder) -> int | None:
    """The step that a trainer gave to a checkpoint; None where it is named otherwise."""
    found = _NUMBERED.fullmatch(Path(folder).name)
    return int(found[1]) if found else None


def check_folder(folder: Folder) -> None:
    """Refuse what is no checkpoint, before anything is loaded."""
    path = Path(folder)
    should = (
        f"A checkpoint should be a folder with `{CONFIG}` or `{ADAPTER_CONFIG}` and safetensors, "
        "as save_pretrained leaves it."
    )
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise FileNotFoundError(f"{should} Found {found} at `{path}`. Check the path.")
    if not ((path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file()):
        raise FileNotFoundError(
            f"{should} Found a folder without either at `{path}`, with "
            f"{sorted(inside.name for inside in path.iterdir())[:5]}. Check the path."
        )


def is_adapter(folder: Folder) -> bool:
    """Whether a folder holds an adapter, which may name no model that it is for."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def base_of(folder: Folder) -> str | None:
    """Where an adapter says that its base model is, a folder or a name; None if it is none."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        said: str | None = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{path}` should say as `base_model_name_or_path` which model the adapter is for. "
            f"Found: {error!r}. Copy it anew, or save the adapter again."
        ) from error
    return said


def adapter_config_of(path: Path) -> Any:
    """How an adapter is set up; None for a checkpoint that is not one."""
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(
            f"`peft` should be installed to replay the adapter `{path}`. Found no such package. "
            "Run `pip install peft`."
        ) from error
    return PeftConfig.from_pretrained(str(path))


def config_of(source: Folder) -> Any:
    """The configuration of a model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, local_files_only=only_cached(source, CONFIG))


def positions_of(source: Folder) -> int | None:
    """For how many tokens a model has positions; None where its configuration does not say."""
    return limit_in(config_of(source), POSITIONS)


def vocabulary_of(source: Folder) -> int | None:
    """How many tokens a model knows; None where its configuration does not say."""
    return limit_in(config_of(source), VOCABULARY)


def encodes_apart(source: Folder) -> bool:
    """Whether a model is an encoder-decoder, which reads the question and the answer apart."""
    return bool(config_of(source).is_encoder_decoder)


def has_tokenizer(folder: Folder) -> bool:
    """Whether a folder holds a tokenizer."""
    return (Path(folder) / _TOKENIZER).is_file()


def tokenizer_of(folders: Iterable[Folder]) -> Any:
    """The tokenizer in the first of the folders that has one."""
    from transformers import AutoTokenizer

    folders = list(folders)
    for folder in folders:
        if has_tokenizer(folder):
            with legible(folder, "a whole tokenizer"):
                return AutoTokenizer.from_pretrained(folder)
    # A model that an adapter names by its name in a hub has no folder here, and maybe a tokenizer.
    unknown = []
    for source in filter(lambda folder: not Path(folder).is_dir(), folders):
        try:
            only = only_cached(source, _TOKENIZER)
        except FileNotFoundError as error:
            unknown.append(error)
            continue
        try:
            return AutoTokenizer.from_pretrained(source, local_files_only=only)
        except (OSError, ValueError):
            continue
    if unknown:
        raise unknown[0]
    raise FileNotFoundError(
        f"A tokenizer should be with the checkpoints. Found no `{_TOKENIZER}` in "
        f"{', '.join(f'`{folder}`' for folder in folders)}. Name the folder of one."
    )


def files_of(path: Path) -> dict[str, Path]:
    """The names of the tensors of a checkpoint, each with the file that it is in."""
    for file in filter(Path.is_file, (path / name for name in _SINGLE)):
        with legible(path), safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    # Where both are there, the index is of an earlier save: transformers leaves it, and the shards.
    index = path / f"{_SINGLE[-1]}.index.json"
    if index.is_file():
        with legible(path):
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: path / file for name, file in named.items()}
    raise FileNotFoundError(
        f"`{path}` should hold its weights as safetensors. Found "
        f"{sorted(inside.name for inside in path.iterdir())[:5]}. Save it again with "
        "save_pretrained."
    )


def tensors_of(path: Path, files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, one after the other, of the files that they are in."""
    for file in dict.fromkeys(files.values()):
        with legible(path), safe_open(file, framework="pt") as opened:
            for name in (name for name, place in files.items() if place == file):
                yield name, opened.get_tensor(name)


@contextmanager
def legible(
    source: Folder, what: str = "all of its weights, and the index, if any, of just these"
) -> Iterator[None]:
    """Names the checkpoint where something of it is missing or cut off.

    The name of a model in a hub has other errors, as of a network.
    """
    try:
        yield
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        if not Path(source).is_dir():
            raise
        raise ValueError(
            f"`{source}` should hold {what}. Found: {error}. Copy it anew, or save it again with "
            "save_pretrained."
        ) from error
