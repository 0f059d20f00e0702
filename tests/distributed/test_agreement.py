"""What fails on one of two processes fails on both."""

import pytest

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


@pytest.mark.parametrize("culprit", range(2))
def test_what_fails_on_one_process_fails_on_all(culprit: int) -> None:
    error = FileExistsError("`path` should be new.")
    answers = two_ranks.run(failures_on_a_rank, error, culprit)
    assert answers == [("FileExistsError", "`path` should be new.")] * 2
    assert two_ranks.run(failures_on_a_rank, None, culprit) == [None, None]


def unsendable_on_a_rank() -> tuple[str, str] | None:
    return failures_on_a_rank(Unsendable("run.h5", why="full"), 1)


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    first, second = two_ranks.run(unsendable_on_a_rank)
    assert first == ("RuntimeError", "Unsendable: run.h5: full")
    assert second == ("Unsendable", "run.h5: full")
