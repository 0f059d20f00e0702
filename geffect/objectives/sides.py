"""Whether data has the sides that an objective takes, said before anything is run."""

from collections.abc import Mapping
from typing import Any

from geffect.batch import ORIGINAL, batches_in
from geffect.data.others import among_others
from geffect.sources import FORGET

from .base import Objective

ALTERNATE = f"{FORGET}.alternate"
"""The answers that stand for those that are to be forgotten."""


def check_sides(objective: Objective, given: Mapping[str, Any], *, add: str) -> None:
    """Refuse data without a side that an objective takes, or without answers inside of one.

    - `given`: a batch or an item of each set by its name, or {} for one whose items are not known.
    - `add`: what to do about a set that is not there, with its name to be filled in.

    >>> from geffect.objectives import GradDiff
    >>> check_sides(GradDiff(), {"forget": {"labels": 1}}, add="Pass {side}=...")
    Traceback (most recent call last):
    ValueError: `objective` should be of the sets forget. Found GradDiff(...), which ...
    """
    found = {*given, *(side for side, _ in batches_in(given))}
    missing = [side for side in objective.sides if side not in found]
    if not missing:
        return
    outer, _, inner = missing[0].partition(".")
    if inner and outer in given:
        rows = (
            "whose rows they are drawn from"
            if among_others([inner])
            else f"whose rows have `{inner}`"
        )
        raise ValueError(
            f"Items of `{outer}` should have the answers that the objective takes. Found "
            f"{objective!r}, which takes {missing[0]}, and items without. Pass items such as "
            f'{{"{ORIGINAL}": ..., "{inner}": ...}}, or a file {rows}.'
        )
    raise ValueError(
        f"`objective` should be of the sets {', '.join(given)}. Found {objective!r}, which takes "
        f"{', '.join(missing)} as well. "
        f"{add.format(side=missing[0])}"
    )


def answers_of(objective: Objective, name: str) -> tuple[str, ...]:
    """The answers beside the original that an objective takes of the items of a set.

    >>> from geffect.objectives import Combination
    >>> answers_of(Combination({"forget": -1.0, "forget.alternate": 1.0}), "forget")
    ('alternate',)
    """
    parts = (side.partition(".") for side in objective.sides)
    return tuple(
        inner for outer, _, inner in parts if outer == name and inner != ORIGINAL and inner
    )
