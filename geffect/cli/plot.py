"""`geffect plot`: a picture of a score of a run."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .selection import (
    BetweenOption,
    ByOption,
    RunArgument,
    ScoreName,
    ScoreOption,
    table_of,
    written_as,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Kind(StrEnum):
    """The pictures."""

    HEATMAP = "heatmap"
    PROFILE = "profile"
    TRAJECTORY = "trajectory"
    SHEET = "sheet"
    RECTIFICATION = "rectification"


def command(
    run: RunArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            callback=written_as(".png", ".pdf", ".svg"),
            help="Where to: .png, .pdf or .svg.",
        ),
    ],
    kind: Annotated[Kind, typer.Option(help="Which picture.")] = Kind.HEATMAP,
    score: ScoreOption = ScoreName.G_EFFECT,
    by: ByOption = None,
    between: BetweenOption = "objective,retain",
) -> None:
    """Draw a score of a run: layers by steps, the profile over depth, its course, or all three.

    What a rectifier did is a score and a picture of its own.
    """
    from geffect import open_run

    if Kind.RECTIFICATION in (kind, score.value):
        kind, score = Kind.RECTIFICATION, ScoreName.RECTIFICATION
    table = table_of(open_run(run), score, by, between)
    figure = draw(table, kind)
    figure.suptitle(f"{run.stem}  {figure.get_suptitle()}".strip())
    figure.savefig(output, dpi=150)
    typer.echo(f"{' of '.join(dict.fromkeys([kind.value, score.value]))} in {output}")


def draw(table: "pd.DataFrame", kind: Kind) -> "Figure":
    """The picture of a table, with a panel for each effect or risk where one cannot hold all."""
    from geffect import plots

    told_apart = [column for column in ("effect", "risk") if column in table.columns]

    def panels(plot: Callable[..., "Axes"]) -> "Figure":
        if told_apart:
            return plots.facets(table, plot, told_apart[0])
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        plot(table, ax=figure.subplots())
        return figure

    pictures: dict[Kind, Callable[[], Figure]] = {
        Kind.HEATMAP: lambda: panels(plots.heatmap),
        Kind.PROFILE: lambda: panels(plots.profile),
        Kind.TRAJECTORY: lambda: panels(plots.trajectory),
        Kind.SHEET: lambda: plots.sheet(table),
        Kind.RECTIFICATION: lambda: plots.rectification(table),
    }
    return pictures[kind]()
