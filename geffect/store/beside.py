"""Work that is done while something is written."""

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

WORTH = 1 << 20
"""For fewer bytes than these a thread takes longer to begin than the work takes."""

Found = TypeVar("Found")


class Beside(Generic[Found]):
    """The answer to a question over so many bytes, found in a thread of its own.

    >>> Beside(lambda: 1 + 1, nbytes=WORTH).found()
    2
    """

    def __init__(self, ask: Callable[[], Found], nbytes: int) -> None:
        self._ask = ask
        self._answers: list[Found] = []
        self._thread = threading.Thread(target=self._answer, name="checksums", daemon=True)
        if nbytes >= WORTH:
            with contextlib.suppress(RuntimeError):  # at the end of a program none begins
                self._thread.start()

    def found(self) -> Found:
        """The answer, waited for, or found now."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._answers[0] if self._answers else self._ask()

    def _answer(self) -> None:
        with contextlib.suppress(Exception):  # which whoever asks again is going to see
            self._answers.append(self._ask())
