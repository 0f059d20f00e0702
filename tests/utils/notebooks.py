"""Runs a notebook in a fork that has imported already what the tests import."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

from tests.utils import forks


def run(notebook: Any, folder: Path, environment: Mapping[str, str]) -> None:
    """Run the cells in the folder, one after the other, and give each its outputs."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sources = [cell.source for cell in code]
    outputs = forks.call(_outputs_of, sources, folder, dict(environment))
    for cell, said in zip(code, outputs, strict=True):
        cell.outputs = [nbformat.v4.new_output(kind, **what) for kind, what in said]


def _outputs_of(cells: list[str], folder: Path, environment: dict[str, str]) -> list[Any]:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def enable_gui(self, gui: str | None = None) -> None:
            """There is none."""

    os.environ |= environment
    os.chdir(folder)
    shell = Shell.instance(config=Config(HistoryManager={"enabled": False}))
    return [[*_outputs(shell, cell)] for cell in cells]


def _outputs(shell: Any, cell: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a cell shows, as the kinds of output of a notebook and what they hold."""
    from IPython.utils.capture import capture_output

    with capture_output() as said:
        shell.display_trap.hook = sys.displayhook  # which keeps what it is given
        ended = shell.run_cell(cell)
    ended.raise_error()
    for name in ("stdout", "stderr"):
        if text := getattr(said, name):
            yield "stream", {"name": name, "text": text}
    for shown in said.outputs:
        yield "display_data", {"data": shown.data}
