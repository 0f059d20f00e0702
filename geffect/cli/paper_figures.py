"""The figures of the G-effect paper: of which runs each is, and what it shows of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from geffect import Run
    from geffect.analysis import Setting

MEAN = "mean"
INVERSE, WEIGHTS = "inverse confidence", "weight"
MEANS = {INVERSE: "mean of 1/p", WEIGHTS: "mean weight of a sample"}
"""The implicit weights that are drawn, and what their means are."""


@dataclass(frozen=True)
class Kind:
    """The runs that a figure is of: which they are, in words, and what to tell a recorder."""

    holds: Callable[["Setting"], bool]
    words: str
    record: str = ""

    @classmethod
    def of(cls, objective: str) -> "Kind":
        """Those of an objective, whatever its options and regulariser are.

        >>> Kind.of("WGA").record
        'objective="wga"'
        """
        record = f'objective="{objective.lower()}"'
        return cls(lambda own: own.objective == objective, f"a run of {objective}", record)


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper: of which runs it is, and what it shows of them.

    - `name`: that of its files; the function in `geffect.plots.paper` has it with `_`.
    - `table`: what is drawn of one run. Raises ValueError for a run that lacks it.
    - `told`: the options that name a setting, whether or not its runs differ in them.
    - `beside`: whether a run may stand beside another one that has a table.
    - `mixed`: whether runs with a regulariser stand beside those without.
    - `rectified`: whether runs that a rectifier changed stand in where there are no others.
    - `over_seeds`: what it shows of several seeds, in words.
    """

    name: str
    shows: str
    kind: Kind
    table: Callable[["Run"], "pd.DataFrame"]
    told: Sequence[str] = ()
    beside: Callable[["Setting", "Setting"], bool] = lambda first, other: True
    mixed: bool = False
    rectified: bool = False
    over_seeds: str = "mean and range of the seeds of a setting"


def figures() -> list[PaperFigure]:
    """The figures of the paper, in its order."""
    ga, wga, npo, tnpo, po, rmu = map(Kind.of, ("GA", "WGA", "NPO", "TNPO", "PO", "RMU"))
    every = Kind(lambda own: True, "a run")
    regularised = Kind(
        lambda own: own.regulariser in ("GD", "KL", "RR"), "a run with GD, KL or RR",
        'objective="ga+kl"',
    )  # fmt: skip
    return [
        PaperFigure(
            "figure-1", "the half-spaces of both effects", every, _angles, beside=_never,
            rectified=True,
        ),
        PaperFigure("figure-3a", "effects of GA", ga, _effects),
        PaperFigure(
            "figure-3b", "effects of GA by group of layers", ga, _groups, beside=_another_seed
        ),
        PaperFigure("figure-3c", "effects of WGA by alpha", wga, _effects, ("alpha",)),
        PaperFigure("figure-4", "effects of NPO by beta", npo, _effects, ("beta",)),
        PaperFigure("figure-5a", "mean weight of NPO by beta", npo, _weight(WEIGHTS), ("beta",)),
        PaperFigure(
            "figure-5b", "effects of each sample by its weight under NPO", npo, _samples,
            ("beta",), beside=_another_seed, over_seeds="seeds pooled",
        ),
        PaperFigure("figure-5c", "effects of TNPO by beta", tnpo, _effects, ("beta",)),
        PaperFigure("figure-6", "effects of PO", po, _effects),
        PaperFigure(
            "figure-7", "effects of RMU by layer and c", rmu, _effects, ("layer", "coefficient")
        ),
        PaperFigure(
            "regularisers", "effects with GD, KL and RR", regularised, _effects, mixed=True
        ),
        PaperFigure("inverse-confidence", "mean of 1/p", every, _weight(INVERSE)),
        PaperFigure("table-1", "metrics by setting", every, _metrics, mixed=True),
    ]  # fmt: skip


def _never(first: "Setting", other: "Setting") -> bool:
    return False


def _another_seed(first: "Setting", other: "Setting") -> bool:
    """Whether two runs differ in their seeds, and in nothing else that their files tell."""
    told = None not in (first.seed, other.seed) and first.seed != other.seed
    return told and replace(first, seed=None) == replace(other, seed=None)


def _effects(run: "Run") -> "pd.DataFrame":
    from geffect.analysis import g_effect

    return g_effect(run, by="model")


def _groups(run: "Run") -> "pd.DataFrame":
    from geffect.analysis import g_effect

    return g_effect(run, by="paper")


def _weight(name: str) -> Callable[["Run"], "pd.DataFrame"]:
    def of(run: "Run") -> "pd.DataFrame":
        from geffect.analysis import implicit_weights
        from geffect.scores import WEIGHT, Score, said

        table = implicit_weights(run)
        own = table[(table["weight"] == name) & (table["statistic"] == MEAN)]
        if own.empty:
            raise ValueError(
                f"`{run.path}` should hold the weight `{name}`. Found "
                f"{', '.join(run.contents.weights)}. Record an objective that has it, such as NPO."
            )
        # The weights of NPO lie between 0 and 2; 1/p has no bound.
        score = Score(MEANS[name], WEIGHT if name == INVERSE else "")
        return said(own.drop(columns=["weight", "statistic"]).reset_index(drop=True), score)

    return of


def _samples(run: "Run") -> "pd.DataFrame":
    from geffect.analysis import SAMPLES, kept

    table = kept(run, SAMPLES)
    if "weight" not in table:
        raise ValueError(
            f"The table `{SAMPLES}` of `{run.path}` should have the weight of each sample. Found "
            f"the columns {', '.join(map(str, table.columns))}. Keep it with a column `weight`."
        )
    return table


def _angles(run: "Run") -> "pd.DataFrame":
    """Those of the step in the middle of those that have a direction for each gradient."""
    from geffect.analysis import angles
    from geffect.sources import FORGET, OBJECTIVE, RETAIN

    wanted = (OBJECTIVE, FORGET, RETAIN)
    for name in wanted:
        run.index(name)
    table = angles(run)
    own = table[table["source"].isin(wanted) & table["other"].isin(wanted)]
    undefined = own.loc[own["value"].isna(), "step"]
    steps = own.loc[~own["step"].isin(undefined), "step"].unique()
    if not len(steps):
        raise ValueError(
            f"`{run.path}` should have a step with a direction for each of {', '.join(wanted)}. "
            "Found none: at each step one of them is zero or not known. Record a model that has "
            "something to learn of both sets."
        )
    chosen: pd.DataFrame = own[own["step"] == steps[len(steps) // 2]].reset_index(drop=True)
    return chosen


def _metrics(run: "Run") -> "pd.DataFrame":
    import pandas as pd

    from geffect.analysis import METRICS

    table = pd.DataFrame(run.table(METRICS))
    missing = {"metric", "value"} - {*table.columns}
    if missing or table["metric"].duplicated().any() or not len(table):
        raise ValueError(
            f"The table `{METRICS}` of `{run.path}` should have the columns metric and value, and "
            f"each metric once. Found {', '.join(map(str, table.columns))}, {len(table)} rows. "
            "Keep a row for each metric."
        )
    return table[["metric", "value"]]
