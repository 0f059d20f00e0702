"""What the command line answers."""

import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import pytest

from geffect.cli.main import main
from tests.utils import forks

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Answer(NamedTuple):
    """Exit code and what was printed, without colours."""

    code: int
    out: str
    err: str


Ask = Callable[..., Answer]
"""Called with the words after `geffect`."""


def alone(*arguments: object, most: int | None = None) -> Answer:
    """What the command line answers in a process of its own, whose workers are forks of it.

    `most` is how many bytes of a file the disk takes, where it does not take all.
    """
    return Answer(*forks.call(_alone, [*map(str, arguments)], most))


def _alone(words: list[str], most: int | None) -> tuple[int, str, str]:
    if most is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    started = multiprocessing.get_context
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        for own, kept in ((1, out), (2, err)):
            os.dup2(kept.fileno(), own)
        sys.argv, sys.stdout, sys.stderr, code = ["geffect", *words], out, err, 0
        with patch.object(multiprocessing, "get_context", lambda *_: started("fork")):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        for kept in (out, err):
            kept.flush()
            kept.seek(0)
        return code, out.read(), err.read()


def answering(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """The command line, run in this process."""

    def ask(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["geffect", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Answer(code, ESCAPE.sub("", said.out), ESCAPE.sub("", said.err))

    return ask
