"""`geffect plot`: a picture of a score of a run."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import OverwriteOption, check_output, choice
from .selection import (
    BetweenOption,
    ByOption,
    RunArgument,
    ScoreName,
    check_taken,
    table_of,
    written_as,
)
from .terminal import say, terminal

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


OF_A_RECTIFIER = {Kind.RECTIFICATION.value, ScoreName.RECTIFICATION.value}
"""A picture and a score that go with each other alone."""


def command(
    ctx: typer.Context,
    run: RunArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=written_as(".png", ".pdf", ".svg"),
            help="Where to: .png, .pdf or .svg.",
        ),
    ],
    kind: Annotated[
        Kind | None,
        choice("--kind", Kind, "Which picture; heatmap, or that of the score, if left out", "KIND"),
    ] = None,
    score: Annotated[
        ScoreName | None,
        choice(
            "--score",
            ScoreName,
            "Which score; g-effect, or that of the picture, if left out",
            "SCORE",
        ),
    ] = None,
    by: ByOption = None,
    between: BetweenOption = "objective,retain",
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a score of a run: layers by steps, the profile over depth, its course, or all three.

    What a rectifier did is a score and a picture of its own.
    """
    from geffect import open_run
    from geffect.plots.style import drawn

    kind, score = _chosen(kind, score)
    check_taken(ctx, score)
    check_output(output, overwrite=overwrite)
    table = table_of(open_run(run), score, by, between)
    figure = draw(table, kind)
    figure.suptitle(f"{drawn(run.stem, 60)}  {figure.get_suptitle()}".strip())
    figure.savefig(output, dpi=150)
    say(terminal(), f"{' of '.join(dict.fromkeys([kind.value, score.value]))} in {output}")


def _chosen(kind: Kind | None, score: ScoreName | None) -> tuple[Kind, ScoreName]:
    """The picture and the score, where one of them may say the other."""
    if not OF_A_RECTIFIER & {kind, score}:
        return kind or Kind.HEATMAP, score or ScoreName.G_EFFECT
    if {kind, score} - OF_A_RECTIFIER - {None}:
        raise typer.BadParameter(
            "`--kind rectification` and `--score rectification` should go with each other. Found "
            f"`--kind {kind}` with `--score {score}`. Leave one of the two out."
        )
    return Kind.RECTIFICATION, ScoreName.RECTIFICATION


def draw(table: "pd.DataFrame", kind: Kind) -> "Figure":
    """The picture of a table, with a panel for each effect or risk where one cannot hold all."""
    from geffect import plots

    told_apart = [c for c in ("effect", "risk", "against") if c in table.columns]

    def panels(plot: Callable[..., "Axes"]) -> "Figure":
        if told_apart:
            # Of a rectified run both effects of each gradient stand side by side.
            wide = 3 if table[told_apart[0]].nunique() <= 3 else 2
            return plots.facets(table, plot, told_apart[0], columns=wide)
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
