"""How far a study or a replay is: live bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from geffect.numbers import percent
from geffect.text import plain

from .terminal import say


class News(Protocol):
    """How far a job is: `done` between 0 and 1, and what it says of itself."""

    @property
    def job(self) -> str: ...

    @property
    def stage(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def done(self) -> float: ...

    @property
    def says(self) -> str: ...


@dataclass(frozen=True)
class Told:
    """News of a job of the command line itself."""

    job: str
    stage: str
    weight: float
    done: float
    says: str


@contextmanager
def shown(
    total_weight: float, console: Console, title: str = "study"
) -> Iterator[Callable[[News], None]]:
    """A function that shows what it is told of jobs, as long as the block runs."""
    if console.is_terminal:
        with _Bars(total_weight, console, title) as bars:
            yield bars.take
    else:
        yield _Lines(total_weight, console).take


class _Share:
    """The share of all that is done, from what the jobs say."""

    def __init__(self, total_weight: float) -> None:
        self._total = total_weight
        self._done: dict[str, float] = {}

    def take(self, news: News) -> float:
        # A job may say that it is nearly done for a while: it never goes back.
        self._done[news.job] = max(self._done.get(news.job, 0.0), news.weight * news.done)
        return min(1.0, sum(self._done.values()) / self._total)


class _Bars:
    """A bar for all of it with the time that is left, and one for each job that runs."""

    def __init__(self, total_weight: float, console: Console, title: str) -> None:
        self._share = _Share(total_weight)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[says]}", style="dim", markup=False),
            console=console,
        )
        self._whole = self._progress.add_task(title, total=1.0, says="starts")
        self._jobs: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def take(self, news: News) -> None:
        self._progress.update(self._whole, completed=self._share.take(news), says=news.stage)
        if news.job not in self._jobs:
            self._jobs[news.job] = self._progress.add_task(
                f"  {plain(news.job)}", total=1.0, says=""
            )
        self._progress.update(self._jobs[news.job], completed=news.done, says=plain(news.says))
        if news.done >= 1.0 and news.says == "done":
            self._progress.remove_task(self._jobs[news.job])


class _Lines:
    """A line when a job ends."""

    def __init__(self, total_weight: float, console: Console) -> None:
        self._share = _Share(total_weight)
        self._console = console
        self._started = time.perf_counter()
        self._said: dict[str, str] = {}

    def take(self, news: News) -> None:
        share = self._share.take(news)
        if news.says != "done":
            self._said[news.job] = news.says
            return
        seconds = time.perf_counter() - self._started
        left = seconds * (1 - share) / share
        told = f"{news.job}: {self._said.get(news.job, 'done')}"
        say(
            self._console,
            f"{seconds:6.1f} s  {percent(share):>5}  {news.stage:8}  {told}; about {left:.0f} s "
            "left",
        )
