"""A result that is computed in a thread while something is written."""

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

WORTH = 1 << 20
"""For fewer bytes than these a thread takes longer to begin than the work takes."""

Result = TypeVar("Result")


class Future(Generic[Result]):
    """The result of a function that reads `nbytes` bytes, computed in a thread of its own.

    >>> Future(lambda: 1 + 1, nbytes=WORTH).result()
    2
    """

    def __init__(self, function: Callable[[], Result], nbytes: int) -> None:
        self._function = function
        self._results: list[Result] = []
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
        if nbytes >= WORTH:
            with contextlib.suppress(RuntimeError):  # at the end of a program none begins
                self._thread.start()

    def result(self) -> Result:
        """The result: waits for the thread, or computes it now."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._results[0] if self._results else self._function()

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # `result` computes it again and raises
            self._results.append(self._function())
