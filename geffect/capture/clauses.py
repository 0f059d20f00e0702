"""The clauses that a run may be stopped by: each looks at the last rows, the newest at the end."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from geffect.gram import norm
from geffect.sources import FORGET, RETAIN, UPDATE

from .rows_seen import Seen

STEPS = 5
"""Over so many steps risks and rates are averaged: those of single batches are noise."""

LOOKED_BACK = 4 * STEPS
"""The steps among which so many that forget are looked for."""

LEAST_GAIN = 0.01
"""The share of the level by which one of five steps has to forget, for a run that goes on."""


@dataclass(frozen=True)
class Stop:
    """What ended a run: the clause, the step that was the last, and why, in words.

    - `step`: as the run file numbers it; its update has been made.
    - `value`, `limit`: the number that the clause looks at, and what it was held against.
    """

    step: int
    clause: str
    value: float
    limit: float
    message: str


class Clause(Protocol):
    """One of the rules of a `StopWhen`, which says what each is."""

    sources: ClassVar[Collection[str]]
    """What a run has to record for it."""

    def look(self, rows: Sequence[Seen]) -> Stop | None:
        """What it says of the last row; None while the run may go on."""


@dataclass(frozen=True)
class AntiKnowledge:
    """The forget risk is above that of guessing among all tokens."""

    vocabulary: int
    sources: ClassVar[Collection[str]] = (FORGET,)

    def look(self, rows: Sequence[Seen]) -> Stop | None:
        """Hold the risk against ln V."""
        now, guessing = rows[-1], math.log(self.vocabulary)
        if not now.risk > guessing:
            return None
        return Stop(
            now.step, "anti-knowledge", now.risk, guessing,
            f"the forget risk at step {now.step} is {now.risk:.4g}, above the "
            f"{guessing:.4g} of guessing among {self.vocabulary} tokens",
        )  # fmt: skip


@dataclass(frozen=True)
class Level:
    """The forget risk has reached a level."""

    level: float
    sources: ClassVar[Collection[str]] = (FORGET,)

    def look(self, rows: Sequence[Seen]) -> Stop | None:
        """Hold the risk after the last update against the level."""
        (at, risk), now = _risk_at_last(rows), rows[-1]
        if not risk >= self.level:
            return None
        before, crossing = rows[:-1], ""
        since, earlier = _risk_at_last(before) if before else (now.step, now.risk)
        if earlier < self.level:
            passed = since + (at - since) * (self.level - earlier) / (risk - earlier)
            crossing = f", and crossed it after {passed:.1f} updates"
        told = f"it is {risk:.4g} before step {now.step}"
        if at > now.step:
            told = f"to first order it is {risk:.4g} after step {now.step}"
        return Stop(
            now.step, "level", risk, self.level,
            f"the forget risk has reached the level of {self.level:g}: {told}{crossing}",
        )  # fmt: skip


@dataclass(frozen=True)
class FreeForgetting:
    """More is wanted of a step than it can forget for free."""

    wanted: float
    radius: float | None
    sources: ClassVar[Collection[str]] = (FORGET, RETAIN)

    def look(self, rows: Sequence[Seen]) -> Stop | None:
        """Hold what a step forgets across the retain gradient against what is wanted."""
        now = rows[-1]
        if self.radius is None and math.isnan(now.lr):
            raise ValueError(
                "`radius` of StopWhen should be given where no optimizer tells a learning rate. "
                f"Found none at step {now.step}. Pass StopWhen(free_forgetting={self.wanted:g}, "
                "radius=...), the length of a step."
            )
        length = now.lr * float(norm(now.K, 1)) if self.radius is None else self.radius
        free = length * now.across
        if not free < self.wanted:
            return None
        return Stop(
            now.step, "free forgetting", free, self.wanted,
            f"a step of length {length:.4g} at step {now.step} forgets {free:.6g} nats for free, "
            f"less than {self.wanted:g}",
        )  # fmt: skip


@dataclass
class ExchangeRate:
    """A nat of forgetting costs too much, or hardly any is forgotten on the way to a level."""

    limit: float
    level: float | None
    sources: ClassVar[Collection[str]] = (FORGET, RETAIN, UPDATE)
    _has_forgotten: bool = False  # by enough, in a step

    def look(self, rows: Sequence[Seen]) -> Stop | None:
        """Hold the median of the rates against the limit, and the gains against the level."""
        now, last = rows[-1], rows[-STEPS:]
        again = sum(seen.gain <= 0 for seen in last)
        learnt = f"; {again} of the last {len(last)} steps learn again" if again else ""
        rates = [seen.harm / seen.gain for seen in rows if seen.gain > 0][-STEPS:]
        if len(rates) == STEPS and (rate := float(np.median(rates))) > self.limit:
            return Stop(
                now.step, "exchange rate", rate, self.limit,
                f"a nat of forgetting costs {rate:.4g} retain nats at step {now.step}, more than "
                f"{self.limit:g}: the median of {STEPS} steps{learnt}",
            )  # fmt: skip
        if self.level is None:
            return None
        most, least = max(seen.gain for seen in last), LEAST_GAIN * self.level
        self._has_forgotten |= now.gain >= least
        if not (self._has_forgotten and len(last) == STEPS and most < least):
            return None
        return Stop(
            now.step, "exchange rate", most, least,
            f"each of the last {STEPS} steps to step {now.step} forgets by {most:.4g} nats at "
            f"most, less than 1 % of the level{learnt}",
        )  # fmt: skip


CLAUSES: Mapping[str, Callable[[Mapping[str, Any]], Clause]] = {
    "vocabulary": lambda asked: AntiKnowledge(asked["vocabulary"]),
    "level": lambda asked: Level(asked["level"]),
    "free_forgetting": lambda asked: FreeForgetting(asked["free_forgetting"], asked.get("radius")),
    "exchange_rate": lambda asked: ExchangeRate(asked["exchange_rate"], asked.get("level")),
}
"""By the option that asks for it, from all options; of several that fire the first is told."""


def _risk_at_last(rows: Sequence[Seen]) -> tuple[int, float]:
    """After how many updates, and the forget risk there, as the last steps in a row tell it.

    Each risk is carried on by the changes that the updates since then predict.
    """
    now = rows[-1]
    if math.isnan(now.gain):
        return now.step, now.risk
    carried, since, carries = 0.0, now.step, []
    for row in reversed(rows[-STEPS:]):
        carried += row.gain
        if row.step < since - 1 or math.isnan(carried + row.risk):
            break
        carries.append(row.risk + carried)
        since = row.step
    return now.step + 1, float(np.mean(carries)) if carries else math.nan
