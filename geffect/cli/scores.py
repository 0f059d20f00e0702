"""`geffect scores`: a score of a run as a table."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .selection import (
    BetweenOption,
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
    by: ByOption = None,
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
    all_parameters: Annotated[
        bool,
        typer.Option(
            "--all-parameters", help="Sum over all parameters, also those that a step leaves alone."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute a score for every step: print a summary, or give the table as CSV or JSON."""
    from geffect import open_run

    table = table_of(
        open_run(run), score, by, between, intervals=intervals, stepped_only=not all_parameters
    )
    if csv is not None:
        table.to_csv(csv, index=False)
        typer.echo(f"{len(table)} rows in {csv}")
    elif as_json:
        # Not pandas' own JSON, which rounds to ten decimals: early scores are smaller than that.
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        typer.echo(json.dumps(rows))
    else:
        _show(table)


FEW_STEPS = 12
"""So many steps are listed one by one, more are summed up."""


def _show(table: "pd.DataFrame") -> None:
    from rich.console import Console
    from rich.table import Table

    from geffect.scores import score_of

    names = [c for c in table.columns if c not in ("step", "value", "rows", "low", "high")]
    steps = f"{table['step'].nunique()} steps, {table['step'].min()} to {table['step'].max()}"
    title = f"{score_of(table).label}: {steps}"
    if "low" in table:
        title += ", with 95 % intervals"
    console = Console()
    # Not the title of the table, which would be folded to its width.
    console.print(title, highlight=False, soft_wrap=True)
    shown = Table()
    if "low" in table and table["step"].nunique() <= FEW_STEPS:
        columns, lines = _step_by_step(table, names)
    else:
        columns, lines = _summed_up(table, names)
    for column in columns:
        shown.add_column(column, justify="left" if column in names else "right")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    if "low" in table and table["low"].isna().any():
        console.print(
            "No interval where a step has fewer than 8 rows, or where the score is undefined in a "
            "replicate.",
            soft_wrap=True,
        )


def _step_by_step(table: "pd.DataFrame", names: list[str]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [str(row["step"]), *(str(row[name]) for name in names), str(row["rows"]), _certain(row)]
        for row in table.to_dict("records")
    ]
    return ["step", *names, "rows", "value"], lines


def _summed_up(table: "pd.DataFrame", names: list[str]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for key, own in table.groupby(names, observed=True):
        first, last = own.iloc[0].to_dict(), own.iloc[-1].to_dict()
        median = f"{own['value'].median():.4g}"
        lines.append([*map(str, key), _certain(first), median, _certain(last)])
    return [*names, "first", "median", "last"], lines


def _certain(row: Mapping[Hashable, Any]) -> str:
    """The value, with its interval if it has one."""
    value = f"{row['value']:.4g}"
    low, high = row.get("low", float("nan")), row.get("high", float("nan"))
    return value if low != low else rf"{value} \[{low:.3g}, {high:.3g}]"
