"""Where runs part: each of a report against the first."""

from collections.abc import Sequence
from dataclasses import dataclass

from geffect.analysis import compare

from .read import Read


@dataclass(frozen=True)
class Parted:
    """A run against the first: the level, the first step at which they differ, and why."""

    name: str
    anchor: str
    level: str
    step: int | None
    sentence: str


def against_the_first(several: Sequence[Read]) -> list[Parted]:
    """None for the first; runs of other models are told as such."""
    first, *others = several
    parted = [_parted(first, other) for other in others]
    first.run.let_go()
    return parted


def _parted(first: Read, other: Read) -> Parted:
    try:
        found = compare(first.run, other.run)
    except ValueError as refused:
        return Parted(other.name, other.anchor, "not comparable", None, str(refused))
    finally:
        if other.run is not first.run:
            other.run.let_go()
    return Parted(other.name, other.anchor, found.level, found.step, found.sentence)
