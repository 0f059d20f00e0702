"""All rows of the benchmark: a table on the terminal, and the same as JSON."""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from . import capture, effects, products, public_procedure, rectification, storage
from .bars import Row
from .rounds import CLOCKS
from .workload import FULL, QUICK, Workload

KINDS = (capture, rectification, effects, public_procedure, storage, products)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything."""
    options = _options(arguments)
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL[options.device]
    workload = Workload.of(size, options.device)
    console, table = Console(), _table(workload, quick=options.quick)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measured: list[Row] = []
    # Beside the result, since a folder for temporary files may be in memory.
    with (
        tempfile.TemporaryDirectory(dir=options.out.parent) as folder,
        Live(table, console=console, refresh_per_second=1),
    ):
        for kind in KINDS:
            for row in kind.rows(workload, Path(folder)):
                measured.append(row)
                table.add_row(*_cells(row))
    console.print()
    setting = {"device": _device(workload), "workload": str(workload), "quick": options.quick}
    rows = [row.as_json() | setting for row in measured]
    options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=main.__doc__)
    parser.add_argument("--device", choices=CLOCKS, default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="the JSON")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device` should be there. Found no cuda. Measure on the cpu.")
    return options


def _device(workload: Workload) -> str:
    if workload.device == "cuda":
        return torch.cuda.get_device_name()
    return "CPU, one thread"


def _table(workload: Workload, *, quick: bool) -> Table:
    table = Table(
        title=f"{_device(workload)}\n{workload}",
        caption="Too small to mean anything: --quick" if quick else None,
    )
    table.add_column("quantity")
    for name in ("ratio", "bar", "spread", "rounds"):
        table.add_column(name, justify="right")
    table.add_column("holds")
    return table


def _cells(row: Row) -> tuple[str, ...]:
    found = row.measured
    holds = "[green]yes[/]" if row.holds else "[bold red]no[/]"
    return (
        row.quantity, f"{found.ratio:.3g}", str(row.bar), f"{found.spread:.2g}",
        str(found.rounds), holds,
    )  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("geffect").setLevel(logging.ERROR)  # how large files become, each round
    main()
