"""A run file that is written while training goes on."""

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .layout import Columns
from .processes import Home
from .schema import WAITED, Contents, Row

if TYPE_CHECKING:
    from .reader import Run


def waited_for_disk(run: "Run") -> tuple[float, int] | None:
    """For how many seconds training waited over how many rows; None where no gradients are kept."""
    table = run.table(WAITED) if WAITED in run.tables else {}
    if not {"seconds", "rows"} <= table.keys() or not len(table["seconds"]):
        return None
    return float(table["seconds"][0]), int(table["rows"][0])


class Writer(Protocol):
    """What takes the rows of a run, in order: on rank 0 all of them, on others what they hold."""

    def begin(self, contents: Contents) -> None:
        """Say what the rows hold, once, before the first of them."""

    def append(self, row: Row) -> None:
        """Take one row."""

    def amend(self, row: Row) -> None:
        """Take a row in the place of the last one."""

    def keep(self, name: str, columns: Columns) -> None:
        """Keep a table with the run, in the place of one of the same name."""

    def check_open(self) -> None:
        """Refuse to go on after the end, or after a failure."""

    def close(self, *, complete: bool) -> None:
        """End the run; one that is not complete stays marked as open."""


class BackgroundWriter:
    """A writer whose rows are written by a thread of its own, in order.

    At most `bound_bytes` wait for the disk, or one row that is larger by itself; `append` waits
    for room. The arrays of a row must not change after it was handed over. The next call raises
    what went wrong, once; rows that waited behind it are given up. `waited` is for how many seconds
    callers did; a run that is closed as complete has that as a table.
    """

    def __init__(self, writer: Writer, bound_bytes: int) -> None:
        self._writer = writer
        self._bound = bound_bytes
        self._rows: deque[Row] = deque()  # the first of them is being written
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._failed = self._ended = False
        self.waited = 0.0
        self._appended = 0
        self._home = Home()
        self._thread: threading.Thread | None = None

    def begin(self, contents: Contents) -> None:
        """Say what the rows hold, once, before the first of them."""
        self._writer.begin(contents)

    def append(self, row: Row) -> None:
        """Hand over one row."""
        self.check_open()
        size = row.nbytes
        if not self._is_writing:
            self._start()
        with self._changed:
            self._wait_until(lambda: not self._rows or self._waiting_bytes + size <= self._bound)
            self._raise()
            self._rows.append(row)
            self._appended += 1
            self._changed.notify_all()

    def amend(self, row: Row) -> None:
        """Put a row in the place of the last one, once that is written."""
        self.check_open()
        self._drain()
        self.check_open()
        self._writer.amend(row)

    def keep(self, name: str, columns: Columns) -> None:
        """Keep a table with the run, once the rows before it are written."""
        self.check_open()
        self._drain()
        self.check_open()
        self._writer.keep(name, columns)

    def check_open(self) -> None:
        """Raise what has gone wrong, or refuse to go on after the end, or in a forked process."""
        if not self._home.is_here:
            self._writer.check_open()
        with self._changed:
            self._raise()
            at_work = not (self._failed or self._ended)
        # While the thread is at work, the writer may be closed by an error that is on its way here.
        if not at_work:
            self._writer.check_open()

    def close(self, *, complete: bool) -> None:
        """Wait until everything is written, and close the file; not in a forked process."""
        if not self._home.is_here:
            return
        self._drain()
        atexit.unregister(self._drain)
        with self._changed:
            was_ended, self._ended = self._ended, True
            self._changed.notify_all()
            self._raise()
        if complete and self._appended and not (was_ended or self._failed):
            told = {"seconds": np.array([self.waited]), "rows": np.array([self._appended])}
            self._writer.keep(WAITED, told)
        self._writer.close(complete=complete)

    def _start(self) -> None:
        """Start the thread, which keeps the writer alive until it is closed."""
        atexit.register(self._drain)  # of a program that ends without closing
        self._thread = threading.Thread(target=self._write, name="run file", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._ended)
                if not self._rows:
                    return
                row = self._rows[0]
            error = self._written(row)
            with self._changed:
                self._error = error
                self._failed = error is not None
                self._rows.popleft()
                if error is not None:
                    self._rows.clear()
                self._changed.notify_all()
            del row

    def _written(self, row: Row) -> BaseException | None:
        try:
            self._writer.append(row)
        except BaseException as error:
            # What waits behind it is given up: nothing may follow it in the file.
            with contextlib.suppress(Exception):
                self._writer.close(complete=False)
            return error
        return None

    def _drain(self) -> None:
        """Wait until no row waits; in a forked process, where nobody writes, for nothing."""
        if not self._home.is_here:
            return
        with self._changed:
            self._wait_until(lambda: not (self._rows and self._is_writing))

    def _wait_until(self, come: Callable[[], bool]) -> None:
        """Wait for the thread, which may not know its last row yet: an interrupt came before."""
        self._changed.notify_all()
        if come():
            return
        began = time.perf_counter()
        try:
            self._changed.wait_for(come)
        finally:
            self.waited += time.perf_counter() - began

    @property
    def _waiting_bytes(self) -> int:
        return sum(row.nbytes for row in self._rows)

    @property
    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
