"""What a run file says once: the names of what its rows hold, and how they were made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import h5py
import numpy as np

from geffect.layers import Parameter, placed
from geffect.numbers import is_whole
from geffect.sketch import Sketch

from . import checksums
from .bounds import BoundedFile
from .schema import MARKS, Array, Contents, OtherSketch, StoredGradients

LISTED = 1 << 24
"""Texts that would take more bytes than this as an array, and four times what they have, are kept
as one text, JSON."""

WITHOUT_CHECKSUMS = (
    "manifest", "layers", "sources", "rectification_blocks", "weight_names", "sketch", "encoding",
)  # fmt: skip
"""The labels that a file of format 2 may have, beside those of the parameters."""


def is_text(value: str) -> bool:
    """Whether a text can be stored: without NUL, which ends it, and without half a character."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_name(value: str) -> bool:
    """Whether a text can be the name of something in a file.

    >>> is_name("forget"), is_name("a/b"), is_name(".."), is_name("")
    (True, False, False, False)
    """
    return is_text(value) and bool(value.strip(".")) and "/" not in value


def text(value: str) -> Array:
    """One text, as it is stored."""
    stored = value.encode()
    return np.array(stored, dtype=h5py.string_dtype("utf-8", max(1, len(stored))))


def texts(values: Sequence[str]) -> Array:
    """A list of texts, as it is stored.

    >>> texts(["naïve", ""]).tolist()
    [b'na\\xc3\\xafve', b'']
    """
    stored = [value.encode() for value in values]
    longest = max(map(len, stored), default=0)
    if longest * len(stored) > max(LISTED, 4 * sum(map(len, stored))):
        return text(json.dumps(list(values)))
    return np.array(stored, dtype=h5py.string_dtype("utf-8", max(1, longest)))


def as_texts(values: Array) -> list[str]:
    """The texts in what is stored of a list.

    >>> as_texts(texts(["naïve", ""]))
    ['naïve', '']
    """
    if values.dtype == object:  # of format 2, decoded already
        found = values.tolist()
    elif values.shape == ():
        found = json.loads(bytes(values[()]))
    else:
        found = [value.decode() for value in values.tolist()]
    if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
        raise ValueError("no list of texts where one should be")
    return found


@dataclass(frozen=True)
class Labels:
    """The labels of a file, by name, as they are stored; texts of format 2 as objects."""

    version: int
    arrays: Mapping[str, Array]

    def names(self, name: str) -> tuple[str, ...]:
        """A list of texts, each there once; empty where there is none."""
        found = as_texts(self.arrays[name]) if name in self.arrays else []
        if len(set(found)) < len(found):
            raise ValueError(f"a name that is there twice, in `{name}`")
        return tuple(found)

    def json(self, name: str) -> dict[str, Any]:
        """An object that is kept as JSON."""
        stored = self.arrays[name][()]
        found = json.loads(stored if isinstance(stored, str) else bytes(stored))
        if not isinstance(found, dict):
            raise ValueError(f"no JSON object in `{name}`")
        return found

    def contents(self) -> Contents:
        """What every row of the run holds."""
        return Contents(
            sources=self.names("sources"),
            manifest=self.json("manifest"),
            blocks=self.names("rectification_blocks"),
            weights=self.names("weight_names"),
            sketch=_sketch(self.json("sketch")) if "sketch" in self.arrays else None,
            gradients=self._gradients() if "encoding" in self.arrays else None,
            version=self.version,
        )

    def parameters(self) -> tuple[Parameter, ...]:
        """The table of parameters."""
        columns = {}
        for column in fields(Parameter):
            if f"parameters/{column.name}" not in self.arrays and column.default is not MISSING:
                continue  # it came later
            stored = self.arrays[f"parameters/{column.name}"]
            values = stored.tolist() if stored.dtype.kind == "i" else as_texts(stored)
            if column.name in ("shape", "tied_to"):
                values = [tuple(json.loads(value)) for value in values]
            columns[column.name] = values
        table = tuple(
            Parameter(**dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
        )
        if not all(_counts(*parameter.shape) for parameter in table):
            raise ValueError("a shape of a parameter that is none")
        return table if "tower" in columns else placed(table)

    def _gradients(self) -> StoredGradients:
        stored = self.json("encoding")
        gradients = StoredGradients(
            str(stored["encoding"]),
            tuple(stored["parameters"]),
            tuple(tuple((a, b) for a, b in ranges) for ranges in stored["ranges"]),
            stored.get("mark", 1),
        )
        table, indices = self.parameters(), gradients.parameters
        if not _counts(gradients.mark) or not 0 < gradients.mark < MARKS:
            raise ValueError(f"the mark {gradients.mark!r} of gradients")
        if not _counts(*indices) or len(set(indices)) < len(indices) or not gradients.ranges:
            raise ValueError("gradients of parameters that there are not")
        for i, index in enumerate(indices):
            # What no rank holds would be read as anything.
            reached = 0
            for begin, end in sorted(ranges[i] for ranges in gradients.ranges):
                if not _counts(begin, end) or (begin > reached and end > begin):
                    raise ValueError("a gradient with a part that no process holds")
                reached = max(reached, end)
            if reached != table[index].numel:
                raise ValueError("a gradient that is shorter or longer than its parameter")
        return gradients


def read_labels(file: BoundedFile) -> Labels:
    """The labels of a file; whether they are what was written, `read_committed` tells."""
    if file.version > 2:
        names = as_texts(file.array("labels"))
        return Labels(file.version, {name: file.array(name) for name in (*names, "labels")})
    held: dict[str, Array] = {
        name: file.texts_of_any_length(name) for name in WITHOUT_CHECKSUMS if name in file
    }
    for column in file.names("parameters"):
        name = f"parameters/{column}"
        numbers = file.dataset(name).dtype.kind == "i"
        held[name] = file.array(name) if numbers else file.texts_of_any_length(name)
    return Labels(file.version, held)


def labels_checksum(file: BoundedFile) -> int | None:
    """The checksum that the labels of a file should have. Format 2 has none."""
    if file.version < 3:
        return None
    return int(_record(file)[2])


def read_committed(file: BoundedFile, labels: Labels) -> tuple[int, bool]:
    """How many rows count, never more than there are, and whether the recorder was closed."""
    room = len(file.rows("steps/step", np.dtype("<i8"), 0, ()))
    if file.version < 3:
        state = file.attribute("state")
        if state not in ("open", "complete"):
            raise ValueError(f"the state {state!r}")
        count = int(file.dataset("committed", np.dtype("<i8"), ()).all())
        return min(max(count, 0), room), state == "complete"
    record = _record(file)
    rows, complete, written, _ = record.tolist()
    if (checksums.record_of(rows, written, complete=complete) != record).any() or rows > room:
        raise checksums.Changed("a count of its rows")
    if checksums.of_labels(labels.arrays) != written:
        raise checksums.Changed("labels or a manifest")
    return rows, bool(complete)


def _record(file: BoundedFile) -> Array:
    """Rows that count, whether the recorder was closed, and checksums of the labels and of this."""
    return file.dataset("committed", np.dtype("<i8"), (4,)).all()


def _sketch(described: Mapping[str, Any]) -> Sketch | OtherSketch:
    if not all(map(is_whole, described.values())):
        raise ValueError(f"the sketch {described}")
    try:
        return Sketch(**described)
    except ValueError:
        return OtherSketch(**described)


def _counts(*values: object) -> bool:
    """Whether these are whole numbers, none of them negative."""
    return all(is_whole(value, 0) for value in values)
