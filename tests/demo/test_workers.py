"""Worker processes do not outlive their parent."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

ENDLESS = """
import os, time
from dataclasses import dataclass
from geffect.demo.workers import working

@dataclass
class Endless:
    name: str
    stage: str = "train"
    weight: float = 1.0

    def run(self, say):
        print(os.getpid(), flush=True)
        time.sleep(600)

if __name__ == "__main__":
    with working(1, lambda progress: None) as run:
        run([Endless("a"), Endless("b")])
"""


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_they_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS, encoding="utf-8")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        assert runs(worker)
        study.kill()
        until = time.monotonic() + 10
        while runs(worker) and time.monotonic() < until:
            time.sleep(0.05)
        assert not runs(worker)
