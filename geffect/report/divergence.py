"""Where runs part: each of a report against the first."""

from collections.abc import Sequence
from dataclasses import dataclass

from geffect.analysis import Comparison

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
    return [_parted(read, read.parts) for read in several if read.parts is not None]


def _parted(read: Read, found: Comparison | str) -> Parted:
    if isinstance(found, str):
        return Parted(read.name, read.anchor, "not comparable", None, found)
    return Parted(read.name, read.anchor, found.level, found.step, found.sentence)
