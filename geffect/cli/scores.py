"""`geffect scores`: a score of a run as a table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .selection import (
    BetweenOption,
    By,
    ByOption,
    JsonOption,
    RunArgument,
    ScoreName,
    ScoreOption,
    table_of,
    written_as,
)

if TYPE_CHECKING:
    import pandas as pd


def command(
    run: RunArgument,
    score: ScoreOption = ScoreName.G_EFFECT,
    by: ByOption = By.LAYER,
    between: BetweenOption = "objective,retain",
    csv: Annotated[
        Path | None,
        typer.Option(callback=written_as(".csv"), help="Write the whole table there."),
    ] = None,
    intervals: Annotated[
        bool,
        typer.Option(
            "--intervals",
            help="With 95 % bootstrap intervals over the batches of each step of a replay.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute a score for every step: print a summary, or give the table as CSV or JSON."""
    from geffect import open_run

    table = table_of(open_run(run), score, by, between, intervals=intervals)
    if csv is not None:
        table.to_csv(csv, index=False)
        typer.echo(f"{len(table)} rows in {csv}")
    elif as_json:
        # Not pandas' own JSON, which rounds to ten decimals: early scores are smaller than that.
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        typer.echo(json.dumps(rows))
    else:
        _show(table)


def _show(table: "pd.DataFrame") -> None:
    from rich.console import Console
    from rich.table import Table

    from geffect.scores import score_of

    names = [c for c in table.columns if c not in ("step", "value", "low", "high")]
    summary = table.groupby(names, observed=True)["value"].agg(["first", "median", "last"])
    steps = f"{table['step'].nunique()} steps, {table['step'].min()} to {table['step'].max()}"
    shown = Table(title=f"{score_of(table).label}: {steps}", title_justify="left")
    for name in names:
        shown.add_column(name)
    for name in ("first", "median", "last"):
        shown.add_column(name, justify="right")
    for key, row in summary.iterrows():
        labels = key if isinstance(key, tuple) else (key,)
        shown.add_row(*map(str, labels), *(f"{value:.4g}" for value in row))
    Console().print(shown)
