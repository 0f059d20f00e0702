"""The models of an audit: the original, the one to audit, and maybe one that never knew."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from geffect.checkpoints.folders import check_folder, is_adapter, positions_of, vocabulary_of
from geffect.checkpoints.loading import whole_of
from geffect.devices import out_of_memory, there
from geffect.notes import line_of
from geffect.risk import limits

ORIGINAL, RETRAINED, UNLEARNED = "original", "retrained", "unlearned"
ROLES = (ORIGINAL, RETRAINED, UNLEARNED)
"""The model that has learned all data; one that was trained without what is to be forgotten; and
the one that is audited. Several that were retrained are "retrained 1", "retrained 2" and so on,
and "retrained" is what they show on the mean."""

GGUF = ".gguf"

Source = nn.Module | str | os.PathLike[str]
"""A model, or where one is saved: a folder as `save_pretrained` leaves it, of a model or of an
adapter, or a GGUF file."""


@dataclass(frozen=True)
class AuditModels(Mapping[str, Source]):
    """The models of an audit by their roles, of which one at a time is loaded.

    - `retrained`: none, one, or a sequence of several that were trained from different seeds.
    - `base`: the model that adapters are for, where it is not at the place that they name.
    - `device`: where models are loaded; a model that is given stays where it is.

    >>> models = AuditModels(unlearned=nn.Linear(1, 1), original=nn.Linear(1, 1))
    >>> [*models]
    ['original', 'unlearned']
    >>> [*AuditModels(nn.Linear(1, 1), nn.Linear(1, 1), [nn.Linear(1, 1), nn.Linear(1, 1)])]
    ['original', 'retrained 1', 'retrained 2', 'unlearned']
    """

    unlearned: Source
    original: Source
    retrained: Source | Sequence[Source] | None = None
    base: str | os.PathLike[str] | None = None
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        _check_retrained(self.retrained)
        for role, source in self._sources.items():
            _check_source(role, source)
        if not any(kind_of(self[role]) == "adapter" for role in self) and self.base is not None:
            raise ValueError(
                f"`base` should go with an adapter, which it is the model of. Found `{self.base}`, "
                "and no adapter. Leave it out."
            )

    @property
    def _sources(self) -> dict[str, Source]:
        given = self.retrained
        several: Sequence[Source] = () if given is None else _listed(given)
        return {
            ORIGINAL: self.original,
            **dict(zip(retrained_roles(len(several)), several, strict=True)),
            UNLEARNED: self.unlearned,
        }

    def __getitem__(self, role: str) -> Source:
        return self._sources[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def loaded(self, role: str) -> nn.Module:
        """The model of a role: what was given, or what is read now, in eval mode.

        An adapter is merged into its model; a GGUF file is dequantised.
        """
        return self.read(self[role])

    def read(self, source: Source) -> nn.Module:
        """Any other model, as those of the roles are read."""
        if isinstance(source, nn.Module):
            return source
        device = there(self.device)
        if kind_of(source) == "gguf":
            model: nn.Module = _of_gguf(Path(source)).to(device)
            return model
        base = self.base if kind_of(source) == "adapter" else None
        return whole_of(source, base, device)


def retrained_roles(count: int) -> tuple[str, ...]:
    """What so many retrained models are called, each by itself.

    >>> retrained_roles(1), retrained_roles(2)
    (('retrained',), ('retrained 1', 'retrained 2'))
    """
    if count == 1:
        return (RETRAINED,)
    return tuple(f"{RETRAINED} {number}" for number in range(1, count + 1))


def limits_of(source: Source) -> tuple[int, int]:
    """For how many tokens a model has positions, and how many it knows, before it is loaded.

    No limit where nothing says so before: an adapter may have tokens that its base lacks.

    >>> limits_of(nn.Linear(1, 1)) == (sys.maxsize, sys.maxsize)
    True
    """
    if isinstance(source, nn.Module):
        return limits.positions_of(source), limits.vocabulary_of(source)
    if kind_of(source) != "folder":
        return sys.maxsize, sys.maxsize
    return positions_of(source) or sys.maxsize, vocabulary_of(source) or sys.maxsize


def kind_of(source: Source) -> str:
    """What a model is given as: "model", "folder", "adapter" or "gguf"."""
    if isinstance(source, nn.Module):
        return "model"
    if Path(source).suffix == GGUF:
        return "gguf"
    return "adapter" if is_adapter(source) else "folder"


def named(source: Source) -> str:
    """What a model is called in a report."""
    return type(source).__name__ if isinstance(source, nn.Module) else Path(source).name


def _is_several(source: object) -> TypeGuard[Sequence[Source]]:
    """Whether it is a sequence of models."""
    return isinstance(source, Sequence) and not isinstance(source, str)


def _listed(given: Source | Sequence[Source]) -> Sequence[Source]:
    return given if _is_several(given) else (cast(Source, given),)


def _check_retrained(given: object) -> None:
    """Refuse a sequence of no model, and one that holds a model twice: it has no spread."""
    if not _is_several(given):
        return
    told = {id(x) if isinstance(x, nn.Module) else str(x) for x in given}
    if not given or len(told) < len(given):
        found = "the same one twice" if given else "none"
        raise ValueError(
            "`retrained` should be models that were trained without the forget data, each from a "
            f"seed of its own. Found {found}. Pass each once, or leave `retrained` out."
        )


def _check_source(role: str, source: object) -> None:
    """Refuse what is no model before anything is loaded."""
    if isinstance(source, nn.Module):
        return
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"`{role}` should be a model, a folder of one, or a GGUF file. Found "
            f"{type(source).__name__}. Pass one of those."
        )
    path = Path(source)
    if path.suffix == GGUF:
        if not path.is_file():
            raise FileNotFoundError(
                f"`{role}` should be a file that exists. Found nothing at `{path}`. Check the path."
            )
        return
    check_folder(path)


def form_of(source: Source) -> str:
    """What a model is given as, and of a GGUF file in which format most of its numbers are.

    >>> form_of(nn.Linear(1, 1))
    'model'
    """
    kind = kind_of(source)
    if kind != "gguf" or isinstance(source, nn.Module):
        return kind
    counts: Counter[str] = Counter()
    for tensor in _gguf(Path(source)).GGUFReader(source).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return f"{kind}, {counts.most_common(1)[0][0]}"


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"`gguf` should be installed to read `{path}`. Found no such package. Run `pip install "
            "gguf`, or pass the folder of the model that it was made of."
        ) from error
    return gguf


def _of_gguf(path: Path) -> Any:
    _gguf(path)
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"A GGUF file should hold a causal language model that transformers reads. Found in "
            f"`{path}`: {line_of(error)}. Pass the folder of the model that it was made of."
        ) from error
    return loaded.eval()
