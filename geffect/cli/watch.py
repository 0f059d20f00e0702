"""`geffect watch`: a run while it is written."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import Apart, Needs, check_together
from .options import choice, whole
from .selection import By
from .terminal import canvas, draw, say, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from .followed import Followed
    from .watch_view import View

PAUSE = 1.0
"""Seconds between two looks at the file."""

WIDE = 100
"""The columns of a frame that goes to no terminal."""

HIGHEST = 65535
"""The highest number of a port."""

RULES = (Apart("--once", "--serve"), Needs("--port", "--serve"))


def _port(text: str) -> int:
    number = whole(0)(text)
    if number > HIGHEST:
        raise typer.BadParameter(
            f"should be a port, {HIGHEST} at most. Found `{text}`. Leave it out for one that is "
            "free."
        )
    return number


def command(
    ctx: typer.Context,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run file (.h5), which need not be there yet.")
    ],
    by: Annotated[By, choice("--by", By, "A row for each of these", "BLOCKS")] = By.LAYER,
    once: Annotated[
        bool, typer.Option("--once", help="Show how the run stands now, and end.")
    ] = False,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show it as a page on 127.0.0.1 that renews itself."),
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            parser=_port, metavar="N", help="The port of that page; 0 for any that is free."
        ),
    ] = 0,
) -> None:
    """Follow a run while it is written, from before its file is there until it is complete.

    A terminal shows the scores of the last step as bars and all steps as small curves. What is no
    terminal, such as a pipe, gets a line for each new step. The recorder does not notice. Ctrl-C
    ends it.
    """
    from .followed import Followed

    check_together(ctx, RULES)
    _check_place(run)
    followed, console = Followed(run, str(by)), terminal()
    if once:
        _show_once(followed.look())
        return
    with _interrupted() as ended:
        if serve:
            from .watch_page import serving

            followed.look()  # what is no run is said here
            with serving(followed, port) as address:
                say(console, f"{run} is shown at {address} (Ctrl-C ends it)")
                ended.wait()
        elif console.is_terminal and not console.is_dumb_terminal:
            _live(followed, ended)
        else:
            _tell(followed, console, ended)


def _check_place(run: Path) -> None:
    if run.exists() and not run.is_file():
        found = "a folder" if run.is_dir() else "a pipe or a device"
        raise FileExistsError(
            f"A run that is watched should be a file, or not there yet. Found {found} at `{run}`. "
            "Check the path."
        )


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """What is set by Ctrl-C, which then breaks into nothing that is read."""
    ended = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: ended.set())
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, before)


def _show_once(view: "View") -> None:
    from .watch_frame import frame, marks_of

    console = canvas(shutil.get_terminal_size((WIDE, 0)).columns)
    draw(console, frame(view, marks_of(console), console.width))


def _live(followed: "Followed", ended: threading.Event) -> None:
    """A frame in its place, until the run is complete."""
    from rich.live import Live

    from .watch_frame import frame, marks_of
    from .watch_view import State

    console = canvas(WIDE)
    marks, view = marks_of(console), followed.look()  # no run: said before anything is drawn
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(frame(view, marks, console.width, console.height - 1), refresh=True)
            if view.state is State.COMPLETE or ended.wait(PAUSE):
                return
            view = followed.look()


def _tell(followed: "Followed", console: "Console", ended: threading.Event) -> None:
    """A line for each new step, and for how the run stands where that is new."""
    from .watch_frame import lines_of
    from .watch_view import State

    told: list[str] = []
    stands: object = None
    while True:
        view = followed.look()
        lines = [*lines_of(view)]
        # A row may be told again when more is known of it, and is gone for a moment before that.
        say(console, *(line for i, line in enumerate(lines) if told[i : i + 1] != [line]))
        told[: len(lines)] = lines
        now = (view.state, view.is_quiet, view.notes)
        if now != stands and (view.state is not State.OPEN or view.is_quiet or view.notes):
            say(console, view.comes, *view.notes)
        stands = now
        if view.state is State.COMPLETE or ended.wait(PAUSE):
            return
