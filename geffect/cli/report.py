"""`geffect report`: runs as one self-contained page."""

from pathlib import Path
from typing import Annotated

import typer

from geffect.drafts import write_whole
from geffect.numbers import counted

from .options import OverwriteOption, check_output, choice, written_to
from .selection import By
from .terminal import say, terminal


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run files (.h5).")],
    output: Annotated[
        Path,
        written_to("The page to write", ".html"),
    ],
    by: Annotated[
        By,
        choice("--by", By, "The rows of the maps of G-effects and cosines", "BLOCKS"),
    ] = By.LAYER,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare runs on a page that opens offline: a table, overlays, where they part, and each."""
    from geffect import open_run
    from geffect.report import runs_report
    from geffect.report.read import check_once

    check_output(output, overwrite=overwrite)
    opened = [open_run(path) for path in runs]
    check_once(opened)
    page = runs_report(opened, by.value)
    write_whole(output, page)
    say(terminal(), f"{counted(len(runs), 'run')} in {output}")
