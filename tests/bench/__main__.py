"""All rows of the benchmark: a table on the terminal, and the same as JSON."""

import argparse
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from . import (
    capture,
    device,
    effects,
    products,
    public_procedure,
    rectification,
    relearned,
    storage,
)
from .bars import Row
from .rounds import CLOCKS
from .workload import FULL, QUICK, Workload

KINDS = {
    kind.__name__.rpartition(".")[-1]: kind
    for kind in (capture, rectification, relearned, effects, public_procedure, storage, products)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything."""
    options = _options(arguments)
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL[options.device]
    if options.size is not None:
        size = device.SIZES[options.size]
    workload = Workload.of(size, options.device)
    quick = options.quick or options.size == "small"
    console, table = Console(), _table(workload, quick=quick)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measured: list[Row] = []
    # Beside the result, since a folder for temporary files may be in memory.
    with (
        tempfile.TemporaryDirectory(dir=options.out.parent) as folder,
        Live(table, console=console, refresh_per_second=1),
    ):
        for row in _rows(workload, Path(folder), options):
            measured.append(row)
            table.add_row(*_cells(row))
    console.print()
    setting = {"workload": str(workload), "quick": quick, **place(workload, options)}
    rows = [row.as_json() | setting for row in measured]
    # With these options, beside what else was measured before.
    known = []
    if (options.size or options.only) and options.out.exists():
        known = json.loads(options.out.read_text(encoding="utf-8"))
    quantities = {row["quantity"] for row in rows}
    kept = [
        row
        for row in known
        if row["workload"] != str(workload) or (options.only and row["quantity"] not in quantities)
    ]
    options.out.write_text(json.dumps([*kept, *rows], indent=2) + "\n", encoding="utf-8")


def place(workload: Workload, options: argparse.Namespace) -> dict[str, str]:
    """Where and by what a row is measured."""
    elsewhere = None if workload.device == "cpu" else workload.device
    asked = {"device": elsewhere, "size": options.size, "only": options.only}
    given = "".join(f" --{name} {value}" for name, value in asked.items() if value)
    return {
        "device": _device(workload),
        "machine": _machine(),
        "torch": torch.__version__,
        "command": f"python -m tests.bench{given}{' --quick' if options.quick else ''}",
    }


def _machine() -> str:
    """The processor, and how many of its cores there are."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _rows(workload: Workload, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    if options.size is not None:
        yield from device.Bench(options.size, workload, folder).rows()
        return
    for name in [options.only] if options.only else KINDS:
        yield from KINDS[name].rows(workload, folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=main.__doc__)
    parser.add_argument("--device", choices=CLOCKS, default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument(
        "--size", choices=device.SIZES, help="a step of such a model, beside what else there is"
    )
    parser.add_argument("--only", choices=KINDS, help="these rows, beside what else there is")
    parser.add_argument("--out", type=Path, help="the JSON; runs/bench.json or bench-DEVICE.json")
    options = parser.parse_args(arguments)
    if options.out is None:
        name = "bench" if options.size is None else f"bench-{options.device}"
        options.out = Path("runs") / f"{name}.json"
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
        caption="Too small to mean anything" if quick else None,
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
