"""The reference as what it said of the answer tokens, in memory or in a file."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from geffect.batch import IGNORED, Batch, batches_in, labels_of, original_of
from geffect.drafts import draft_of

from .reference import Reference

KIND = "geffect.objectives.Likelihoods"
"""What a file of them says that it is."""

_HEAD = b'{"__metadata__":'
"""How files of safetensors with metadata begin, behind a length of 8 bytes."""

_OF_TOKENS = ("attention_mask", "input_ids", "inputs_embeds", "position_ids", "token_type_ids")
"""Columns with a value for each token; of others none is believed to be one for its shape."""

_DIGEST = 16  # bytes; two rows of a corpus share one by chance once in 2^64 corpora


class Likelihoods:
    """The reference as what it said of the answer tokens of some rows: the model can go.

    A row is known by what the model is given and scored on, without the padding behind it. So rows
    may be shuffled, batched and padded on the right in another way when they are asked for.

    - `reference`: a `FrozenModel` or an `AdapterBase`, asked once for each batch.
    - `batches`: batches or sides of several answers, with every row that is going to be asked for.

    Raises ValueError for a row that is not kept.

    >>> from types import SimpleNamespace
    >>> from geffect.objectives import FrozenModel
    >>> uniform = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> ids = torch.tensor([[0, 1, 2], [3, 3, 3]])
    >>> kept = Likelihoods(FrozenModel(uniform), [{"input_ids": ids, "labels": ids}])
    >>> kept.log_probabilities({"input_ids": ids[:1], "labels": ids[:1]})  # - log 4
    tensor([[-1.3863, -1.3863]])
    >>> kept
    Likelihoods(2 rows, 4 tokens)
    """

    def __init__(self, reference: Reference, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Mapping):
            raise TypeError(
                "`batches` of Likelihoods should be a list of batches. Found one batch. Pass "
                "Likelihoods(reference, [batch])."
            )
        self._rows: dict[bytes, Tensor] = {}
        self._first = 1
        for side in batches:
            for _, batch in batches_in(side):
                log_p, labels = reference.log_probabilities(batch).cpu(), labels_of(batch).cpu()
                # A causal model predicts all labels but the first.
                self._first = labels.shape[1] - log_p.shape[1]
                scored = labels[:, self._first :] != IGNORED
                keys = _keys(batch, self._first)
                for key, values, where in zip(keys, log_p, scored, strict=True):
                    self._rows[key] = values[where]

    def __repr__(self) -> str:
        tokens = sum(map(len, self._rows.values()))
        return f"{type(self).__name__}({len(self._rows)} rows, {tokens} tokens)"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The likelihoods that `save` wrote.

        Raises ValueError for a file of another kind, or with another checksum.
        """
        from safetensors import SafetensorError, safe_open

        found = cls.__new__(cls)
        try:
            if Path(path).is_dir():
                raise ValueError("a folder")
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("rows", "counts", "values")}
            if said != _said(tensors, int(said["first"])):
                raise ValueError("other numbers than were written")
            found._first = int(said["first"])
            values = tensors["values"].split(tensors["counts"].tolist())
            found._rows = dict(zip(map(bytes, tensors["rows"].numpy()), values, strict=True))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`{Path(path).name}` should be a file that Likelihoods.save wrote. Found one that "
                f"is none, or is damaged: {error}. Keep the likelihoods again, and save them."
            ) from error
        return found

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write them to a file of safetensors, for a training that begins without the model.

        Raises FileExistsError where there is a file and `overwrite` is not set, or one that holds
        no likelihoods.
        """
        from safetensors.torch import save_file

        place = Path(path).resolve()  # of a link what it points to
        if place.exists() and not overwrite:
            raise FileExistsError(
                f"A file of likelihoods should not exist yet. Found `{place}`. Choose another "
                "name, or pass overwrite=True."
            )
        if place.exists() and not _holds_likelihoods(place):
            raise FileExistsError(
                f"`overwrite` should find a file of likelihoods to replace. Found `{place}`, which "
                "is none. Choose another name; or remove that file, if nobody needs it."
            )
        values = [*self._rows.values()]
        keys = torch.tensor([[*key] for key in self._rows], dtype=torch.uint8)
        tensors = {
            "rows": keys.reshape(-1, _DIGEST),
            "counts": torch.tensor([len(row) for row in values], dtype=torch.int64),
            "values": torch.cat(values) if values else torch.empty(0),
        }
        with draft_of(place) as draft:
            save_file(tensors, draft, _said(tensors, self._first))
            draft.replace(place)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """log p of every scored token, `Float[sample, position - 1]`; 0 where none is scored."""
        labels = labels_of(batch)
        scored = (labels != IGNORED)[:, self._first :]
        keys = [*_keys(original_of(batch), self._first)]
        known = [self._rows[key] for key in keys if key in self._rows]
        missing = len(keys) - len(known)
        if missing:
            raise ValueError(
                "`batch` should be of rows whose likelihoods are kept, with the same columns. "
                f"Found {missing} of {len(keys)} that are not. Keep those of all rows, or pass "
                "the model as a FrozenModel."
            )
        values = (torch.cat(known) if known else torch.empty(0)).to(labels.device)
        return torch.zeros(scored.shape, dtype=values.dtype, device=labels.device).masked_scatter(
            scored, values
        )

    def logits(self, batch: Batch) -> NoReturn:
        """Raises ValueError: only likelihoods are kept."""
        self._refuse("logits")

    def hidden_states(self, batch: Batch) -> NoReturn:
        """Raises ValueError: only likelihoods are kept."""
        self._refuse("hidden states")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"`reference` should give {what}. Found Likelihoods, which keeps those of the answer "
            "tokens alone. Pass the model as a FrozenModel."
        )


def _holds_likelihoods(path: Path) -> bool:
    """Whether a file is one that `save` wrote, also where it is damaged, or an empty one."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(1 << 12)
    return not head or (head.startswith(_HEAD, 8) and KIND.encode() in head)


def _said(tensors: Mapping[str, Tensor], first: int) -> dict[str, str]:
    """What a file says of itself, with a checksum, which safetensors has not."""
    checksum = zlib.crc32(str(first).encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].view(torch.uint8).numpy().tobytes(), checksum)
    return {"kind": KIND, "first": str(first), "checksum": f"{checksum:08x}"}


def _keys(batch: Batch, first: int) -> Iterator[bytes]:
    """What each row is known by: a digest of its columns, without the padding behind it.

    So too without the padding before it where positions are given; else the model counts it, and a
    token that is predicted from it depends on it. Labels before the `first` are not scored. What
    has no value for each token, such as an image, may be of any row, and counts for all of them.
    """
    labels = labels_of(batch).cpu()
    shape = batch.get("input_ids", labels).shape
    columns = {name: _by_row(batch[name], shape) for name in _OF_TOKENS if name in batch}
    by_token = {name: rows for name, rows in columns.items() if rows is not None}
    further = sorted(batch.keys() - by_token.keys() - {"labels"})
    of_all = _digest({name: batch[name] for name in further})
    mask = by_token.get("attention_mask")
    attended = torch.ones(shape) if mask is None or mask.shape != shape else mask
    for i, row in enumerate(labels):
        row = row.clone()
        row[:first] = IGNORED
        tokens = _extent(attended[i] != 0, whole_begin="position_ids" not in by_token)
        begin, end = 0, _extent(row != IGNORED, whole_begin=True).stop
        if first and labels.shape == shape:
            begin = 0 if (row[: tokens.start + 1] != IGNORED).any() else tokens.start
            tokens = slice(begin, max(tokens.stop, end))
        own = {name: rows[i, tokens] for name, rows in by_token.items()}
        yield _digest({"all": of_all, "labels": row[begin:end], **own})


def _by_row(value: Any, shape: torch.Size) -> Tensor | None:
    """What has a value for each token, rows first; None where it has none."""
    if not isinstance(value, Tensor):
        return None
    if value.shape[1:] == shape:  # several counts of a token, as of positions in an image
        return value.cpu().movedim(0, -1)
    return value.cpu() if value.shape[:2] == shape else None


def _digest(values: Mapping[str, Any]) -> bytes:
    """One of names and values, whatever type of number holds them."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for name, value in values.items():
        digest.update(f"{name} {getattr(value, 'shape', '')}".encode())
        if isinstance(value, Tensor):
            plain = value.double() if value.is_floating_point() else value.long()
            digest.update(plain.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(_digest(value) if isinstance(value, Mapping) else repr(value).encode())
    return digest.digest()


def _extent(there: Tensor, *, whole_begin: bool) -> slice:
    """From the first to the last that is there, or from the very first."""
    places = there.nonzero().flatten().tolist() or [-1]
    return slice(0 if whole_begin else max(places[0], 0), places[-1] + 1)
