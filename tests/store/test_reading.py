"""What comes while a file is read, and says nothing of the file."""

import errno
import io
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from geffect.store import RunFileError, bounds, open_run, validate
from geffect.store.outside import open_plain
from geffect.store.writer import RunWriter
from tests.utils.runs import plain_rows, recorded
from tests.utils.stored_gradients import PARAMETERS, SOURCES, record

READS: dict[str, Callable[[Path], object]] = {
    "open": open_run,
    "gram": lambda path: open_run(path).gram(),
    "gradient": lambda path: open_run(path).gradient(SOURCES[1], 2),
    "validate": validate,
    "resume": lambda path: RunWriter(path, PARAMETERS, resume=True).close(complete=False),
}


class Failing(io.BufferedReader):
    """A file in which reading comes to an error."""

    def __init__(self, path: Path, fails: Callable[[], None]) -> None:
        super().__init__(open_plain(path).detach())  # type: ignore[attr-defined]
        self._fails = fails

    def readinto(self, buffer: Any) -> int:
        self._fails()
        return super().readinto(buffer)


@contextmanager
def failing(number: int, error: Callable[[], BaseException]) -> Iterator[list[int]]:
    """The read of this number in what HDF5 reads comes to an error; how many came."""
    count = [0]

    def fails() -> None:
        count[0] += 1
        if count[0] >= number:
            raise error()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "open_plain", lambda path: Failing(path, fails))
        yield count


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return record(tmp_path, "full", steps=5).path


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("part", [0.0, 0.4, 0.95])
def test_an_interrupt_is_raised_as_one(
    run: Path, read: Callable[[Path], object], part: float
) -> None:
    before = run.read_bytes()
    with failing(10**9, KeyboardInterrupt) as count:
        read(run)
    with pytest.raises(KeyboardInterrupt), failing(1 + int(part * count[0]), KeyboardInterrupt):
        read(run)
    assert run.read_bytes() == before
    assert validate(run).whole


def test_an_interrupt_that_was_handled_before_is_not_raised_for_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_text("no run")
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(RunFileError, match="not HDF5"):
            open_run(path)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("part", [0.0, 0.7])
@pytest.mark.parametrize(
    "error",
    [lambda: OSError(errno.EIO, "Input/output error"), lambda: MemoryError("no room for 9 GiB")],
    ids=["disk", "memory"],
)
def test_what_the_system_lacks_is_no_damage_and_costs_none_of_the_run(
    run: Path, read: Callable[[Path], object], part: float, error: Callable[[], BaseException]
) -> None:
    with failing(10**9, error) as count:
        read(run)
    with (
        failing(1 + int(part * count[0]), error),
        pytest.raises(RunFileError, match=r"readable here and now\. Found: .*(error|room).*mend"),
    ):
        read(run)
    assert validate(run).whole
    assert open_run(run).stored_steps.tolist() == [0, 2, 4]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_too_many_open_files_are_no_damage(run: Path, read: Callable[[Path], object]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as raised:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(RunFileError, match="Too many open files") as raised:
            read(run)
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "not HDF5" not in str(raised.value)
    assert validate(run).whole


def test_a_run_that_is_replaced_while_it_is_checked_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded(tmp_path / "a.h5", plain_rows(5))
    shorter = recorded(tmp_path / "b.h5", plain_rows(2))

    def replaced(path: Path) -> Any:
        run = open_run(path)
        shutil.copy(shorter, path)
        return run

    monkeypatch.setattr(sys.modules[validate.__module__], "open_run", replaced)
    with pytest.raises(RunFileError, match="should hold the run that was opened there"):
        validate(path)
