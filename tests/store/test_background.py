"""Rows that are written behind the caller."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geffect.store import Row, RunFileError, open_run
from geffect.store.background import BackgroundWriter
from geffect.store.growing_file import GrowingFile
from geffect.store.writer import RunWriter
from tests.utils import stored_gradients as stored
from tests.utils.runs import PARAMETERS, PLAIN, full, plain_rows, row_of


def test_rows_are_written_in_order_behind_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    to = BackgroundWriter(RunWriter(path, PARAMETERS), bound_bytes=2000)
    to.begin(PLAIN)
    for row in plain_rows(50):
        to.append(row)
    to.keep("done", {"rows": np.array([50])})
    assert len(open_run(path).steps) == 50
    to.close(complete=True)
    to.close(complete=True)
    run = open_run(path)
    assert (run.state, run.steps.tolist(), run.tables) == (
        "complete",
        list(range(50)),
        ("done", "waited"),
    )


@pytest.mark.parametrize("bound", [0, 3 * 144])
def test_no_more_bytes_wait_than_allowed(
    tmp_path: Path, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, gate = RunWriter(tmp_path / "a.h5", PARAMETERS), threading.Event()
    written = slow.append
    monkeypatch.setattr(slow, "append", lambda row: (gate.wait(), written(row)))
    to = BackgroundWriter(slow, bound)
    to.begin(PLAIN)
    assert row_of(0).nbytes == 144
    room = max(1, bound // 144)
    for row in plain_rows(room):
        to.append(row)
    late = threading.Thread(target=to.append, args=[row_of(room)])
    late.start()
    late.join(0.05)
    assert late.is_alive()
    gate.set()
    late.join()
    to.close(complete=True)
    run = open_run(slow.path)
    assert len(run.steps) == room + 1
    assert run.table("waited")["seconds"][0] > 0  # of the late row
    assert run.table("waited")["rows"].tolist() == [room + 1]


def late_row(step: int, arrive: Callable[[], object]) -> Row:
    """A row whose gradients are in memory that a device has not filled yet."""
    there = stored.encoded(step, "bf16")
    room = {
        source: {layer: {"bits": np.zeros_like(a["bits"])} for layer, a in layers.items()}
        for source, layers in there.items()
    }

    def fill() -> None:
        arrive()
        for source, layers in there.items():
            for layer, arrays in layers.items():
                room[source][layer]["bits"][...] = arrays["bits"]

    return replace(stored.row(step, room), arrived=fill)


def test_gradients_on_their_way_are_waited_for_behind_the_caller(tmp_path: Path) -> None:
    path, gate = tmp_path / "a.h5", threading.Event()
    to = BackgroundWriter(RunWriter(path, stored.PARAMETERS), bound_bytes=10**6)
    to.begin(stored.contents("bf16"))
    for step in range(3):
        to.append(late_row(step, gate.wait))
    assert len(to._rows) == 3  # the first is being written, as soon as it is there
    gate.set()
    to.close(complete=True)
    run = open_run(path)
    assert run.steps.tolist() == [0, 1, 2]
    for step in range(3):
        for source in stored.SOURCES:
            found = run.gradient(source, step)
            stored.assert_same(found, stored.decoded(source, step, "bf16"))


def test_gradients_that_never_arrive_are_told_once(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("the device is gone")

    path = tmp_path / "a.h5"
    to = BackgroundWriter(RunWriter(path, stored.PARAMETERS), bound_bytes=10**6)
    to.begin(stored.contents("bf16"))
    to.append(late_row(0, lambda: None))
    to.append(late_row(1, lost))
    with pytest.raises(RunFileError, match=r"at step 1\. Found: .*the device is gone"):
        to.close(complete=True)
    to.close(complete=True)
    run = open_run(path)
    assert (run.state, run.steps.tolist()) == ("open", [0])


@pytest.mark.parametrize("then", ["append", "close", "keep", "amend"])
def test_a_row_that_was_interrupted_as_it_was_handed_over_holds_nothing_up(
    tmp_path: Path, then: str
) -> None:
    to = BackgroundWriter(RunWriter(tmp_path / "a.h5", PARAMETERS), bound_bytes=0)
    to.begin(PLAIN)
    to.append(row_of(0))
    to.keep("done", {"rows": np.array([1])})  # the thread waits for the next row
    to._rows.append(row_of(1))  # and is not told of it
    calls = {
        "append": lambda: to.append(row_of(2)),
        "keep": lambda: to.keep("done", {"rows": np.array([2])}),
        "amend": lambda: to.amend(row_of(1)),
        "close": lambda: None,
    }
    ending = threading.Thread(target=lambda: (calls[then](), to.close(complete=True)), daemon=True)
    ending.start()
    ending.join(30)
    assert not ending.is_alive()
    assert len(open_run(tmp_path / "a.h5").steps) == 2 + (then == "append")


def test_a_thread_that_was_interrupted_before_it_began_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = BackgroundWriter(RunWriter(tmp_path / "a.h5", PARAMETERS), bound_bytes=10**6)
    to.begin(PLAIN)

    def interrupt(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            to.append(row_of(0))
    to.append(row_of(0))
    to.close(complete=True)
    assert len(open_run(tmp_path / "a.h5").steps) == 1


@pytest.mark.parametrize("then", ["append", "close", "keep"])
def test_what_goes_wrong_behind_the_caller_is_raised_once(
    tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    to = BackgroundWriter(RunWriter(path, PARAMETERS), bound_bytes=10**6)
    to.begin(PLAIN)
    to.append(row_of(0))
    to.keep("first", {"x": np.zeros(1)})  # waits for the row
    monkeypatch.setattr(GrowingFile, "_put", full)
    to.append(row_of(1))
    to._drain()
    message = r"Run file `.*a\.h5` should be writable at step 1\. Found: .*No space left"
    with pytest.raises(RunFileError, match=message):
        {
            "append": lambda: to.append(row_of(2)),
            "keep": lambda: to.keep("second", {"x": np.zeros(1)}),
            "close": lambda: to.close(complete=True),
        }[then]()
    with pytest.raises(RunFileError, match=r"should be open\. Found it closed, or failed"):
        to.append(row_of(3))
    to.close(complete=True)
    run = open_run(path)
    assert (run.state, run.steps.tolist(), run.tables) == ("open", [0], ("first",))


def test_an_error_on_its_way_is_not_mistaken_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, closed, gate = (
        RunWriter(tmp_path / "a.h5", PARAMETERS),
        threading.Event(),
        threading.Event(),
    )

    def fail(_: Row) -> None:
        failing.close(complete=False)
        closed.set()
        gate.wait()
        raise RunFileError("the cause")

    monkeypatch.setattr(failing, "append", fail)
    to = BackgroundWriter(failing, bound_bytes=10**6)
    to.begin(PLAIN)
    to.append(row_of(0))
    closed.wait()
    to.append(row_of(1))
    gate.set()
    with pytest.raises(RunFileError, match="the cause"):
        to.close(complete=True)
    with pytest.raises(RunFileError, match="should be open"):
        to.check_open()


def test_a_program_that_ends_without_closing_loses_no_row(tmp_path: Path) -> None:
    from tests.utils.subprocesses import in_another_process

    code = """
        import sys
        sys.path.insert(0, sys.argv[2])
        from tests.utils.runs import *
        from geffect.store.background import BackgroundWriter
        to = BackgroundWriter(RunWriter(sys.argv[1], PARAMETERS), 10**6)
        to.begin(Contents(SOURCES, MANIFEST))
        for row in plain_rows(40):
            to.append(row)
    """
    path = tmp_path / "a.h5"
    assert in_another_process(code, path, Path(__file__).parents[2]) == ""
    assert len(open_run(path).steps) == 40
