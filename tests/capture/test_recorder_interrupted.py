"""A training that is interrupted anywhere, forked, or whose recorder is lost: all is left whole."""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, open_run
from geffect.capture import StoreOptions
from geffect.sketch import Sketch
from geffect.store import Run, RunFileError, validate
from tests.utils.interrupted import BEFORE, STEPS, Moment, Seen, Setup, Training, goes_on
from tests.utils.interrupts import hooks_left, interrupted_at_line, moments
from tests.utils.subprocesses import in_another_process, locked_by_another_process

on_unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork")


def small() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(torch.full((2, 3), 1.0 + step)).square().sum()


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, step: int
) -> None:
    optimizer.zero_grad()
    recorder.backward(
        objective={"forget": -1.0, "retain": 1.0},
        forget=loss_of(model, step),
        retain=loss_of(model, step + 7),
    )
    optimizer.step()


RECTIFIED = {"space": "update"}
SETUPS = {
    "plain": Setup(),
    "update": Setup(recorder={"update": True}),
    "micro-batches": Setup(micro=2),
    "micro-batches and update": Setup(recorder={"update": True}, micro=2),
    "bf16": Setup(recorder={"store": "bf16"}),
    "int4 and update": Setup(recorder={"store": "int4", "update": True}),
    "sketch": Setup(recorder={"store": StoreOptions(sketch=Sketch(16))}),
    "functions": Setup(functions=True),
    "functions and update": Setup(
        functions=True, objective={"forget": -1.0}, recorder={"update": True}
    ),
    "functions in micro-batches": Setup(functions=True, micro=2, recorder={"store": "bf16"}),
    "functions, rectified": Setup({}, functions=True, objective={"forget": -1.0}),
    "functions, rectified micro-batches": Setup(RECTIFIED, functions=True, micro=2),
    "rectified": Setup({}),
    "rectified, apart": Setup({}, objective={"forget": -1.0}, recorder={"store": "full"}),
    "rectified micro-batches": Setup({}, micro=2, recorder={"store": "bf16"}),
    "rectified and update": Setup({"scope": "layer"}, recorder={"update": True}),
    "rectified in update space": Setup(RECTIFIED, recorder={"update": True}),
    "overflow": Setup(overflows=True),
    "overflow and update": Setup(recorder={"update": True}, overflows=True),
    "overflow, rectified": Setup({}, recorder={"update": True}, overflows=True),
    "rectified coordinates": Setup(RECTIFIED | {"scope": "coordinate"}, recorder={"update": True}),
}


@dataclass(frozen=True)
class Undisturbed:
    """A training that nobody interrupts: its moments, file, lines and hooks."""

    seen: dict[Moment, Seen]
    gram: np.ndarray
    gradients: Mapping[tuple[str, int], list[np.ndarray]]
    lines: int
    hooks: int


def watched(training: Training, path: Path) -> Iterator[Moment]:
    """The moments of a training that is recorded."""
    with Recorder(training.model, path, **training.setup.recorder) as recorder:
        training.recorder = recorder
        yield from training.run()


@cache
def undisturbed(name: str, folder: Path) -> Undisturbed:
    training, path = Training(SETUPS[name]), folder / f"{name}.h5"
    seen = {BEFORE: Seen.of(training)}
    with interrupted_at_line(0, KeyboardInterrupt) as lines:
        for moment in watched(training, path):
            come = lines[0]
            seen[moment] = Seen.of(training)
            lines[0] = come
    hooks = len(hooks_left(training.model, training.optimizer))
    return Undisturbed(seen, open_run(path).gram(), gradients(open_run(path)), lines[0], hooks)


def gradients(run: Run) -> dict[tuple[str, int], list[np.ndarray]]:
    stored = run.stored_steps.tolist()
    return {
        (name, at): run.gradient(name, at) for name in {*run.sources} - {"update"} for at in stored
    }


@pytest.fixture(autouse=True)
def several_portions_and_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geffect.projection.projector.PORTION_BYTES", 50)
    monkeypatch.setattr("geffect.store.segments.FIRST_ROWS", 1)


@pytest.mark.parametrize("name", SETUPS)
def test_an_interrupt_at_any_line_leaves_training_and_file_whole(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    # Random bits of rounding are then the same in two runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geffect.capture.recording.os.urandom", bytes)
        whole = undisturbed(name, tmp_path_factory.getbasetemp())
        for number, error in moments(whole.lines, few=1):
            path = tmp_path / f"{number}.h5"
            training, done = Training(SETUPS[name]), BEFORE
            # What is found in a file is told as one error of it, whatever it was; what comes while
            # Python forgets an object is lost.
            with suppress(error, RunFileError), interrupted_at_line(number, error):
                for moment in watched(training, path):
                    done = moment
            training.recorder = None
            where = f"{name}, line {number}, {error.__name__} after {done}"
            check_file(path, done, whole, where)
            if goes_on(training, done, whole.seen):
                assert Seen.of(training).is_stepped_like(whole.seen[STEPS - 1, "stepped"]), where
            assert len(hooks_left(training.model, training.optimizer)) <= whole.hooks, where
            gc.collect(0)


def check_file(path: Path, done: Moment, whole: Undisturbed, where: str) -> None:
    """The rows of an interrupted run are those of the one that was not."""
    taken = done[0] + (done[1] in ("taken", "stepped"))
    if not path.exists():
        assert taken <= 1, where
        return
    run = open_run(path)
    assert validate(path).whole, where
    found = run.gram()
    assert run.steps.tolist() == list(range(len(found))), where
    assert taken - 1 <= len(found) <= taken + 1, where
    expected, exact = whole.gram[: len(found)].copy(), len(found)
    if "update" in run.sources and len(found):
        # What the last step moves is not known before it is taken.
        update = run.sources.index("update")
        if np.isnan(found[-1, :, update]).all():
            for table in (found[-1], expected[-1]):
                table[:, update] = table[:, :, update] = 0.0
            # Without it the products of the others are summed in another order.
            exact, rounding = exact - 1, 1e-14 * np.nanmax(np.abs(expected[-1]))
            assert np.allclose(found[-1], expected[-1], 0.0, rounding, equal_nan=True), where
    assert np.array_equal(found[:exact], expected[:exact], equal_nan=True), where
    for key, stored in gradients(run).items():
        assert all(map(np.array_equal, stored, whole.gradients[key])), where


@on_unix
@pytest.mark.parametrize("handled", [True, False])
def test_a_signal_that_ends_the_process_leaves_the_file_whole(
    tmp_path: Path, handled: bool
) -> None:
    chance = np.random.default_rng(0)
    for milliseconds in chance.uniform(1, 80, 5):
        path = tmp_path / f"{milliseconds:.3f}.h5"
        child = os.fork()
        if child == 0:
            if handled:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            code = 1
            try:
                model, optimizer = small()
                with Recorder(model, path) as recorder:
                    for step in count():
                        take_step(model, optimizer, recorder, step)
            except SystemExit:
                code = 0
            finally:
                os._exit(code)
        until = time.monotonic() + 60
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        ended = 0
        while not ended:
            # Python loses what is raised while it forgets an object, as h5py's objects are: again.
            os.kill(child, signal.SIGTERM)
            time.sleep(0.05)
            ended, status = os.waitpid(child, os.WNOHANG)
        assert os.WIFSIGNALED(status) != handled
        assert not handled or status == 0
        assert validate(path).whole
        steps = open_run(path).steps.tolist()
        assert steps == list(range(len(steps)))


# Windows of micro-batches.


def test_an_error_inside_of_a_window_writes_no_row(tmp_path: Path) -> None:
    model, optimizer = small()
    with pytest.raises(ZeroDivisionError), Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder, 0)
        recorder.backward(
            objective={"forget": -1.0, "retain": 1.0}, forget=loss_of(model, 1),
            retain=loss_of(model, 2), accumulate=True,
        )  # fmt: skip
        _ = 1 / 0
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0]


@pytest.mark.parametrize("update", [False, True])
def test_an_error_inside_of_an_optimizer_writes_no_row(tmp_path: Path, update: bool) -> None:
    class Torn(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            raise ZeroDivisionError

    model, _ = small()
    optimizer = Torn(model[0].parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder, 0)
    rows = open_run(tmp_path / "a.h5").steps.tolist() if (tmp_path / "a.h5").exists() else []
    # The hook of the inner step knows no end of it: what is written is the gradient that was there.
    assert rows in ([], [0])


def test_an_error_of_the_file_does_not_hide_what_ended_the_block(tmp_path: Path) -> None:
    model, optimizer = small()
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        Recorder(model, tmp_path / "a.h5") as recorder,
    ):
        take_step(model, optimizer, recorder, 0)
        (tmp_path / "a.h5").unlink()
        raise KeyboardInterrupt
    assert "no longer there" in str(getattr(caught.value, "__notes__", ""))


# Lost recorders.


def test_a_lost_recorder_gives_its_path_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def cell(**how: bool) -> Recorder:
        recorder = Recorder(model, tmp_path / "a.h5", **how)
        take_step(model, optimizer, recorder, 0)
        return recorder

    model, optimizer = small()
    recorder = cell()
    again = r"Call its close\(\) first, then .*overwrite=True .*resume=True"
    with pytest.raises(RunFileError, match=again):
        cell(overwrite=True)
    del recorder
    gc.collect()
    assert "was lost before it was closed" in caplog.text
    assert not hooks_left(model, optimizer)
    assert open_run(tmp_path / "a.h5").state == "open"
    with pytest.raises(FileExistsError, match=r"resume=True.*overwrite=True"):
        cell()
    cell(overwrite=True).close()
    with Recorder(model, tmp_path / "a.h5", resume=True) as recorder:
        take_step(model, optimizer, recorder, 1)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


def test_a_lost_recorder_of_gradients_gives_its_path_back(tmp_path: Path) -> None:
    model, optimizer = small()
    recorder = Recorder(model, tmp_path / "a.h5", store="full")
    take_step(model, optimizer, recorder, 0)
    del recorder
    gc.collect()
    assert validate(tmp_path / "a.h5").whole
    with Recorder(model, tmp_path / "a.h5", store="full", resume=True) as recorder:
        take_step(model, optimizer, recorder, 1)
    assert open_run(tmp_path / "a.h5").stored_steps.tolist() == [0, 1]


# Forked processes.


def in_a_child(body: Callable[[], object], *, exits: Callable[[int], object] = os._exit) -> str:
    """What a forked process says; it exits as is asked for."""
    out, to = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(body())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(to, said.encode())
        exits(0)
    os.close(to)
    with os.fdopen(out) as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


@on_unix
@pytest.mark.parametrize("store", ["gram", "full"])
def test_a_forked_process_leaves_the_run_alone(tmp_path: Path, store: str) -> None:
    model, optimizer = small()
    path = tmp_path / "a.h5"
    recorder = Recorder(model, path, store=store)
    take_step(model, optimizer, recorder, 0)
    table = {"value": np.ones(2)}
    recorder.keep_table("table", table)  # which waits for the row
    before = path.read_bytes()
    refused = [
        lambda: take_step(model, optimizer, recorder, 1),
        recorder.close,
        lambda: recorder.keep_table("table", table),
        lambda: recorder.note_objective("npo"),
    ]
    for body in refused:
        said = in_a_child(body)
        assert "RunFileError" in said
        assert f"{os.getpid()}. Found process" in said
    assert in_a_child(lambda: recorder.__exit__(None, None, None)) == "None"
    assert in_a_child(lambda: (optimizer.step(), 1)[1]) == "1"
    assert in_a_child(lambda: "Error" in in_a_child(lambda: Recorder(model, path))) == "True"
    assert path.read_bytes() == before
    take_step(model, optimizer, recorder, 1)
    recorder.close()
    assert open_run(path).steps.tolist() == [0, 1]
    assert validate(path).whole


@on_unix
def test_a_child_that_exits_normally_keeps_the_lock_of_its_parent(tmp_path: Path) -> None:
    code = """
        import fcntl, logging, os, sys, torch, geffect
        from torch import nn
        logging.disable()
        def step():
            recorder.backward(objective=model(torch.ones(3)).sum())
            optimizer.step()
            optimizer.zero_grad()
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with geffect.Recorder(model, sys.argv[1], store="full") as recorder:
            step()
            recorder.keep_table("table", {"value": ["one"]})  # which waits for the row
            child = os.fork()
            if child == 0:
                sys.exit(0)  # through the block, and what is done at the end of a process
            assert os.waitpid(child, 0)[1] == 0
            child = os.fork()
            if child == 0:
                try:
                    fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
            step()
        run = geffect.open_run(sys.argv[1])
        print(run.state, run.steps.tolist(), run.stored_steps.tolist())
    """
    assert in_another_process(code, tmp_path / "a.h5") == "complete [0, 1] [0, 1]"


# Errors of the file that training is to outlive.


@pytest.mark.parametrize("missing", ["room", "lock", "folder"])
def test_a_warning_holds_from_the_first_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    model, optimizer = small()
    expected, plain = small()
    recorder = Recorder(
        model, folder / "a.h5", on_error="warn", overwrite=True, steps=2, update=True
    )
    if missing == "room":
        monkeypatch.setattr("geffect.capture.storage._bytes", str)
        monkeypatch.setattr("geffect.capture.storage.projected_bytes", lambda *_: 10**18)
    elif missing == "folder":
        folder.rmdir()
    elif missing == "lock":
        open_run_file = folder / "a.h5"
        Recorder(small()[0], folder / "b.h5").close()
        with Recorder(small()[0], folder / "c.h5") as other:
            other.backward(objective=loss_of(other._watched.model, 0))
        (folder / "c.h5").rename(open_run_file)
    torch.manual_seed(1)
    if missing == "lock":
        with locked_by_another_process(folder / "a.h5"):
            for step in range(2):
                take_step(model, optimizer, recorder, step)
            recorder.close()
    else:
        for step in range(2):
            take_step(model, optimizer, recorder, step)
        recorder.close()
    assert caplog.text.count("Training goes on, and nothing more is recorded.") == 1
    torch.manual_seed(1)
    for step in range(2):
        plain.zero_grad()
        forget, retain = loss_of(expected, step), loss_of(expected, step + 7)
        (retain - forget).backward()
        plain.step()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
