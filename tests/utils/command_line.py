"""What the command line answers."""

import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from geffect.cli.main import main

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Answer(NamedTuple):
    """Exit code and what was printed, without colours."""

    code: int
    out: str
    err: str


Ask = Callable[..., Answer]
"""Called with the words after `geffect`."""


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
