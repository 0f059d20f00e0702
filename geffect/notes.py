"""What errors say beyond a sentence: where it was found, and of which argument."""

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


class OfArgument(ValueError):
    """An argument that is refused, in a sentence that may call it by another name.

    - `argument`: its name in Python.
    - `should`: what it should be, and what was found.
    - `choose`: what it may be instead, if that is known.

    >>> error = OfArgument("by", "be larger. Found a layer.", "model")
    >>> print(error)
    `by` should be larger. Found a layer. Choose by="model".
    >>> error.said_of("`--by`", "--by {}")
    '`--by` should be larger. Found a layer. Choose --by model.'
    """

    def __init__(self, argument: str, should: str, choose: str = "") -> None:
        super().__init__(argument, should, choose)
        self.argument, self.should, self.choose = argument, should, choose

    def __str__(self) -> str:
        return self.said_of(f"`{self.argument}`", f'{self.argument}="{{}}"')

    def said_of(self, subject: str, choice: str) -> str:
        """The sentence of another subject, and a choice as it is written there."""
        chosen = f" Choose {choice.format(self.choose)}." if self.choose else ""
        return f"{subject} should {self.should}{chosen}"
