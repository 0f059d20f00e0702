"""A recording process is killed at random moments: every row it had counted is in the file."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from geffect.layers import Parameter
from geffect.sketch import Sketch
from geffect.store import (
    Contents,
    Row,
    Run,
    StoredGradients,
    growing_file,
    open_run,
    segments,
    validate,
)
from geffect.store.background import BackgroundWriter
from geffect.store.writer import RunWriter
from tests.utils import forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process to kill")

KILLS = int(os.environ.get("GEFFECT_KILLS", "24"))
LATEST = 150 if KILLS > 100 else 60
"""Milliseconds: the rows of so many are what takes its time to read."""

ENDLESS = 10**9
SOURCES = ("objective", "forget")
PARAMETERS = tuple(
    Parameter(f"layers.{i}.weight", f"layer {i}", "deep", i, "weight", (40 + i, 50), "float32", ())
    for i in range(2)
)
SKETCH = Sketch(width=300)


class Kill(NamedTuple):
    """One recording process, and the moment at which it ends."""

    announced: bool  # whether the delay starts at the first row that the process announced
    milliseconds: float
    capacity: int  # of a new file: a small one is replaced by a larger one every few rows
    sketches: bool
    every: int  # how many rows there are for one with gradients; 0 for none
    background: bool
    closing: int  # after how many rows the writer is closed, and the file resumed
    dropped: int  # how many rows the next process gives up
    amended: bool  # whether each row is written twice, the second time in the place of the first


def kills() -> Iterator[Kill]:
    """A few before a row is announced, the others spread from 1 to LATEST ms after it."""
    chance = random.Random(0)
    early = max(1, KILLS // 5)
    late = max(1, KILLS - early)
    for i in range(-early, late):
        share = chance.random()
        yield Kill(
            announced=i >= 0,
            milliseconds=LATEST ** ((i + share) / late) if i >= 0 else 25 * share,
            capacity=chance.choice((1, 4, 64)),
            sketches=chance.random() < 0.5,
            every=chance.choice((0, 1, 1, 3)),
            background=chance.random() < 0.5,
            closing=3 if i % 4 == 3 else ENDLESS,
            dropped=chance.choice((0, 0, 1, 2, 5)),
            amended=i % 3 == 0,
        )


@pytest.mark.parametrize("kill", list(kills()), ids=lambda kill: f"{kill.milliseconds:.0f}ms")
def test_a_kill_loses_no_row(
    recorders: "Recorders", tmp_path: Path, kill: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    for name in ("growing_file.FIRST_CAPACITY", "segments.FIRST_ROWS"):
        monkeypatch.setattr(f"geffect.store.{name}", kill.capacity)
    announced = recorders.killed(path, kill)
    assert announced > 0 or not kill.announced
    count = 0
    if announced or path.exists():
        run = open_run(path)
        count = len(run.steps)
        assert announced <= count
        assert kill.background or count <= announced + 1
        assert_as_recorded(run, count, kill)

    count = max(0, count - kill.dropped)
    resumed = RunWriter(path, PARAMETERS, resume=True, drop_after=count - 1)
    assert (resumed.count, resumed.last_step) == (count, count - 1)
    resumed.begin(contents(kill))
    for step in range(count, count + 3):
        resumed.append(row_of(step, kill))
    resumed.close(complete=True)
    run = open_run(path)
    assert run.state == "complete"
    assert_as_recorded(run, count + 3, kill)
    kept = {"a.h5", "a.gradients"} if kill.every else {"a.h5"}
    assert {file.name for file in tmp_path.iterdir()} == kept
    assert not list(tmp_path.rglob("*.draft"))


def test_a_training_that_is_killed_and_continued_records_what_an_unharmed_one_does(
    tmp_path: Path,
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert trained(whole, kill_after=None)
    chance = random.Random(0)
    for steps in (0, *(chance.randint(1, 4) for _ in range(4))):
        seconds = chance.choice((0, 0.02)) * chance.random()
        assert not trained(torn, kill_after=steps, seconds=seconds)
    assert trained(torn, kill_after=None)
    expected, found = open_run(whole / "run.h5"), open_run(torn / "run.h5")
    assert expected.steps.tolist() == list(range(STEPS))
    assert found.state == "complete"
    assert found.steps.tolist() == expected.steps.tolist()
    assert np.array_equal(found.gram(), expected.gram())
    assert found.stored_steps.tolist() == expected.stored_steps.tolist()
    for step in range(STEPS):
        gradients = (run.gradient("retain", step) for run in (found, expected))
        assert all(np.array_equal(a, b) for a, b in zip(*gradients, strict=True))
    assert validate(found.path).whole


# What is recorded: numbers that are known from the number of the row.


def contents(kill: Kill) -> Contents:
    whole = tuple((0, parameter.numel) for parameter in PARAMETERS)
    return Contents(
        SOURCES,
        manifest={"metadata": {}},
        sketch=SKETCH if kill.sketches else None,
        gradients=StoredGradients("full", (0, 1), (whole,)) if kill.every else None,
    )


def row_of(step: int, kill: Kill) -> Row:
    return Row(
        step=step,
        losses=np.full(2, float(step)),
        gram=gram(step),
        sketches=sketches(step) if kill.sketches else None,
        gradients=gradients(step) if kill.every and step % kill.every == 0 else None,
    )


def sketches(step: int) -> np.ndarray:
    return np.full((len(SOURCES), len(PARAMETERS), SKETCH.width), step + 0.5, dtype="<f4")


def gram(step: int) -> np.ndarray:
    """That of the gradients below."""
    values = np.array([[step + i + j / 2 for i in range(2)] for j in range(2)])
    numel = np.array([parameter.numel for parameter in PARAMETERS])
    return numel[:, None, None] * values[:, :, None] * values[:, None, :]


def gradients(step: int) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    return {
        source: {
            parameter.layer: {"values": np.full(parameter.numel, step + i + j / 2, dtype="<f4")}
            for j, parameter in enumerate(PARAMETERS)
        }
        for i, source in enumerate(SOURCES)
    }


def assert_as_recorded(run: Run, count: int, kill: Kill) -> None:
    steps = np.arange(count)
    assert run.steps.tolist() == steps.tolist()
    assert np.array_equal(run.gram(), np.array([gram(step) for step in steps]).reshape(-1, 2, 2, 2))
    assert count == 0 or (run.losses()["forget"] == steps).all()
    if kill.sketches:
        expected = np.array([sketches(step)[0] for step in steps])
        assert np.array_equal(run.sketch("forget"), expected.reshape(-1, 2, SKETCH.width))
    kept = [step for step in steps.tolist() if kill.every and step % kill.every == 0]
    assert run.stored_steps.tolist() == kept
    for step in kept:
        for source, layers in gradients(step).items():
            for found, arrays in zip(run.gradient(source, step), layers.values(), strict=True):
                assert np.array_equal(found, arrays["values"])
    assert validate(run.path).whole


# Who records: one process that has imported what it needs, and forks another for every kill.


class Recorders:
    """The test's end of that process."""

    def __init__(self) -> None:
        self._pipe, theirs = forks.context().Pipe()
        self._process = forks.context().Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def killed(self, path: Path, kill: Kill) -> int:
        """How many rows a recorder announced before it was killed."""
        self._pipe.send((path, kill))
        announced: int = self._pipe.recv()
        return announced

    def end(self) -> int | None:
        """End the process: its exit code."""
        self._pipe.send(None)
        self._process.join()
        return self._process.exitcode


@pytest.fixture(scope="module")
def recorders() -> Iterator[Recorders]:
    serving = Recorders()
    yield serving
    assert serving.end() == 0


def serve(pipe: Connection) -> None:
    """For every kill: fork a recorder, kill it, and tell how many rows it had announced."""
    while (told := pipe.recv()) is not None:
        pipe.send(announced_before(*told))


def announced_before(path: Path, kill: Kill) -> int:
    reading, announcing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            record(path, kill, announcing)
        finally:
            os._exit(1)
    os.close(announcing)
    with open(reading, "rb") as announcements:
        first = announcements.readline() if kill.announced else b""
        time.sleep(kill.milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        numbers = (first + announcements.read()).split()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the recorder ended by itself"
    return int(numbers[-1]) if numbers else 0


def record(path: Path, kill: Kill, announcing: int) -> None:
    """Record without an end, and announce how many rows count after every one."""
    growing_file.FIRST_CAPACITY = segments.FIRST_ROWS = kill.capacity
    while True:
        writing = RunWriter(path, PARAMETERS, resume=True)
        to = BackgroundWriter(writing, bound_bytes=1 << 17) if kill.background else writing
        to.begin(contents(kill))
        step = writing.count
        for _ in range(kill.closing):
            to.append(row_of(step, kill))
            if kill.amended:
                to.amend(replace(row_of(step, kill), stepped=np.array([True, False])))
            step += 1
            if writing.count:
                os.write(announcing, b"%d\n" % writing.count)
        to.close(complete=True)


# Who trains: a loop as a user would write it, which begins at the last checkpoint.

STEPS, EVERY = 12, 3


def trained(folder: Path, *, kill_after: int | None, seconds: float = 0.0) -> bool:
    """Train until the end, or until so many steps were taken and some time has passed."""
    folder.mkdir(exist_ok=True)
    steps, stepping = forks.context().Pipe(duplex=False)
    process = forks.context().Process(target=train, args=(folder, stepping, kill_after is None))
    process.start()
    stepping.close()
    if kill_after is not None:
        steps.recv()  # it is about to begin
        with contextlib.suppress(EOFError):
            for _ in range(kill_after):
                steps.recv()
        time.sleep(seconds)
        process.kill()
    process.join()
    return process.exitcode == 0


def train(folder: Path, stepping: Connection, to_the_end: bool) -> None:
    import torch

    from geffect import Recorder
    from geffect.objectives import nll
    from tests.utils import tiny

    torch.set_num_threads(1)
    path = folder / "run.h5"
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorded = -1
    if path.exists():
        recorded = int(open_run(path).steps.max(initial=-1))
    # Rows with gradients are written behind the loop: the last checkpoint may be ahead of them.
    done = max((int(f.stem) for f in folder.glob("*.pt") if int(f.stem) <= recorded), default=-1)
    if done >= 0:
        checkpoint = torch.load(folder / f"{done}.pt")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    stepping.send(done)
    with Recorder(
        model, path, store="bf16", steps=STEPS, resume=True, next_step=done + 1
    ) as recorder:
        for step, pair in list(enumerate(tiny.pairs(STEPS)))[done + 1 :]:
            recorder.backward(
                objective={"forget": -1.0, "retain": 1.0},
                forget=nll(model, pair["forget"]),
                retain=nll(model, pair["retain"]),
            )
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, folder / f"{step}.part")
                (folder / f"{step}.part").replace(folder / f"{step}.pt")
            stepping.send(step)
        if not to_the_end:
            stepping.close()
            signal.pause()  # until it is killed
