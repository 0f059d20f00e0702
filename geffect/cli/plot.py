"""`geffect plot`: a picture of a score of a run."""

from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from .options import Medium, OverwriteOption, check_output, choice, written_to
from .parts import LayersOption, StepsOption, chosen
from .selection import (
    BetweenOption,
    ByOption,
    RunArgument,
    ScoreName,
    check_taken,
    table_of,
)
from .terminal import say, terminal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def in_panels(name: str, table: "pd.DataFrame") -> "Figure":
    """A plot of axes, with a panel for each effect or risk where one cannot hold all."""
    from geffect import plots

    told_apart = next((c for c in ("effect", "risk", "against") if c in table.columns), None)
    if told_apart is None:
        return on_axes(name, table)
    # Of a rectified run both effects of each gradient stand side by side.
    wide = 3 if table[told_apart].nunique() <= 3 else 2
    return plots.facets(table, getattr(plots, name), told_apart, columns=wide)


def on_axes(name: str, table: "pd.DataFrame") -> "Figure":
    """A plot of axes by itself."""
    from geffect import plots
    from geffect.plots.figures import new_figure

    figure = new_figure(6.4, 4.8)
    getattr(plots, name)(table, ax=figure.subplots())
    return figure


def of_one_block(name: str, table: "pd.DataFrame") -> "Figure":
    """A plot of axes that have room for one block."""
    from geffect.scores import blocks_of

    blocks = table[blocks_of(table)].nunique()
    if blocks > 1:
        raise typer.BadParameter(
            f"`--by` should leave one block to the picture {name}, which has room for one. Found "
            f"{blocks}. Pass --by model, or choose one of them with --layers."
        )
    return on_axes(name, table)


def whole(name: str, table: "pd.DataFrame") -> "Figure":
    """A plot that is a figure."""
    from geffect import plots

    figure: Figure = getattr(plots, name)(table)
    return figure


class Kind(StrEnum):
    """The pictures, each with how a table is put into it and the scores that it is of.

    Without scores it is of most. The first is drawn where none is named.
    """

    put: Callable[[str, "pd.DataFrame"], "Figure"]
    scores: tuple[ScoreName, ...]

    def __new__(
        cls, name: str, put: Callable[[str, "pd.DataFrame"], "Figure"], *scores: ScoreName
    ) -> Self:
        kind = str.__new__(cls, name)
        kind._value_, kind.put, kind.scores = name, put, scores
        return kind

    HEATMAP = "heatmap", in_panels
    PROFILE = "profile", in_panels
    TRAJECTORY = "trajectory", in_panels
    SHEET = "sheet", whole
    RECTIFICATION = "rectification", whole, ScoreName.RECTIFICATION
    TIMELINE = "timeline", whole, ScoreName.CONFLICT, ScoreName.VIOLATION
    ACCUMULATED = "accumulated", of_one_block, ScoreName.ACCUMULATED
    WALK = "walk", of_one_block, ScoreName.ACCUMULATED
    ANGLES = "angles", of_one_block, ScoreName.ANGLES
    NORM_RATIO = "norm-ratio", whole, ScoreName.NORM_RATIO
    NOISE_FLOOR = "noise-floor", on_axes, ScoreName.NOISE_FLOOR


WITH_OWN = {score for kind in Kind for score in kind.scores} - {
    ScoreName.CONFLICT,
    ScoreName.VIOLATION,
}
"""The scores that have pictures of their own alone."""


def command(
    ctx: typer.Context,
    run: RunArgument,
    output: Annotated[
        Path,
        written_to("Where to", ".png", ".pdf", ".svg"),
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
    steps: StepsOption = None,
    layers: LayersOption = None,
    style: Annotated[
        Medium | None,
        choice(
            "--style",
            Medium,
            "Made for a column (3.3 inches wide), a page (6.9) or a slide (10), with text that can "
            "be read there and without the name of the run",
            "STYLE",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a score of a run: layers by steps, the profile over depth, its course, or all three.

    What a rectifier did is a score and a picture of its own.
    """
    from geffect import open_run, plots
    from geffect.plots.figures import save
    from geffect.plots.words import drawn

    kind, score = _chosen(kind, score)
    check_taken(ctx, score)
    check_output(output, overwrite=overwrite)
    table = chosen(table_of(open_run(run), score, by, between), steps, layers)
    with plots.style(style.value) if style else nullcontext():
        figure = draw(table, kind)
        if not style:
            figure.suptitle(f"{drawn(run.stem, 60)}  {figure.get_suptitle()}".strip())
        save(figure, output, dpi=300 if style else 150)
    say(terminal(), f"{' of '.join(dict.fromkeys([kind.value, score.value]))} in {output}")


def _chosen(kind: Kind | None, score: ScoreName | None) -> tuple[Kind, ScoreName]:
    """The picture and the score, where one of them may say the other."""
    own = [one for one in Kind if score in one.scores]
    kind = kind or (own[0] if score in WITH_OWN else Kind.HEATMAP)
    scores = kind.scores or [name for name in ScoreName if name not in WITH_OWN]
    score = score or scores[0]
    if score not in scores:
        pictures = own if score in WITH_OWN else [kind]
        raise typer.BadParameter(
            f"`--kind {' or '.join(pictures)}` should go with "
            f"`--score {' or '.join(pictures[0].scores)}`. Found `--kind {kind}` with "
            f"`--score {score}`. Leave one of the two out."
        )
    return kind, score


def draw(table: "pd.DataFrame", kind: Kind) -> "Figure":
    """The picture of a table."""
    return kind.put(kind.replace("-", "_"), table)
