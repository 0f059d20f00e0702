"""How the command line is called, and what it offers before a command is named."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from geffect.cli.main import app
from geffect.cli.objectives import CommandOfObjectives
from tests.utils.command_line import answering

COMMANDS = [
    "demo", "info", "scores", "plot", "report", "replay", "edit", "compare", "validate",
]  # fmt: skip
SCRIPT = [str(Path(sys.executable).with_name("geffect"))]
MODULE = [sys.executable, "-m", "geffect"]


def said(command: list[str], *arguments: str, **environment: str) -> str:
    ended = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


@pytest.mark.parametrize("command", [SCRIPT, MODULE], ids=["script", "module"])
def test_it_says_its_version_and_what_it_can(command: list[str]) -> None:
    assert said(command, "--version") == f"geffect {version('geffect')}\n"
    text = said(command, "-h")
    assert "Usage: geffect [OPTIONS] COMMAND" in text
    assert [
        name for name in [*COMMANDS, "--version", "--show-completion"] if name not in text
    ] == []


@pytest.mark.parametrize("subcommand", COMMANDS)
def test_help_has_a_short_name(subcommand: str) -> None:
    short, long = (
        CliRunner().invoke(app, [subcommand, option], prog_name="geffect")
        for option in ("-h", "--help")
    )
    assert (short.exit_code, short.output) == (0, long.output)
    assert f"Usage: geffect {subcommand}" in short.output
    assert "COMMAND" not in short.output.partition("\n")[0]


def test_an_interrupt_while_options_are_read_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: object, ctx: object) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(CommandOfObjectives, "get_params", interrupted)
    answer = answering(monkeypatch, capsys)("demo", "--quick")
    assert answer == (130, "", "geffect: Interrupted.\n")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("geffect sc", ["scores"]),
        ("geffect plot --ki", ["--kind"]),
        ("geffect re", ["report", "replay"]),
    ],
)
def test_a_shell_completes_what_is_typed(words: str, completed: list[str]) -> None:
    place = str(len(words.split()) - 1)
    typed = {"_GEFFECT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
    assert said(SCRIPT, **typed).split() == completed


def test_the_completion_of_a_shell_is_shown() -> None:
    script = said(MODULE, "--show-completion", "bash")
    assert "_GEFFECT_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith(" geffect")
