"""`geffect compare`: whether two runs are the same, and where they part."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Format, FormatOption
from .selection import RunArgument
from .terminal import say, show, terminal, write_json, write_table

SHOWN = 12
"""So many parameters are listed, those that are farthest apart."""

OtherArgument = Annotated[Path, typer.Argument(metavar="OTHER", help="Another run file (.h5).")]


def command(run: RunArgument, other: OtherArgument, form: FormatOption = Format.TABLE) -> None:
    """Find the first step and the layers where two runs part. Exit code 1 if they do."""
    from geffect import open_run
    from geffect.analysis import compare

    found = compare(open_run(run), open_run(other))
    if form is Format.TABLE:
        console = terminal()
        say(console, found.sentence)
        own = found.table[found.table["step"] == found.step]
        farthest = own[own["value"] > 0].nlargest(SHOWN, "value")
        if len(farthest):
            say(console, f"Farthest apart at step {found.step}:")
            rows = [
                [row["parameter"], row["layer"], f"{row['value']:.3g}"]
                for row in farthest.to_dict("records")
            ]
            show(console, ["parameter", "layer", "difference"], rows, names=["parameter", "layer"])
    elif form is Format.JSON:
        facts = {"level": found.level, "step": found.step, "layers": found.layers}
        write_json({**facts, "sentence": found.sentence})
    else:
        write_table(found.table, form)
    raise typer.Exit(code=1 if found.level == "diverged" else 0)
