"""Notes on errors: where it was found, beside what was found."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noting(note: str) -> Iterator[None]:
    """A block whose errors bear a note.

    >>> with noting("It was found in the second batch."):
    ...     raise ValueError("A batch should have rows.")
    Traceback (most recent call last):
    ValueError: A batch should have rows.
    It was found in the second batch.
    """
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def with_notes(error: BaseException, says: str | None = None) -> str:
    """What an error says, or is said of it, and its notes, on one line.

    >>> error = ValueError("A batch should have rows.")
    >>> error.add_note("It was found in the second batch.")
    >>> with_notes(error)
    'A batch should have rows. It was found in the second batch.'
    """
    return " ".join([says or str(error), *getattr(error, "__notes__", ())])


def line_of(error: BaseException, place: int = 0) -> str:
    """A line of what an error says, the first of them; its class where it says nothing.

    >>> line_of(ValueError("Two tensors differ:\\n  a, b")), line_of(ValueError())
    ('Two tensors differ:', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[place].strip()
