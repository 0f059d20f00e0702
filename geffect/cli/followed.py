"""A run while it is written: what there is to say of it now, read without a lock.

A step that was read is not read again while its checksums stay. So a look costs what is new, and
rows that were amended, dropped or replaced are seen.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from geffect import Run

Floats = NDArray[np.float64]

SETTLED = 2.0
"""So many seconds after a file was written its time tells that it was not written again."""

QUIET, SLOW = 10.0, 5.0
"""A run is quiet after so many seconds, and after so many times what its steps take."""

RECENT = 20
"""The last steps, of which the speed is."""


class State(StrEnum):
    """How far a run is."""

    WAITING = "waiting"
    OPEN = "open"
    COMPLETE = "complete"


@dataclass(frozen=True)
class Course:
    """A score over the steps: an array (step, block)."""

    name: str
    blocks: tuple[str, ...]
    values: Floats
    says: str = ""  # what the values are, with the unit
    unit: str = ""

    @property
    def last(self) -> Floats:
        """The values of the last step."""
        last: Floats = self.values[-1]
        return last

    @property
    def rates(self) -> Floats:
        """For each step the mean over the blocks where it is known; NaN where it is in none."""
        known = ~np.isnan(self.values)
        counts = known.sum(axis=1)
        sums = np.where(counts, np.nansum(self.values, axis=1), np.nan)
        rates: Floats = sums / np.maximum(counts, 1)
        return rates

    @property
    def known(self) -> int:
        """In how many blocks and steps the value is known."""
        return int((~np.isnan(self.values)).sum())

    @property
    def rate(self) -> float:
        """The mean over all blocks and steps where the value is known."""
        return float(np.nansum(self.values) / self.known) if self.known else math.nan


@dataclass(frozen=True)
class Planned:
    """The steps that the manifest says are going to be captured, in ranges; none if too many."""

    steps: int
    ranges: Sequence[Sequence[int]]

    def after(self, step: int) -> int | None:
        """The first of them after a step."""
        for first, last, apart in self.ranges:
            if step < last:
                return int(first if step < first else step + apart - (step - first) % apart)
        return None


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
        steps = f"{len(self.steps)} step{'' if len(self.steps) == 1 else 's'}"
        return f"{steps} of {self.planned} planned" if self.planned else steps


def bucketed(values: Floats, most: int) -> Floats:
    """At most so many values: of steps that share a place the mean of those that are known.

    >>> bucketed(np.array([1.0, 3.0, float("nan"), 7.0]), 2)
    array([2., 7.])
    """
    if len(values) <= most:
        return values
    starts = np.arange(most) * len(values) // most
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    # Shares first: the sum of large values may be too large for a number.
    shares = np.where(known, values, 0.0) / np.repeat(
        np.maximum(counts, 1), np.diff(starts, append=len(values))
    )
    return np.where(counts > 0, np.add.reduceat(shares, starts), np.nan)


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


@dataclass(frozen=True)
class _Read:
    """What was read of a run, and what tells whether it still stands."""

    labels: object = None
    sums: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), dtype=np.uint32))
    ends: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    courses: Mapping[str, Mapping[str, Course]] = field(default_factory=dict)

    def same_as(self, later: "_Read") -> int:
        """How many steps at the beginning are those of a later reading."""
        if self.labels != later.labels or self.sums.shape[1] != later.sums.shape[1]:
            return 0
        rows = min(len(self.sums), len(later.sums))
        differing = (self.sums[:rows] != later.sums[:rows]).any(axis=1)
        alike = int(differing.argmax()) if differing.any() else rows
        steps = min(len(self.ends), len(later.ends))
        ended = (self.ends[:steps] == later.ends[:steps]) & (self.ends[:steps] <= alike)
        return steps if ended.all() else int(ended.argmin())


class Followed:
    """A run file that is looked at again and again, from before it is there."""

    def __init__(self, path: Path, by: str = "layer") -> None:
        self._path, self._by = path, by
        self._began = time.time()
        self._stamp: tuple[int, ...] = ()
        self._known = _Read()
        self._view = View(path, State.WAITING, by)

    def look(self) -> View:
        """What there is to say now.

        Raises an OSError for what is no run, as long as none was found; later it is noted that the
        file cannot be read any more.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return self._without_file()
        age = max(0.0, time.time() - found.st_mtime)
        stamp = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            try:
                self._view = self._read()
            except OSError as error:
                if not (self._view.steps or _passes(error)):
                    raise
                return replace(self._view, age=age, notes=(str(error),))
            # A row may be written within the grain of the clock of files.
            self._stamp = stamp if age > SETTLED else ()
        self._view = replace(self._view, age=age)
        return self._view

    def _without_file(self) -> View:
        notes = self._view.notes
        if self._view.steps:
            notes, self._began = ("The file that was there is gone.",), time.time()
        self._stamp, self._known = (), _Read()
        age = time.time() - self._began
        self._view = View(self._path, State.WAITING, self._by, age=age, notes=notes)
        return self._view

    def _read(self) -> View:
        from geffect import open_run

        run = open_run(self._path)
        if not len(run.steps):
            self._known = _Read()
            return View(self._path, State(run.state), self._by)
        # Before the rows: a change between the two is seen at the next look.
        sums = run.checksums() if run.contents.version > 2 else np.empty((0, 0), dtype=np.uint32)
        read = _Read((run.contents, run.manifest, run.layers), sums, np.cumsum(run.rows))
        # One step is read at least, which tells what courses there are.
        same = min(self._known.same_as(read), len(run.steps) - 1)
        new, notes = run.latest(len(run.steps) - same), [*_stopped(run)]
        courses = {
            kind: _joined(self._known.courses.get(kind, {}), found, same, len(new.steps))
            for kind, found in _measured(new, self._by, notes)
        }
        self._known = replace(read, courses=courses)
        planned = _planned(run)
        following, is_told = _following(run, planned)
        return View(
            self._path,
            State(run.state),
            self._by,
            tuple(run.steps.tolist()),
            effects=tuple(courses["effects"].values()),
            totals=tuple(courses["totals"].values()),
            rates=tuple(courses["rates"].values()),
            losses=tuple(courses["losses"].values()),
            seconds=courses["seconds"]["seconds"].values[:, 0],
            next_step=following,
            planned=planned.steps if planned else None,
            is_told=is_told,
            notes=tuple(notes),
        )


def _measured(run: "Run", by: str, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Course]]]:
    """The courses of each kind."""
    yield "effects", _effects(run, by, notes)
    yield "totals", _effects(run, "model", [])
    yield "rates", _rates(run, notes)
    losses = {name: values[:, np.newaxis] for name, values in run.losses().items()}
    yield "losses", {name: Course(name, ("loss",), values) for name, values in losses.items()}
    seconds = run.column("wall_seconds")[:, np.newaxis]
    yield "seconds", {"seconds": Course("seconds", ("seconds",), seconds)}


def _effects(run: "Run", by: str, notes: list[str]) -> dict[str, Course]:
    """G-effects; where forget and retain are not both there, cosines with the risks there are."""
    from geffect.analysis import cosine, g_effect
    from geffect.sources import FORGET, OBJECTIVE, RETAIN, is_risk

    if {OBJECTIVE, FORGET, RETAIN} <= {*run.sources}:
        table = g_effect(run, by=by)
        parts = table.groupby("effect", observed=True, sort=False)
        return {str(name): _course(str(name), part, by, len(run.steps)) for name, part in parts}
    risks = [source for source in run.sources if is_risk(source)]
    if OBJECTIVE not in run.sources or not risks:
        notes.append(f"No G-effects: the run has {', '.join(run.sources)}, not objective and risk.")
        return {}
    notes.append(f"Cosines in place of G-effects: the run has {', '.join(run.sources)}.")
    tables = {risk: cosine(run, OBJECTIVE, risk, by=by) for risk in risks}
    return {risk: _course(risk, table, by, len(run.steps)) for risk, table in tables.items()}


def _rates(run: "Run", notes: list[str]) -> dict[str, Course]:
    """Conflict of objective and retain, and violations by the update, as 0 or 1."""
    from geffect.analysis import conflict, violation
    from geffect.sources import OBJECTIVE, RETAIN

    found = {}
    if {OBJECTIVE, RETAIN} <= {*run.sources}:
        found["conflict"] = _course("conflict", conflict(run), None, len(run.steps))
    if run.contents.blocks:
        for name, table in _tried(lambda: violation(run), "No violations", notes):
            parts = table.groupby("against", observed=True) if "against" in table else [("", table)]
            for against, part in parts:
                full = f"{name} {against}".strip()
                found[full] = _course(full, part, None, len(run.steps))
    return found


def _tried(
    analyzer: Callable[[], "pd.DataFrame"], missing: str, notes: list[str]
) -> Iterator[tuple[str, "pd.DataFrame"]]:
    try:
        yield "violation", analyzer()
    except ValueError as error:  # the run does not hold what that takes
        notes.append(f"{missing}: {error}")


def _course(name: str, table: "pd.DataFrame", by: str | None, steps: int) -> Course:
    """The values of a score table, which has a row for each block of each step."""
    from geffect.scores import blocks_of, score_of

    values = table["value"].to_numpy(dtype=float).reshape(steps, -1)
    blocks = table[by if by in table else blocks_of(table)].iloc[: values.shape[1]]
    score = score_of(table)
    return Course(name, tuple(map(str, blocks)), values, score.full, score.unit)


def _joined(
    old: Mapping[str, Course], new: Mapping[str, Course], same: int, count: int
) -> dict[str, Course]:
    """The steps that are as they were, and those that are new; NaN where one has none."""
    found = {}
    for name, one in {**old, **new}.items() if same else new.items():
        wide = len(one.blocks)
        before = old[name].values[:same] if name in old else np.full((same, wide), np.nan)
        after = new[name].values if name in new else np.full((count, wide), np.nan)
        found[name] = replace(one, values=np.concatenate([before, after]))
    return found


def _planned(run: "Run") -> Planned | None:
    """What its manifest says of the steps that are to come; not of several requests, each has its
    own."""
    told = run.manifest.get("planned")
    if not isinstance(told, Mapping) or run.latest(1).column("request").any():
        return None
    steps, ranges = told.get("steps"), told.get("ranges")
    if type(steps) is not int or steps < 1 or not isinstance(ranges, list):
        return None
    whole = all(
        isinstance(one, list) and len(one) == 3 and all(type(n) is int for n in one) and one[2] > 0
        for one in ranges
    )
    return Planned(steps, ranges if whole else [])


def _following(run: "Run", planned: Planned | None) -> tuple[int | None, bool]:
    """The next step that is captured, and whether that is told by the schedule."""
    last = int(run.steps[-1])
    if planned is not None and planned.ranges:
        return planned.after(last), True
    gaps = np.diff(run.steps[-RECENT:])
    regular = len(gaps) > 0 and gaps[-1] > 0 and (gaps == gaps[-1]).all()
    return (last + int(gaps[-1]) if regular else None), False


def _stopped(run: "Run") -> Iterator[str]:
    """What a rule that stops has said."""
    from geffect.store.schema import STOP

    told = run.table(STOP) if STOP in run.tables else {}
    if {"clause", "message"} <= told.keys() and len(told["message"]):
        yield f"Stopped by `{told['clause'][0]}`: {told['message'][0]}"


def _passes(error: OSError) -> bool:
    """Whether it may come of a row, or a file, that is being written at this moment."""
    from geffect.store.schema import ChecksumError, ReplacedError

    return isinstance(error, ReplacedError) or (
        isinstance(error, ChecksumError) and not error.closed
    )
