"""What fails on one of two processes fails on both."""

from geffect import distributed
from tests.utils import two_ranks


class Unsendable(Exception):
    """An error that pickle cannot bring back."""

    def __init__(self, path: str, *, why: str) -> None:
        super().__init__(f"{path}: {why}")


def failures_on_a_rank(error: Exception | None, culprit: int) -> tuple[str, str] | None:
    try:
        with distributed.raise_on_all_ranks():
            if error is not None and distributed.rank() == culprit:
                raise error
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return None


CULPRITS = range(two_ranks.RANKS)


def several_failures_on_a_rank() -> list[list[tuple[str, str] | None]]:
    """Of each process alone: of an error, and of none after it."""
    errors = FileExistsError("`path` should be new."), None
    return [[failures_on_a_rank(error, culprit) for error in errors] for culprit in CULPRITS]


def test_what_fails_on_one_process_fails_on_all() -> None:
    expected = [("FileExistsError", "`path` should be new."), None]
    assert two_ranks.run(several_failures_on_a_rank) == [[expected for _ in CULPRITS]] * 2


def unsendable_on_a_rank() -> tuple[str, str] | None:
    return failures_on_a_rank(Unsendable("run.h5", why="full"), 1)


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    first, second = two_ranks.run(unsendable_on_a_rank)
    assert first == ("RuntimeError", "Unsendable: run.h5: full")
    assert second == ("Unsendable", "run.h5: full")
