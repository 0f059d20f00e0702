"""What a user names on the command line: a score, its blocks, a pair of gradients."""

from collections.abc import Callable, Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from geffect.notes import OfArgument

from .command import given
from .options import choice

if TYPE_CHECKING:
    import pandas as pd

    from geffect import Run


class By(StrEnum):
    """What values are summed over."""

    PARAMETER = "parameter"
    EXPERT = "expert"
    LAYER = "layer"
    GROUP = "group"
    PAPER = "paper"  # groups of the depth: thirds
    CODE = "code"  # below 10, from 10 to 19, from 20 on
    TOWER = "tower"
    MODEL = "model"


BETWEEN, INTERVALS, ALL_PARAMETERS = "--between", "--intervals", "--all-parameters"


class ScoreName(StrEnum):
    """The scores by their name on the command line, each with the options that it alone takes.

    An option that no score has here, such as --by, is one of them all. `by` is what a score is
    taken over where none is given; None for what the rectifier constrains.
    """

    takes: Collection[str]
    by: By | None

    def __new__(cls, name: str, takes: Collection[str] = (), by: By | None = By.LAYER) -> Self:
        score = str.__new__(cls, name)
        score._value_, score.takes, score.by = name, takes, by
        return score

    G_EFFECT = "g-effect", (INTERVALS, ALL_PARAMETERS)
    COSINE = "cosine", (BETWEEN, INTERVALS, ALL_PARAMETERS)
    CONFLICT = "conflict", (BETWEEN, INTERVALS, ALL_PARAMETERS), None
    # These are of what an optimizer or a rectifier did, once a step: no interval tells of that.
    PREDICTED_CHANGE = "predicted-change"
    VIOLATION = "violation", (), None
    # Most rectifiers have one constraint for the model, which has no numbers of the layers.
    RECTIFICATION = "rectification", (), By.MODEL
    ACCUMULATED = "accumulated", (), By.MODEL
    ANGLES = "angles", (ALL_PARAMETERS,), By.MODEL
    NORM_RATIO = "norm-ratio", (BETWEEN, ALL_PARAMETERS), By.MODEL
    NOISE_FLOOR = "noise-floor", (BETWEEN, ALL_PARAMETERS)


OF_SOME = {option for score in ScoreName for option in score.takes}


def _of(option: str) -> str:
    return ", ".join(score for score in ScoreName if option in score.takes)


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run file (.h5).")]
ScoreOption = Annotated[ScoreName, choice("--score", ScoreName, "Which score", "SCORE")]
ByOption = Annotated[
    By | None,
    choice(
        "--by",
        By,
        "One value for each of these; if left out layer, model for a rectification, and what the "
        "rectifier constrains for conflict and violation",
        "BLOCKS",
    ),
]
BetweenOption = Annotated[
    str,
    typer.Option(
        metavar="SOURCE,SOURCE", help=f"The two gradients that are compared, of {_of(BETWEEN)}."
    ),
]
IntervalsOption = Annotated[
    bool,
    typer.Option(
        INTERVALS,
        help="With 95 % bootstrap intervals over the batches of each step of a replay, of "
        f"{_of(INTERVALS)}.",
    ),
]
AllParametersOption = Annotated[
    bool,
    typer.Option(
        ALL_PARAMETERS,
        help="Sum over all parameters, also those that a step leaves alone, of "
        f"{_of(ALL_PARAMETERS)}.",
    ),
]


def check_taken(ctx: typer.Context, score: ScoreName) -> None:
    """Refuse an option that was given and that the score does not take."""
    for option in sorted((given(ctx) & OF_SOME) - {*score.takes}):
        raise typer.BadParameter(
            f"`{option}` should go with one of the scores {_of(option)}. Found it with {score}. "
            f"Leave {option} out, or choose one of those with --score."
        )


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
    from geffect.analysis.base import check_steps

    check_steps(run)
    how: dict[str, Any] = {"by": by or score.by}
    if BETWEEN in score.takes:
        how["a"], how["b"] = _pair(between)
    if ALL_PARAMETERS in score.takes:
        how["stepped_only"] = stepped_only
    function: Callable[..., pd.DataFrame] = getattr(analysis, score.replace("-", "_"))
    try:
        return analysis.intervals(function, run, **how) if intervals else function(run, **how)
    except OfArgument as error:
        if (of_option := _of_option(error, score)) is None:
            raise
        raise typer.BadParameter(of_option) from error


def _of_option(error: OfArgument, score: ScoreName) -> str | None:
    """What is said of the option that an argument is from; None of any other argument."""
    named = {"by": ("`--by`", "--by {}")}
    if BETWEEN in score.takes:
        named["source"] = f"Each of `{BETWEEN}`", f"{BETWEEN} {{}}"
    return error.said_of(*named[error.argument]) if error.argument in named else None


def _pair(between: str) -> tuple[str, str]:
    names = between.split(",")
    if len(names) != 2:
        raise typer.BadParameter(
            f"`--between` should be two gradients with a comma between them. Found `{between}`. "
            "Pass, say, --between objective,retain."
        )
    return names[0].strip(), names[1].strip()
