"""Mutants in processes of their own, which may hang or crash and leave the counting one alone."""

import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from geffect.store import opening

from .mutations import DAMAGES, HARMLESS
from .oracle import Answers, alarm, answers, verdict
from .originals import Original

PATIENCE = 20.0
"""Seconds after which a mutant hangs."""

MEMORY = 4 << 30
"""Bytes that a process may address: more is not to be asked for a file of some kilobytes."""

HARMLESS_SHARE = 0.05


def mutant(original: Original, right: Answers, seed: int, folder: Path, questions: int = 99) -> str:
    """What is wrong with a mutant, and which it is; nothing where nothing is wrong."""
    chance = random.Random(seed)
    path = original.put(folder)
    harmless = chance.random() < HARMLESS_SHARE
    damage = chance.choice(HARMLESS if harmless else DAMAGES)
    # The run file, most times, or one of its segments.
    names = list(original.files)
    name = names[0] if chance.random() < 0.75 else chance.choice(names)
    damage(folder / name, chance)
    found = answers(path, chance, questions)
    wrong = alarm(found, right) if harmless else verdict(found, right)
    if wrong.startswith("silent") and not original.has_checksums:
        return ""
    return wrong and f"{wrong}; {original.name}, {damage.__name__} of {name}, seed {seed}"


def faults(
    runs: Sequence[Original], seeds: range, *, processes: int, questions: int = 99
) -> list[str]:
    """What is wrong with the mutants of these seeds: a line for each that is not as it should.

    Each is asked as many questions, or all that there are.
    """
    shares = [_Share(runs, seeds[i::processes], questions) for i in range(processes)]
    found: list[str] = []
    while at_work := [share for share in shares if share.is_at_work]:
        ready = wait([share.answers for share in at_work], timeout=PATIENCE / 10)
        for share in at_work:
            found += share.heard() if share.answers in ready else share.waited()
    return found


class _Share:
    """A row of seeds and the process that tries them, one after another."""

    def __init__(self, runs: Sequence[Original], seeds: range, questions: int) -> None:
        self._runs, self._seeds, self._questions = runs, seeds, questions
        self._done = 0
        self._begin()

    @property
    def is_at_work(self) -> bool:
        return self._done < len(self._seeds)

    def heard(self) -> list[str]:
        try:
            wrong = self.answers.recv()
        except EOFError:
            self._process.join()
            return self._given_up(f"crash with {self._process.exitcode}")
        self._done, self._since = self._done + 1, time.monotonic()
        if not self.is_at_work:
            self._process.join()
        return [wrong] if wrong else []

    def waited(self) -> list[str]:
        # By the clock: however often the others were heard meanwhile.
        if time.monotonic() - self._since < PATIENCE:
            return []
        self._process.kill()
        self._process.join()
        return self._given_up("hang")

    def _given_up(self, why: str) -> list[str]:
        seed = self._seeds[self._done]
        self._done += 1
        if self.is_at_work:
            self._begin()
        return [f"{why}, seed {seed}"]

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self.answers, to = context.Pipe(duplex=False)
        seeds = self._seeds[self._done :]
        self._process: BaseProcess = context.Process(
            target=_work, args=(self._runs, seeds, self._questions, to)
        )
        self._process.start()
        self._since = time.monotonic()
        to.close()


def _work(runs: Sequence[Original], seeds: range, questions: int, to: Connection) -> None:
    opening.PAUSE = 0.0  # nobody writes: there is nothing to wait for
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        folders = [Path(home) / str(i) for i in range(len(runs))]
        right = []
        for folder, run in zip(folders, runs, strict=True):
            folder.mkdir()
            right.append(answers(run.put(folder)))
        for seed in seeds:
            i = seed % len(runs)
            to.send(mutant(runs[i], right[i], seed, folders[i], questions))
    to.close()
