"""The command line: `geffect`, with one file a subcommand."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from geffect.notes import with_notes
from geffect.text import plain

from . import (
    audit,
    compare,
    demo,
    edit,
    estimate,
    figures,
    info,
    join,
    layers,
    plan,
    plot,
    replay,
    report,
    scores,
    validate,
    watch,
)
from .command import Command, Group, telling_of_interrupts
from .terminal import say, terminal
from .usage import UsageError, told

app = typer.Typer(
    cls=Group,
    help="See what an unlearning run does to a language model, layer by layer, and mend it.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for subcommand in (
    demo,
    info,
    scores,
    plot,
    figures,
    report,
    layers,
    join,
    plan,
    estimate,
    replay,
    edit,
    audit,
    compare,
    validate,
    watch,
):
    name, kind = subcommand.__name__.rpartition(".")[2], getattr(subcommand, "COMMAND", Command)
    app.command(name, cls=kind)(subcommand.command)


def _show_version(asked: bool) -> None:
    if asked:
        from geffect import __version__

        typer.echo(f"geffect {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """The options of `geffect` itself."""


def main() -> None:
    """Run the command line.

    Exit code 0: done; 1: it could not be done; 2: it was asked wrongly; 130: it was interrupted;
    141: nobody read on.
    """
    _open_what_is_closed()
    _write_what_the_terminal_lacks_as_codes()
    with _warnings_on_one_line():
        code = _run()
    sys.exit(code)


def _run() -> int:
    """Run the command line, and say what went wrong on one line of stderr."""
    try:
        with telling_of_interrupts():
            # Also where it is `python -m geffect`.
            code = app(prog_name="geffect", standalone_mode=False)
        return int(code or 0)
    except typer.Exit as end:
        return end.exit_code
    except UsageError as error:
        return _refused(told(error), 2)
    except OSError as error:
        return _refused(with_notes(error, _of_the_system(error)), 1)
    except (ValueError, ImportError) as error:
        return _refused(with_notes(error), 1)


def _of_the_system(error: OSError) -> str | None:
    """What the system says of a file, in a sentence like ours; None where it says nothing."""
    if not error.errno:
        return None
    place = f"`{error.filename}`" if error.filename else "What is read or written"
    return (
        f"{place} should be there for reading or writing. Found: {error.strerror}. Mend that, or "
        "choose another place."
    )


def _refused(why: str, code: int) -> int:
    say(terminal(stderr=True), f"geffect: {why}")
    return code


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """What is warned of, and what is logged, stands on lines of its own and is text."""
    before, handler = warnings.formatwarning, logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logger = logging.getLogger("geffect")
    logger.addHandler(handler)
    warnings.formatwarning = lambda message, *_, **__: f"geffect: {plain(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
        logger.removeHandler(handler)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"geffect: {plain(record.getMessage())}"


def _open_what_is_closed() -> None:
    """Give a stream that was closed before, as by `>&-`, a place where nothing is read or kept.

    A run file that took its number would be written into by whatever prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            lowest = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(lowest, mode, encoding="utf-8"))


def _write_what_the_terminal_lacks_as_codes() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
