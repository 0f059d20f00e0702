"""How the command line is called, and what it offers before a command is named."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from geffect.cli.command import Group
from geffect.cli.main import app, main
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


@pytest.mark.skipif(sys.platform == "win32", reason="has another shell")
@pytest.mark.parametrize(
    ("words", "closed", "code", "says"),
    [
        ("info {run}", ">&-", 0, ""),
        ("scores {run} --format tsv", ">&- 2>&- <&-", 0, ""),
        ("--version", ">&-", 0, ""),
        ("info nothing.h5", "2>&-", 1, ""),
        ("info {run}", "<&-", 0, "sources"),
        ("info {run}", ">/dev/full", 1, "should be there for reading or writing. Found: No space"),
    ],
)
def test_a_stream_that_is_closed_or_full(
    recorded: Path, words: str, closed: str, code: int, says: str
) -> None:
    asked = f"{sys.executable} -m geffect {words.format(run=recorded)} {closed}"
    ended = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=False)
    said = ended.stdout + ended.stderr
    assert (ended.returncode, "Traceback" in said, says in said) == (code, False, True)
    assert said == "" or says


def test_no_file_takes_the_number_of_a_closed_stream() -> None:
    script = """
import os, sys
from geffect.cli.main import _open_what_is_closed
_open_what_is_closed()
number = os.open(sys.executable, os.O_RDONLY)
sys.exit(number if number > 2 else 0)
"""
    asked = [sys.executable, "-c", script]
    ended = subprocess.run(["sh", "-c", '"$0" "$@" >&- 2>&- <&-', *asked], check=False)
    assert ended.returncode > 2


def test_an_interrupt_of_the_imports_is_told(tmp_path: Path) -> None:
    """Whatever is imported then: here Ctrl-C is hit as the command line asks for typer."""
    (tmp_path / "typer.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8"
    )
    search = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    ended = subprocess.run(
        [*MODULE, "--version"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": search},
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "geffect: Interrupted.\n")


def test_an_interrupt_of_which_c_code_made_an_error_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: str) -> None:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr("geffect.open_run", interrupted)
    monkeypatch.setattr(sys, "argv", ["geffect", "info", "a.h5"])
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "geffect: Interrupted.\n"


@pytest.mark.parametrize(
    ("place", "method"),
    [
        # The options of the command itself are read, the commands are built.
        (CommandOfObjectives, "get_params"),
        (Group, "parse_args"),
        (Group, "__init__"),
    ],
)
def test_an_interrupt_before_a_command_runs_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: type[object],
    method: str,
) -> None:
    def interrupted(*_: object, **__: object) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, method, interrupted)
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
