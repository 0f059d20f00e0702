"""What a user names on the command line: a score, its blocks, a pair of gradients."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from geffect import Run


class ScoreName(StrEnum):
    """The scores by their name on the command line."""

    G_EFFECT = "g-effect"
    COSINE = "cosine"
    CONFLICT = "conflict"
    PREDICTED_CHANGE = "predicted-change"
    VIOLATION = "violation"
    RECTIFICATION = "rectification"


class By(StrEnum):
    """What values are summed over."""

    PARAMETER = "parameter"
    LAYER = "layer"
    GROUP = "group"
    MODEL = "model"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run file (.h5).")]
ScoreOption = Annotated[ScoreName, typer.Option("--score", help="Which score.")]
ByOption = Annotated[
    By | None,
    typer.Option(
        "--by", help="One value for each of these. If left out: layer; model for a rectification."
    ),
]
BetweenOption = Annotated[
    str,
    typer.Option(
        help="The two gradients that cosine and conflict compare, with a comma between them."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for a script to read.")]


def table_of(
    run: "Run",
    score: ScoreName,
    by: By | None,
    between: str,
    *,
    intervals: bool = False,
    stepped_only: bool = True,
) -> "pd.DataFrame":
    """The table of a score of a run, with the columns `low` and `high` where `intervals` is set."""
    from geffect import analysis

    first, second = _pair(between)
    over = {"stepped_only": stepped_only}
    pair = {"a": first, "b": second, **over}
    scores: dict[ScoreName, tuple[Callable[..., pd.DataFrame], dict[str, Any]]] = {
        ScoreName.G_EFFECT: (analysis.g_effect, over),
        ScoreName.COSINE: (analysis.cosine, pair),
        ScoreName.CONFLICT: (analysis.conflict, pair),
        ScoreName.PREDICTED_CHANGE: (analysis.predicted_change, {}),
        ScoreName.VIOLATION: (analysis.violation, {}),
        ScoreName.RECTIFICATION: (analysis.rectification, {}),
    }
    function, how = scores[score]
    if not stepped_only and "stepped_only" not in how:
        raise typer.BadParameter(
            f"`--all-parameters` should be left out for {score.value}, which is the same either "
            "way. Found it set. Leave out --all-parameters."
        )
    # Most rectifiers have one constraint for the model, which has no numbers of the layers.
    by = by or (By.MODEL if score is ScoreName.RECTIFICATION else By.LAYER)
    if intervals:
        return analysis.intervals(function, run, by=by, **how)
    return function(run, by=by, **how)


def written_as(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """A check of a path that is to be written: an existing folder, and a kind that can be."""

    def check(path: Path | None) -> Path | None:
        if path is None:
            return None
        if path.suffix not in suffixes:
            raise typer.BadParameter(
                f"should end in {', '.join(suffixes)}. Found `{path}`. Choose one of those."
            )
        if not path.parent.is_dir():
            raise typer.BadParameter(
                f"should be in a folder that exists. Found no folder `{path.parent}`. Create it."
            )
        return path

    return check


def _pair(between: str) -> tuple[str, str]:
    names = between.split(",")
    if len(names) != 2:
        raise typer.BadParameter(
            f"`--between` should be two gradients with a comma between them. Found `{between}`. "
            "Pass, say, --between objective,retain."
        )
    return names[0].strip(), names[1].strip()
