"""The verdict of an audit: a function of its table of means, and of nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isnan

import pandas as pd

from geffect.numbers import counted, percent

from .models import ORIGINAL, RETRAINED, UNLEARNED
from .sets import FORGET
from .table import SUMMED
from .thresholds import Thresholds

MEMORISED, PRIVACY, UTILITY = "memorised", "privacy", "utility"
"""The batteries whose values count: of what is to be forgotten, of membership, of what stays."""

DIRECT, RECOVERABLE, DIFFERENCE = "direct share", "recoverable share", "auc difference"
"""What is made of them beside a model that never knew, and judged."""

GAINED = "gained share"
"""By how much a recoverable share is larger than what is there, by the same metric, unattacked."""

UNTOLD = "untold share"
"""What would be made of an attack that does not tell: by it retrained models differ too much, or
show as much as the original."""

KNOWN = "known"
"""What the original shows, asked directly, beyond a model that never knew: what can be shared."""

TOLD_APART = 0.1
"""The original tells more than a model that never knew by so much of a metric; of NLL, in nats."""

NLL, KEPT_SHARE, DEGENERATE, UNIFORM = "nll", "kept share", "degenerate", "uniform nll"
NEAR_TIES, PRIVLEAK = "near ties", "privleak"

BROKEN, REMEMBERS, HIDDEN = "broken", "remembers", "hidden"
NEVER_KNEW, PARTLY = "never knew", "partly forgotten"
NOT_RECOVERED, UNDECIDED = "not recovered by these attacks", "undecided"

EXIT_CODES = {
    NEVER_KNEW: 0, NOT_RECOVERED: 0, PARTLY: 0, UNDECIDED: 1, HIDDEN: 3, REMEMBERS: 4, BROKEN: 5,
}  # fmt: skip
"""What the command ends with, by verdict."""

OVER_FORGOTTEN, FLOOR_ESTIMATED, TIED = "over-forgotten", "floor estimated", "near ties"
DAMAGED, UNSOUND, BLIND = "damaged", "original", "blind"
FEW_ITEMS, NO_AUC, NO_INTERVAL = "n too small", "no AUC", "no interval"


@dataclass(frozen=True)
class Verdict:
    """What an audit says of a model, why, and what a reader has to know beside it.

    - `verdict`: a key of `EXIT_CODES`.
    - `reasons`: sentences, the decisive one first.
    - `flags`: each a word and, behind a colon, what it means here.
    - `attack`: what brought most back; None where nothing was attacked.
    """

    verdict: str
    reasons: tuple[str, ...]
    flags: tuple[str, ...] = ()
    attack: str | None = None

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return EXIT_CODES[self.verdict]

    @property
    def sentence(self) -> str:
        """The verdict and why, in one line."""
        return f"{self.verdict}: {' '.join(self.reasons)}"


@dataclass(frozen=True)
class _Row:
    """A row of the table: what it is of, its value and its interval."""

    metric: str
    of: str
    value: float
    low: float
    high: float
    n: int

    @property
    def told(self) -> str:
        """The value as a percentage, with its interval where there is one."""
        value = percent(self.value)
        if isnan(self.low):
            return value
        return f"{value} ({100 * self.low:.0f} to {100 * self.high:.0f})"

    def as_retrained(self, limits: Thresholds) -> bool:
        """Whether a model that never knew would have such a share."""
        near = -limits.close <= self.low and self.high <= limits.close
        about_none = self.low <= limits.hidden_low and self.high >= -limits.hidden_low
        is_bounded = self.value < limits.hidden and self.high - self.value <= limits.vague
        return near or (about_none and is_bounded)


def judged(table: pd.DataFrame, thresholds: Thresholds | None = None) -> Verdict:
    """The verdict from the table of an audit: the first of these that applies.

    1. `broken`: what should stay is gone, by the share of a retained set that is kept; or, where
       the original was sound, by degenerate answers or an NLL above that of a uniform guess.
    2. `remembers`: asked directly, the model still knows. Where it does not, and the original shows
       no more than a model that never knew, nothing can be told apart: it is `undecided`.
    3. `hidden`: an attack brings back what a model that never knew does not show, nor this one
       unattacked.
    4. `never knew`: every share, and every difference of AUC, is as that of a retrained model: its
       interval lies close to 0, or comes near to it and is not vague.
    5. `partly forgotten`: none of these. Without a retrained model the best verdict is `not
       recovered by these attacks`; without attacks, without retained sets, or where too few items
       bound what comes back, it is `undecided`.

    - `table`: rows of `battery, metric, set, model, value, low, high, n`, in any order. Direct and
      recoverable shares are rows of the batteries "direct share" and "recoverable share".

    Raises ValueError for a table without these columns.

    >>> row = {"battery": "direct share", "metric": "prob", "set": "forget", "model": "unlearned",
    ...        "value": 0.9, "low": 0.8, "high": 1.0, "n": 20}
    >>> judged(pd.DataFrame([row])).verdict
    'remembers'
    """
    limits = thresholds or Thresholds()
    _check(table)
    told = _Told(table, limits)
    flags = tuple(told.flags())
    attack = told.strongest.metric if told.strongest else None
    for verdict, reasons in told.worst():
        if reasons:
            return Verdict(verdict, tuple(reasons), flags, attack)
    if not told.attacked or not told.kept:
        return Verdict(UNDECIDED, (told.lacking(),), flags, attack)
    unbounded = told.unbounded()
    if unbounded is not None:
        return Verdict(UNDECIDED, (unbounded,), flags, attack)
    if not told.has_retrained:
        return Verdict(NOT_RECOVERED, tuple(told.nothing_came_back()), flags, attack)
    far = told.far()
    if far:
        return Verdict(PARTLY, tuple(far), flags, attack)
    return Verdict(NEVER_KNEW, tuple(told.nothing_came_back()), flags, attack)


class _Told:
    """What a table says of the unlearned model, in an order that is its own."""

    def __init__(self, table: pd.DataFrame, limits: Thresholds) -> None:
        self.limits = limits
        self.has_retrained = bool((table["model"] == RETRAINED).any())
        self._rows: dict[tuple[str, str], list[_Row]] = {}
        columns = ["model", "battery", "metric", "set", *SUMMED[4:]]
        ordered = table.sort_values([*SUMMED])
        for model, battery, *values in ordered[columns].itertuples(index=False):
            row = _Row(*values)
            if not isnan(row.value):
                self._rows.setdefault((model, battery), []).append(row)

    def rows(self, battery: str, metric: str | None = None, model: str = UNLEARNED) -> list[_Row]:
        """The rows of a battery, or of one of its metrics, that have a value."""
        rows = self._rows.get((model, battery), [])
        return [row for row in rows if metric in (None, row.metric)]

    @property
    def direct(self) -> list[_Row]:
        return self.rows(DIRECT)

    @property
    def attacked(self) -> list[_Row]:
        return self.rows(RECOVERABLE)

    @property
    def kept(self) -> list[_Row]:
        return self.rows(UTILITY, KEPT_SHARE)

    @property
    def differences(self) -> list[_Row]:
        """Differences of AUC between enough items."""
        return [row for row in self.rows(DIFFERENCE) if row.n >= self.limits.fewest_auc]

    @property
    def strongest(self) -> _Row | None:
        """The attack that brings most back, among those that prove to bring something back."""
        proven = [row for row in self.attacked if self._proven(row)]
        return max(proven or self.attacked, key=lambda row: row.value, default=None)

    def worst(self) -> Iterator[tuple[str, list[str]]]:
        """The verdicts that something speaks for, the worst first, each with what does."""
        yield BROKEN, [*self._broken()]
        yield REMEMBERS, [*self._remembers()]
        yield UNDECIDED, [*self._alike()]
        yield HIDDEN, [*self._hidden()]

    def _broken(self) -> Iterator[str]:
        for row in self.kept:
            if row.value < self.limits.kept:
                yield f"Of {row.of} {row.told} is kept, less than {percent(self.limits.kept)}."
        unsound = {(row.metric, row.of) for row in self._unsound()}
        for row in self.rows(UTILITY, DEGENERATE):
            if row.value > self.limits.degenerate and (DEGENERATE, row.of) not in unsound:
                yield f"{row.told} of the answers to {row.of} are degenerate."
        uniform = self._uniform()
        for row in self.rows(UTILITY, NLL):
            if uniform is not None and row.value > uniform and (NLL, row.of) not in unsound:
                yield (
                    f"The NLL of {row.of} is {row.value:.2f} nats, worse than a uniform guess "
                    f"({uniform:.2f})."
                )

    def _unsound(self) -> Iterator[_Row]:
        """Where the original itself is as a broken model is: there it says nothing of another."""
        uniform = self._uniform()
        for metric, limit in ((DEGENERATE, self.limits.degenerate), (NLL, uniform)):
            for row in self.rows(UTILITY, metric, ORIGINAL):
                if limit is not None and row.value > limit:
                    yield row

    def _alike(self) -> Iterator[str]:
        """That the original and a model that never knew say the same when they are asked."""
        known = self.rows(KNOWN, model=ORIGINAL)
        if known and all(row.value < TOLD_APART for row in known):
            most = max(known, key=lambda row: row.value)
            never = "the retrained model" if self.has_retrained else "it does of the holdout"
            yield (
                f"Nothing can be told apart: the original shows no more of {most.of} than {never} "
                f"({most.metric} differs by {most.value:.2f}, the others by less)."
            )

    def lacking(self) -> str:
        """Why nothing can be said of a model that shows nothing bad."""
        if self.kept and self.rows(UNTOLD):
            return "No attack tells it from a model that never knew: nothing says that it is gone."
        if self.kept:
            return "No attack was made: nothing says that it is gone."
        if self.rows(UTILITY, "es"):
            return "The original tells nothing of what should stay, so that nothing could be lost."
        return "No set that should stay was looked at: nothing says that it is gone."

    def _remembers(self) -> Iterator[str]:
        best = max(self.direct, key=lambda row: row.value, default=None)
        if best is not None and best.value >= self.limits.remembers:
            yield (
                f"Asked directly, {best.told} of what the original knows is there, by "
                f"{best.metric}."
            )

    def _hidden(self) -> Iterator[str]:
        proven = [row for row in self.attacked if self._proven(row)]
        for row in sorted(proven, key=lambda row: -row.value):
            yield (
                f"{row.told} of what the original knows comes back by {row.metric}"
                f"{self._without(row)}."
            )

    def _without(self, row: _Row) -> str:
        """How much is there without an attack, where it is worth a word."""
        there = row.value - self._gained(row)
        return f", and {percent(there)} is there without" if there > self.limits.hidden_low else ""

    def _proven(self, row: _Row) -> bool:
        brings = self._gained(row) > self.limits.hidden_low
        return brings and self.limits.prove(row.value, row.low)

    def _gained(self, row: _Row) -> float:
        """What the attack adds to what is there without it; all there can be where that is open."""
        return next((gained.value for gained in self.rows(GAINED, row.metric)), inf)

    def unbounded(self) -> str | None:
        """What may come back, or not, because too few items bound it; None for nothing."""
        open_ended = [row for row in self.attacked if isnan(row.low)]
        most = max(open_ended, key=lambda row: row.value, default=None)
        if most is None or (
            len(open_ended) < len(self.attacked) and most.value < self.limits.hidden
        ):
            return None
        few = "1 item bounds" if most.n == 1 else f"{most.n} items bound"
        return (
            f"By {most.metric} {most.told} of what the original knows comes back, and {few} no "
            f"share: nothing says that it is gone. Give more of {FORGET}."
        )

    def nothing_came_back(self) -> Iterator[str]:
        attack = self.strongest
        assert attack is not None
        yield f"Of {len(self.attacked)} attacks {attack.metric} brings most back: {attack.told}."
        if self.direct:
            best = max(self.direct, key=lambda row: row.value)
            yield f"Asked directly, {best.told} is there, by {best.metric}."

    def far(self) -> list[str]:
        """What is not close to the retrained model."""
        kinds = (
            ("The direct share by", self.direct),
            ("The recoverable share by", self.attacked),
            ("The difference of AUC by", self.differences),
        )
        far = [
            f"{kind} {row.metric} is {row.told}, {self._apart(row)}."
            for kind, rows in kinds
            for row in sorted(rows, key=lambda row: -row.value)
            if not row.as_retrained(self.limits)
        ]
        return far if self.direct else ["Nothing was asked directly.", *far]

    def _apart(self, row: _Row) -> str:
        if row.low <= self.limits.hidden_low and row.high >= -self.limits.hidden_low:
            return "which may be that of a retrained model, or not"
        if isnan(row.low):
            return "without an interval"
        return "unlike that of a retrained model"

    def flags(self) -> Iterator[str]:
        forget = [row for row in self.rows(MEMORISED, NLL) if row.of == FORGET]
        uniform = self._uniform()
        for row in forget:
            if uniform is not None and row.value > uniform:
                yield (
                    f"{OVER_FORGOTTEN}: the forget NLL of {row.value:.2f} nats is worse than a "
                    f"uniform guess ({uniform:.2f})."
                )
        for row in self.rows(PRIVACY):
            leaks = row.metric.startswith(PRIVLEAK) and row.n >= self.limits.fewest_auc
            if leaks and row.value > self.limits.over_forgotten:
                yield f"{OVER_FORGOTTEN}: {row.metric} is {row.value:+.0f}, beyond retraining."
        for row in self.kept:
            if self.limits.kept <= row.value < self.limits.damaged:
                yield f"{DAMAGED}: of {row.of} {row.told} is kept."
        for row in self._unsound():
            told = (
                f"{row.told} of its answers to {row.of} are degenerate"
                if row.metric == DEGENERATE
                else f"its NLL of {row.of} is worse than a uniform guess"
            )
            yield f"{UNSOUND}: {told}, so that this says nothing of the unlearned model."
        if not self.has_retrained:
            yield f"{FLOOR_ESTIMATED}: no retrained model was given to compare with."
        for row in self.rows(MEMORISED, NEAR_TIES):
            if row.value > 0:
                yield f"{TIED}: two tokens are nearly as likely in {row.told} of the places."
        items = [row.n for row in (*forget, *self.direct, *self.attacked)]
        if items and min(items) < self.limits.fewest_items:
            told = counted(min(items), "forget item")
            yield f"{FEW_ITEMS}: {told}, fewer than {self.limits.fewest_items}."
        if len(self.rows(DIFFERENCE)) > len(self.differences):
            yield (
                f"{NO_AUC}: fewer than {self.limits.fewest_auc} items on a side: membership is "
                "not judged."
            )
        blind = [row.metric for row in self.rows(UNTOLD)]
        if blind and self.attacked:  # where no attack tells the verdict says so
            yield (
                f"{BLIND}: by {', '.join(blind)} what the original knows is hardly told from what "
                "models show that never knew. Not judged."
            )
        if any(isnan(row.low) for row in (*self.direct, *self.attacked)):
            yield f"{NO_INTERVAL}: too few items bound some of the shares."

    def _uniform(self) -> float | None:
        found = self.rows(UTILITY, UNIFORM)
        return found[0].value if found else None


def _check(table: pd.DataFrame) -> None:
    missing = [column for column in SUMMED if column not in table]
    if missing:
        raise ValueError(
            f"The table of an audit should have the columns {', '.join(SUMMED)}. Found none "
            f"called `{missing[0]}`. Pass the `table` of a report."
        )
