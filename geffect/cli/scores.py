"""`geffect scores`: a score of a run as a table."""

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from geffect.numbers import percent

from .options import Format, FormatOption
from .selection import (
    AllParametersOption,
    BetweenOption,
    ByOption,
    IntervalsOption,
    RunArgument,
    ScoreName,
    ScoreOption,
    check_taken,
    table_of,
)
from .terminal import say, show, terminal, write_table

if TYPE_CHECKING:
    import pandas as pd


def command(
    ctx: typer.Context,
    run: RunArgument,
    score: ScoreOption = ScoreName.G_EFFECT,
    by: ByOption = None,
    between: BetweenOption = "objective,retain",
    intervals: IntervalsOption = False,
    all_parameters: AllParametersOption = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Compute a score for every step: a summary as a table, or all of it as TSV, CSV or JSON."""
    from geffect import open_run

    check_taken(ctx, score)
    table = table_of(
        open_run(run), score, by, between, intervals=intervals, stepped_only=not all_parameters
    )
    if form is Format.TABLE:
        _show(table)
    else:
        write_table(table, form)


FEW_STEPS = 12
"""So many steps are listed one by one, more are summed up."""


def _told(steps: "pd.Series[int]") -> str:
    count = steps.nunique()
    return f"step {steps.min()}" if count == 1 else f"{count} steps, {steps.min()} to {steps.max()}"


def _show(table: "pd.DataFrame") -> None:
    from pandas.api.types import is_numeric_dtype

    from geffect.scores import LEVEL, SAYS, in_common

    names = [
        str(name)
        for name, column in table.items()
        if name not in (LEVEL, *SAYS) and not is_numeric_dtype(column)
    ]
    steps = _told(table["step"])
    title = f"{in_common(table) or 'rectification'}: {steps}"
    if LEVEL in table:
        title += f"; {table[LEVEL].iloc[0]}"
    if "low" in table:
        title += ", with 95 % intervals"
    console = terminal()
    say(console, title)
    if "low" in table and table["step"].nunique() <= FEW_STEPS:
        columns, lines, spare = _step_by_step(table, names)
    else:
        columns, lines, spare = _summed_up(table, names)
    show(console, columns, lines, names=names, spare=spare)
    for line in _told_apart(table, names[-1]):
        say(console, line)
    if "tolerance" in table:
        say(console, _tolerance(table))
    if "low" in table and table["low"].isna().any():
        say(
            console,
            "No interval where a step has fewer than 8 rows, or where the score is undefined in a "
            "replicate.",
        )


Lines = tuple[list[str], list[list[str]], list[str]]
"""Headings, rows, and the headings that may go where there is little room."""


def _step_by_step(table: "pd.DataFrame", names: list[str]) -> Lines:
    lines = [
        [str(row["step"]), *(str(row[name]) for name in names), str(row["rows"]), _certain(row)]
        for row in table.to_dict("records")
    ]
    return ["step", *names, "rows", "value"], lines, ["rows"]


def _summed_up(table: "pd.DataFrame", names: list[str]) -> Lines:
    from geffect.scores import scores_in

    lines = []
    for key, own in table.groupby(names, observed=True):
        first, last = own.iloc[0].to_dict(), own.iloc[-1].to_dict()
        lines.append([*map(str, key), _certain(first), _middle(own), _certain(last)])
    kinds = {"rate" if score.is_rate else "median" for score in scores_in(table)}
    middle = " or ".join(sorted(kinds))
    # What is the same in every row may go first.
    alike = [name for name in names[:-1] if table[name].nunique() == 1]
    return [*names, "first", middle, "last"], lines, [*alike, "first", middle]


def _told_apart(table: "pd.DataFrame", column: str) -> Iterator[str]:
    """What each name in a column stands for, where a table has several scores."""
    from geffect.scores import scores_in

    found = scores_in(table)
    for score in found if len(found) > 1 else []:
        own = table[(table["score"] == score.label) & (table["unit"] == score.unit)]
        yield f"{'; '.join(dict.fromkeys(map(str, own[column])))}: {score.full}"


def _middle(table: "pd.DataFrame") -> str:
    """The median of values; of values that are 0 or 1, how many of those that are known are 1."""
    from geffect.scores import score_of

    known = table["value"].dropna()
    if not score_of(table).is_rate:
        return f"{known.median():.4g}"
    return f"{percent(known.mean())} of {len(known)}" if len(known) else "undefined"


def _tolerance(table: "pd.DataFrame") -> str:
    """What is said of the cosines that count as rounding."""
    least, most = table["tolerance"].min(), table["tolerance"].max()
    return (
        f"Tolerance: a violation is a cosine with the retain average above {least:.1e} to "
        f"{most:.1e}, by block and step: below that it may be the rounding of parameters."
    )


def _certain(row: Mapping[Hashable, Any]) -> str:
    """The value, with its interval if it has one."""
    value = f"{row['value']:.4g}"
    low, high = row.get("low", float("nan")), row.get("high", float("nan"))
    return value if low != low else f"{value} [{low:.3g}, {high:.3g}]"
