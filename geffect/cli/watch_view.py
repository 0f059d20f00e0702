"""What there is to say of a run at one moment."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from geffect.numbers import counted

from .watch_courses import Course, Floats
from .watch_planned import RECENT

QUIET, SLOW = 10.0, 5.0
"""A run is quiet after so many seconds, and after so many times what its steps take."""


class State(StrEnum):
    """How far a run is."""

    WAITING = "waiting"
    OPEN = "open"
    COMPLETE = "complete"


@dataclass(frozen=True)
class View:
    """What there is to say of a run at one moment. Steps and values are those of its scores."""

    path: Path
    state: State
    by: str = "layer"
    steps: tuple[int, ...] = ()
    effects: tuple[Course, ...] = ()
    totals: tuple[Course, ...] = ()  # the effects of the whole model
    rates: tuple[Course, ...] = ()  # conflict, and violations where a rectifier ran
    losses: tuple[Course, ...] = ()
    seconds: Floats = field(default_factory=lambda: np.empty(0))
    next_step: int | None = None
    planned: int | None = None  # how many steps are going to be captured, where that was told
    is_told: bool = False  # whether the schedule tells the next step, not the distance of the last
    age: float = math.nan  # seconds since it was written, or since the watch began
    notes: tuple[str, ...] = ()  # what is not shown and why

    @property
    def step_seconds(self) -> float:
        """How long a captured step takes, of late."""
        recent = self.seconds[-RECENT:]
        taken = float(recent[-1] - recent[0]) if len(recent) > 1 else math.nan
        return taken / (len(recent) - 1) if taken > 0 else math.nan

    @property
    def steps_per_second(self) -> float:
        """How many steps training takes in a second, of late."""
        recent = self.steps[-RECENT:]
        taken = self.step_seconds * (len(recent) - 1)
        return (recent[-1] - recent[0]) / taken if taken > 0 else math.nan

    @property
    def is_quiet(self) -> bool:
        """Whether the file was not written for longer than its steps take."""
        slow = self.step_seconds * SLOW
        return self.state is State.OPEN and self.age > max(QUIET, slow if slow == slow else 0.0)

    @property
    def stands(self) -> str:
        """How it stands, in a word; of a run that is complete with all that is to be said."""
        if self.state is State.COMPLETE:
            return self.comes
        return "not written" if self.is_quiet else str(self.state)

    @property
    def captured(self) -> str:
        """How many steps a run has that goes on, in words."""
        counts = self.steps and self.state is not State.COMPLETE
        return f"{len(self.steps)} captured" if counts else ""

    @property
    def comes(self) -> str:
        """What comes next, in words."""
        if self.state is State.COMPLETE:
            return f"complete: {self._counted}"
        if not self.steps:
            return f"waiting for its first step, for {duration(self.age)}"
        if self.is_quiet:
            return (
                f"not written for {duration(self.age)}: training is between two captured steps, or "
                "it has ended without closing its run"
            )
        if self.next_step is None:
            return f"{self._counted}, written {duration(self.age)} ago"
        guess = "" if self.is_told else ", if it goes on as the last ones"
        return f"next: step {self.next_step}{guess}; written {duration(self.age)} ago"

    @property
    def _counted(self) -> str:
        steps = counted(len(self.steps), "step")
        return f"{steps} of {self.planned} planned" if self.planned else steps


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(7.4), duration(125), duration(7260), duration(float("nan"))
    ('7 s', '2 min 5 s', '2 h 1 min', 'an unknown time')
    """
    if seconds != seconds:
        return "an unknown time"
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
