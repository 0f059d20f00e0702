"""`geffect watch`, as a user runs it: in a terminal, in a pipe, beside a training at full speed."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from torch import nn

from geffect import Recorder, open_run
from geffect.cli import watch
from geffect.cli.followed import Followed
from geffect.cli.watch_view import State
from geffect.store.writer import RunWriter
from tests.utils.command_line import Ask
from tests.utils.runs import PARAMETERS, append, plain_rows, recorded, row_of
from tests.utils.subprocesses import in_another_process


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PAUSE", 0.01)


def test_one_frame_goes_to_a_pipe(ask: Ask, recorded: Path) -> None:
    said = ask("watch", recorded, "--once")
    assert (said.code, said.err) == (0, "")
    for word in ("layer 1", "unlearning", "violation rate", "complete: 4 steps", "loss forget"):
        assert word in said.out
    assert len(said.out.splitlines()) > 15


def test_its_numbers_are_those_of_the_scores(ask: Ask, recorded: Path) -> None:
    """As `geffect scores` prints them, in four digits."""
    shown = ask("watch", recorded, "--once").out
    rows = json.loads(ask("scores", recorded, "--format", "json").out)
    last = [
        row for row in rows if row["step"] == 3 and row["effect"] in ("unlearning", "retaining")
    ]
    assert len(last) > 6
    for row in last:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{row['layer']} "))
        assert f"{row['value']:.4g}" in line.split()
    conflicts = json.loads(ask("scores", recorded, "--score", "conflict", "--format", "json").out)
    rate = 100 * np.mean([row["value"] for row in conflicts])
    (line,) = (line for line in shown.splitlines() if line.startswith("conflict rate"))
    assert f" {rate:.0f} % " in line


@pytest.mark.parametrize("by", ["group", "model", "parameter", "tower", "paper", "code"])
def test_rows_are_of_what_is_asked_for(ask: Ask, recorded: Path, by: str) -> None:
    said = ask("watch", recorded, "--once", "--by", by)
    assert said.code == 0 and "unlearning" in said.out


def test_before_the_file_is_there_one_frame_says_that_it_waits(ask: Ask, tmp_path: Path) -> None:
    said = ask("watch", tmp_path / "none.h5", "--once")
    assert said.code == 0 and "waiting for its first step" in said.out


def test_a_pipe_gets_a_line_for_each_step_until_the_run_is_complete(
    ask: Ask, tmp_path: Path
) -> None:
    path = tmp_path / "run.h5"

    def write() -> None:
        time.sleep(0.05)
        writer = RunWriter(path, PARAMETERS)
        for row in plain_rows(80):
            append(writer, row)
        writer.amend(row_of(79, value=2.0))
        append(writer, row_of(80))
        writer.close(complete=True)

    thread = threading.Thread(target=write)
    thread.start()
    said = ask("watch", path)
    thread.join()
    lines = said.out.splitlines()
    assert (said.code, said.err) == (0, "")
    assert "waiting for its first step" in lines[0] and lines[-1] == "complete: 81 steps"
    steps = [int(re.match(r"step (\d+)  ", line)[1]) for line in lines[1:-1]]  # type: ignore[index]
    assert [*dict.fromkeys(steps)] == [*range(81)]
    assert {step for step in steps if steps.count(step) > 1} <= {79}, "no step is told twice"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--once", "--serve"], "`--once` should be without `--serve`"),
        (["--port", "80"], "`--port` should go with `--serve`"),
        (["--by", "step"], "should be one of"),
        (["--serve", "--port", "70000"], "65535"),
    ],
)
def test_what_is_asked_wrongly(ask: Ask, recorded: Path, words: list[str], said: str) -> None:
    answer = ask("watch", recorded, *words)
    assert answer.code == 2 and said in answer.err and not answer.out


def test_what_is_no_run(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    path.write_text("no run")
    for how in ([], ["--once"]):
        answer = ask("watch", path, *how)
        assert answer.code == 1 and "should be a run file" in answer.err and not answer.out
    answer = ask("watch", tmp_path)
    assert answer.code == 1 and "Found a folder" in answer.err


def test_a_run_that_was_killed_is_told_of_once(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded_and_killed(tmp_path)
    looks, look = [], Followed.look

    def counted(self: Followed) -> object:
        looks.append(0)
        if len(looks) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return look(self)

    monkeypatch.setattr(Followed, "look", counted)
    answer = ask("watch", path)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.count("not written for") == 1 and answer.out.count("step 2  ") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def recorded_and_killed(tmp_path: Path) -> Path:
    path = recorded(tmp_path / "run.h5", plain_rows(3), complete=None)
    os.utime(path, (0, 0))
    return path


@contextmanager
def running(command: list[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, whatever the block raises."""
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


# In a terminal.


def terminal_says(screen: int, until: str) -> str:
    """What a program writes on a terminal, up to some words."""
    text, last = "", time.monotonic() + 60
    while until not in text:
        assert time.monotonic() < last, text
        if select.select([screen], [], [], 0.1)[0]:
            try:
                text += os.read(screen, 65536).decode()
            except OSError:  # the terminal is closed
                break
    return text


@pytest.fixture
def screen() -> Iterator[tuple[int, int]]:
    outer, inner = pty.openpty()
    yield outer, inner
    for end in (outer, inner):
        os.close(end)


def test_a_terminal_follows_a_run_and_ends_at_an_interrupt(
    tmp_path: Path, screen: tuple[int, int]
) -> None:
    path, (outer, inner) = tmp_path / "run.h5", screen
    command = [sys.executable, "-m", "geffect", "watch", path.name]
    environment = {**os.environ, "COLUMNS": "90", "LINES": "30", "TERM": "xterm-256color"}
    with running(command, stdout=inner, stderr=inner, env=environment, cwd=tmp_path) as process:
        said = terminal_says(outer, "waiting for its first step")
        writer = RunWriter(path, PARAMETERS)
        for row in plain_rows(3):
            append(writer, row)
        said = terminal_says(outer, "loss retain")
        assert "3 captured" in said and "layer 0" in said and "unlearning" in said
        process.send_signal(signal.SIGINT)
        said = terminal_says(outer, "\x1b[?25h")  # the cursor is back
        assert process.wait(30) == 0
    assert "Interrupted" not in said and "Traceback" not in said
    writer.close(complete=False)


def test_a_page_is_served_until_an_interrupt(recorded: Path) -> None:
    command = [sys.executable, "-m", "geffect", "watch", str(recorded), "--serve"]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = process.stdout.readline().decode()
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", said)
        with urlopen(address, timeout=30) as page:
            assert b"complete: 4 steps" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stdout.read() == b""


# Beside a training.

RECORDING = """
import sys, torch
from torch import nn
from geffect import Recorder
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with Recorder(model, sys.argv[1], update=True) as recorder:
    for step in range(200):
        x, y = torch.randn(2, 5, 3)
        recorder.backward(
            objective={"forget": -1.0},
            forget=lambda: model(x).pow(2).mean(),
            retain=lambda: model(y).pow(2).mean(),
        )
        optimizer.step()
        optimizer.zero_grad()
print(*(p.double().sum().item().hex() for p in model.parameters()))
"""


def test_a_training_at_full_speed_does_not_notice_that_it_is_watched(tmp_path: Path) -> None:
    alone, watched = tmp_path / "alone.h5", tmp_path / "watched.h5"
    ended = in_another_process(RECORDING, alone)
    training = [sys.executable, "-c", RECORDING, str(watched)]
    seen, views = Followed(watched), []
    with running(training, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            views.append(seen.look())  # without a pause, against every lock and every move
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode().strip() == ended
    assert {view.state for view in views} >= {State.WAITING, State.OPEN}
    run, unwatched, view = open_run(watched), open_run(alone), seen.look()
    for name in ("gram", "losses", "stepped"):
        assert run.read(name).tobytes() == unwatched.read(name).tobytes()
    assert view.state is State.COMPLETE and view.steps == tuple(range(200))
    for earlier in views:
        if earlier.steps:
            # What was said then is what the file says in the end, but for a step under way.
            settled = len(earlier.steps) - 1
            np.testing.assert_array_equal(
                earlier.effects[0].values[:settled], view.effects[0].values[:settled]
            )


def test_the_plan_of_a_recorder_is_told(tmp_path: Path) -> None:
    path, model = tmp_path / "run.h5", nn.Linear(2, 1)
    with Recorder(model, path, steps=9, when=lambda step: step % 4 == 0) as recorder:
        for _ in range(2):
            recorder.backward(objective={"forget": -1.0}, forget=model(torch.ones(2)).sum() ** 2)
        view = Followed(path).look()
    assert open_run(path).manifest["planned"] == {"steps": 3, "ranges": [[0, 8, 4]]}
    assert (view.planned, view.next_step, view.is_told) == (3, 4, True)
