"""The reference model of an objective: where it is missing, and how it gets there."""

import copy
from collections.abc import Iterator
from typing import Any

from .base import Objective


def missing_in(objective: Objective) -> list[Objective]:
    """The objectives, among it and those it is made of, that have no reference yet."""
    return [part for part in _parts(objective) if getattr(part, "reference", part) is None]


def with_reference(objective: Objective, reference: Any) -> Objective:
    """The objective with a reference wherever one is missing.

    >>> from geffect.objectives import NPO, GradDiff
    >>> with_reference(GradDiff(forget=NPO()), "a model").forget.reference
    'a model'
    """
    completed = copy.copy(objective)
    for name, value in vars(objective).items():
        if isinstance(value, Objective):
            # Past the lock of a frozen dataclass: the copy is ours.
            object.__setattr__(completed, name, with_reference(value, reference))
        elif name == "reference" and value is None:
            object.__setattr__(completed, name, reference)
    return completed


def _parts(objective: Objective) -> Iterator[Objective]:
    yield objective
    for part in vars(objective).values():
        if isinstance(part, Objective):
            yield from _parts(part)
