"""What a user names on the command line: a score, its blocks, a pair of gradients."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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


class By(StrEnum):
    """What values are summed over."""

    PARAMETER = "parameter"
    LAYER = "layer"
    GROUP = "group"
    MODEL = "model"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run file (.h5).")]
ScoreOption = Annotated[ScoreName, typer.Option("--score", help="Which score.")]
ByOption = Annotated[By, typer.Option("--by", help="One value for each of these.")]
BetweenOption = Annotated[
    str,
    typer.Option(
        help="The two gradients that cosine and conflict compare, with a comma between them."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for a script to read.")]


def table_of(run: "Run", score: ScoreName, by: By, between: str) -> "pd.DataFrame":
    """The table of a score of a run."""
    from geffect import analysis

    first, second = _pair(between)
    tables: dict[ScoreName, Callable[[], pd.DataFrame]] = {
        ScoreName.G_EFFECT: lambda: analysis.g_effect(run, by),
        ScoreName.COSINE: lambda: analysis.cosine(run, first, second, by),
        ScoreName.CONFLICT: lambda: analysis.conflict(run, first, second, by),
        ScoreName.PREDICTED_CHANGE: lambda: analysis.predicted_change(run, by),
        ScoreName.VIOLATION: lambda: analysis.violation(run, by),
    }
    return tables[score]()


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
            f"should be two gradients with a comma between them. Found `{between}`. "
            "Pass, say, --between objective,retain."
        )
    return names[0].strip(), names[1].strip()
