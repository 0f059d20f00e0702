"""The catalogue: edits by the names that people type, each with its default options."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from geffect.near import meant

from .base import Edit
from .mixing import Mixing
from .newton import Newton
from .repselect import RepSelect
from .ssd import LFSSD, SSD
from .task_vector import TaskVectorNegation

CATALOGUE: Mapping[str, Edit] = {
    "ssd": SSD(),
    "lfssd": LFSSD(),
    "negation": TaskVectorNegation(),
    "mix": Mixing(),
    "repselect": RepSelect(),
    "newton": Newton(),
}
"""The edits by their names on the command line, each with the options that it has unless told."""


def named(name: str, options: Mapping[str, Any] | None = None) -> Edit:
    """The edit of a name, with other values of some of its options.

    >>> named("negation", {"alpha": 0.5})
    TaskVectorNegation(alpha=0.5)
    """
    if name not in CATALOGUE:
        raise ValueError(
            f"`edit` should be one of {', '.join(CATALOGUE)}. Found `{name}`."
            f"{meant(name, CATALOGUE)} Choose one of those."
        )
    edit = CATALOGUE[name]
    known = options_of(edit)
    foreign = [option for option in options or {} if option not in known]
    if foreign:
        raise ValueError(
            f"The options of {type(edit).__name__} should be among those it has: "
            f"{', '.join(f'`{option}`' for option in known) or 'none'}. Found "
            f"{', '.join(f'`{option}`' for option in foreign)}. Leave that out."
        )
    return replace(edit, **(options or {}))


def as_edit(given: Edit | str) -> Edit:
    """The edit that is meant: one as it is, or a name of the catalogue.

    >>> as_edit("negation")
    TaskVectorNegation(alpha=1.0)
    """
    if isinstance(given, Edit):
        return given
    if isinstance(given, str):
        return named(given)
    raise TypeError(
        "`edit` should be an Edit, or a name of the catalogue. Found "
        f'`{type(given).__name__}`. Pass, say, geffect.edits.SSD(alpha=5.0), or "ssd".'
    )


def options_of(edit: Edit) -> dict[str, Any]:
    """The options by name.

    >>> options_of(TaskVectorNegation())
    {'alpha': 1.0}
    """
    return {field.name: getattr(edit, field.name) for field in fields(edit)}
