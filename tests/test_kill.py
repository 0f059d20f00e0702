"""A recording process is killed at random moments: every step it announced is in the file."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from geffect import Recorder, Run, open_run
from geffect.store import validate, writer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process to kill")

RATE = 0.5
ENDLESS = 10**9


class Kill(NamedTuple):
    """One recording process, and the moment at which it ends."""

    announced: bool  # whether the delay starts at the first step that the process announced
    milliseconds: float
    capacity: int  # of a new file: a small one is replaced by a larger one every few steps
    update: bool
    closing: int  # after how many steps the recorder is closed, and the file resumed


def kills() -> Iterator[Kill]:
    """A few before a step is announced, the others spread from 1 to 150 ms after it."""
    chance = random.Random(0)
    late = 28
    for i in range(-8, late):
        yield Kill(
            announced=i >= 0,
            milliseconds=150 ** ((i + chance.random()) / late) if i >= 0 else 25 * chance.random(),
            capacity=chance.choice((1, 4, 64)),
            update=chance.random() < 0.5,
            closing=3 if i % 4 == 3 else ENDLESS,
        )


@pytest.mark.parametrize("kill", list(kills()), ids=lambda kill: f"{kill.milliseconds:.0f}ms")
def test_a_kill_loses_no_step(
    recorders: "Recorders", tmp_path: Path, kill: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    announced = recorders.killed(path, kill)
    assert announced > 0 or not kill.announced
    count = 0
    if announced or path.exists():
        run = open_run(path)
        count = len(run.steps)
        assert announced <= count <= announced + 1
        assert_as_recorded(run, count)
        assert validate(path).whole

    monkeypatch.setattr(writer, "FIRST_CAPACITY", kill.capacity)
    model, optimizer = started(count)
    with Recorder(model, path, update=kill.update, resume=True) as recorder:
        assert recorder.next_step == count
        for _ in range(3):
            take_step(model, optimizer, recorder)
    run = open_run(path)
    assert run.state == "complete"
    assert_as_recorded(run, count + 3)
    assert validate(path).whole
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


# What is recorded: numbers that are exact in float64, and known from the number of the step.


def started(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of one parameter as it stands before a step, and its optimizer."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, weight_before(step))
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
    """Step t: ascent along a forget gradient of t + 1."""
    (weight,) = model.parameters()
    optimizer.zero_grad()
    recorder.backward(
        objective={"forget": -1.0},
        forget=(recorder.next_step + 1) * weight.sum(),
        retain=weight.sum(),
    )
    optimizer.step()


def weight_before(step: int) -> float:
    return RATE * step * (step + 1) / 2


def assert_as_recorded(run: Run, count: int) -> None:
    steps = np.arange(count)
    gradients = {
        "objective": -(steps + 1.0),
        "forget": steps + 1.0,
        "retain": np.ones(count),
        "update": RATE * (steps + 1.0),
    }
    vectors = np.stack([gradients[source] for source in run.sources], axis=-1)
    assert run.steps.tolist() == steps.tolist()
    assert np.array_equal(run.gram()[:, 0], vectors[:, :, None] * vectors[:, None, :])
    forget = (steps + 1.0) * [weight_before(step) for step in range(count)]
    assert np.array_equal(run.losses()["forget"], forget)
    assert np.array_equal(run.losses()["objective"], -forget)
    assert (run.column("lr") == RATE).all()
    assert (np.diff(run.column("wall_seconds")) > 0).all()


# Who records: one process that has imported torch, and forks another for every kill.


class Recorders:
    """The test's end of that process."""

    def __init__(self) -> None:
        code = "import sys; sys.path.insert(0, sys.argv[1]); import test_kill; test_kill.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def killed(self, path: Path, kill: Kill) -> int:
        """How many steps a recorder announced before it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(repr((str(path), tuple(kill))), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def recorders() -> Iterator[Recorders]:
    serving = Recorders()
    yield serving
    serving.process.communicate("")
    assert serving.process.returncode == 0


def serve() -> None:
    """For every line: fork a recorder, kill it, and print how many steps it had announced."""
    torch.set_num_threads(1)
    model, optimizer = started(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # what torch imports at the first step is imported once
    for line in sys.stdin:
        path, kill = eval(line)
        print(announced_before(path, Kill(*kill)), flush=True)


def announced_before(path: str, kill: Kill) -> int:
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


def record(path: str, kill: Kill, announcing: int) -> None:
    """Record without an end, and announce how many steps there are after every one."""
    writer.FIRST_CAPACITY = kill.capacity
    model, optimizer = started(0)
    while True:
        with Recorder(model, path, update=kill.update, resume=True) as recorder:
            for _ in range(kill.closing):
                take_step(model, optimizer, recorder)
                os.write(announcing, b"%d\n" % recorder.next_step)
