"""A run while it is written: what there is to say of it now, read without a lock.

A step that was read is not read again while its checksums stay. So a look costs what is new, and
rows that were amended, dropped or replaced are seen.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .watch_courses import Course, joined, measured
from .watch_planned import following, planned_of
from .watch_view import State, View

if TYPE_CHECKING:
    from geffect import Run

SETTLED = 2.0
"""So many seconds after a file was written its time tells that it was not written again."""


@dataclass(frozen=True)
class _Read:
    """What was read of a run, and what tells whether it still stands."""

    labels: object = None
    sums: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), dtype=np.uint32))
    ends: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    courses: Mapping[str, Mapping[str, Course]] = field(default_factory=dict)

    def same_as(self, later: "_Read") -> int:
        """How many steps at the beginning are those of a later reading."""
        if self.labels != later.labels or self.sums.shape[1] != later.sums.shape[1]:
            return 0
        rows = min(len(self.sums), len(later.sums))
        differing = (self.sums[:rows] != later.sums[:rows]).any(axis=1)
        alike = int(differing.argmax()) if differing.any() else rows
        steps = min(len(self.ends), len(later.ends))
        ended = (self.ends[:steps] == later.ends[:steps]) & (self.ends[:steps] <= alike)
        return steps if ended.all() else int(ended.argmin())


class Followed:
    """A run file that is looked at again and again, from before it is there."""

    def __init__(self, path: Path, by: str = "layer") -> None:
        self._path, self._by = path, by
        self._began = time.time()
        self._stamp: tuple[int, ...] = ()
        self._known = _Read()
        self._view = View(path, State.WAITING, by)

    def look(self) -> View:
        """What there is to say now.

        Raises an OSError for what is no run, as long as none was found; later it is noted that the
        file cannot be read any more.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return self._without_file()
        age = max(0.0, time.time() - found.st_mtime)
        stamp = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            try:
                self._view = self._read()
            except OSError as error:
                if not (self._view.steps or _passes(error)):
                    raise
                return replace(self._view, age=age, notes=(str(error),))
            # A row may be written within the grain of the clock of files.
            self._stamp = stamp if age > SETTLED else ()
        self._view = replace(self._view, age=age)
        return self._view

    def _without_file(self) -> View:
        notes = self._view.notes
        if self._view.steps:
            notes, self._began = ("The file that was there is gone.",), time.time()
        self._stamp, self._known = (), _Read()
        age = time.time() - self._began
        self._view = View(self._path, State.WAITING, self._by, age=age, notes=notes)
        return self._view

    def _read(self) -> View:
        from geffect import open_run

        run = open_run(self._path)
        if not len(run.steps):
            self._known = _Read()
            return View(self._path, State(run.state), self._by)
        # Before the rows: a change between the two is seen at the next look.
        sums = run.checksums() if run.contents.version > 2 else np.empty((0, 0), dtype=np.uint32)
        read = _Read((run.contents, run.manifest, run.layers), sums, np.cumsum(run.rows))
        # One step is read at least, which tells what courses there are.
        same = min(self._known.same_as(read), len(run.steps) - 1)
        new, notes = run.latest(len(run.steps) - same), [*_stopped(run)]
        courses = {
            kind: joined(self._known.courses.get(kind, {}), found, same, len(new.steps))
            for kind, found in measured(new, self._by, notes)
        }
        self._known = replace(read, courses=courses)
        planned = planned_of(run)
        next_step, is_told = following(run, planned)
        return View(
            self._path,
            State(run.state),
            self._by,
            tuple(run.steps.tolist()),
            effects=tuple(courses["effects"].values()),
            totals=tuple(courses["totals"].values()),
            rates=tuple(courses["rates"].values()),
            losses=tuple(courses["losses"].values()),
            seconds=courses["seconds"]["seconds"].values[:, 0],
            next_step=next_step,
            planned=planned.steps if planned else None,
            is_told=is_told,
            notes=tuple(notes),
        )


def _stopped(run: "Run") -> Iterator[str]:
    """What a rule that stops has said."""
    from geffect.store.schema import STOP

    told = run.table(STOP) if STOP in run.tables else {}
    if {"clause", "message"} <= told.keys() and len(told["message"]):
        yield f"Stopped by `{told['clause'][0]}`: {told['message'][0]}"


def _passes(error: OSError) -> bool:
    """Whether it may come of a row, or a file, that is being written at this moment."""
    from geffect.store.schema import ChecksumError, ReplacedError

    return isinstance(error, ReplacedError) or (
        isinstance(error, ChecksumError) and not error.closed
    )
