"""Which step of a run comes next, as far as it is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geffect.numbers import is_whole

if TYPE_CHECKING:
    from geffect import Run

RECENT = 20
"""So many last steps tell the speed of a run, and the distance of its steps."""


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


def planned_of(run: "Run") -> Planned | None:
    """What its manifest says of the steps that are to come; not of several requests, each has its
    own."""
    told = run.manifest.get("planned")
    if not isinstance(told, Mapping) or run.latest(1).column("request").any():
        return None
    steps, ranges = told.get("steps"), told.get("ranges")
    if not (is_whole(steps, 1) and isinstance(ranges, list)):
        return None
    whole = all(
        isinstance(one, list) and len(one) == 3 and all(map(is_whole, one)) and one[2] > 0
        for one in ranges
    )
    return Planned(steps, ranges if whole else [])


def following(run: "Run", planned: Planned | None) -> tuple[int | None, bool]:
    """The next step that is captured, and whether that is told by the schedule."""
    last = int(run.steps[-1])
    if planned is not None and planned.ranges:
        return planned.after(last), True
    gaps = np.diff(run.steps[-RECENT:])
    regular = len(gaps) > 0 and gaps[-1] > 0 and (gaps == gaps[-1]).all()
    return (last + int(gaps[-1]) if regular else None), False
