"""The whole runs that are damaged, and what is right of them."""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from geffect.store import Row, StoredGradients
from geffect.store.writer import RunWriter
from tests.utils.runs import PARAMETERS, SOURCES, contents_of, odd_row, row_of

FORMAT_2 = Path(__file__).parents[1] / "store" / "data" / "format_2.zip"
STEPS = 5


@dataclass(frozen=True)
class Original:
    """The files of a run, by their names beside each other; the first is the run file."""

    name: str
    files: dict[str, bytes]
    has_checksums: bool = True

    @property
    def run(self) -> str:
        """The name of the run file."""
        return next(iter(self.files))

    def put(self, folder: Path) -> Path:
        """Write the files into a folder, in the place of what is there."""
        for name, stored in self.files.items():
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(stored)
        return folder / self.run


def originals(folder: Path) -> tuple[Original, ...]:
    """A run that is complete, one whose writer was killed, and one of format 2."""
    whole, killed, old = (folder / name for name in ("whole", "killed", "format 2"))
    for place in (whole, killed, old):
        place.mkdir()
    _record(whole / "a.h5", complete=True)
    _record(killed / "a.h5", complete=False)
    with zipfile.ZipFile(FORMAT_2) as written:
        written.extractall(old)
    return (_read(whole), _read(killed), replace(_read(old), has_checksums=False))


def _read(folder: Path) -> Original:
    files = sorted(folder.rglob("*.h5"), key=lambda file: (file.name != "a.h5", file))
    return Original(folder.name, {str(f.relative_to(folder)): f.read_bytes() for f in files})


def _record(path: Path, *, complete: bool) -> None:
    """A run with all that there can be in one: its squares are those of its gradients."""
    rows = [_row(step) for step in range(STEPS)]
    writer = RunWriter(path, PARAMETERS)
    stored = StoredGradients("full", (0,), (((0, 6),),))
    writer.begin(replace(contents_of(rows[0]), gradients=stored))
    writer.keep("samples", {"text": ["naïve", "", "zwei\nZeilen"], "value": np.arange(3) / 3})
    for row in rows:
        writer.append(row)
    left = path.read_bytes()
    writer.close(complete=complete)
    if not complete:
        path.write_bytes(left)


def _row(step: int) -> Row:
    vector = np.zeros(6, "<f4")
    vector[step % 6] = step + 1
    gradients = {source: {"layer 0": {"values": vector}} for source in SOURCES}
    plain = row_of(step)
    return replace(
        odd_row(step),
        request=0,
        batch=0,
        gram=plain.gram,
        losses=plain.losses,
        stepped=np.array([True, step % 2 == 0]),
        gradients=gradients if step % 2 == 0 else None,
    )
