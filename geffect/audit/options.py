"""The options of an audit: what they are called, what they are by default, and what is refused."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch

from geffect.near import meant
from geffect.numbers import is_number
from geffect.store import Run, open_run

from .batteries import BATTERIES
from .budget import BUDGETS, Budget
from .geometry import GEOMETRY, check_run_of_updates

Report = Callable[[str, float], None]
"""Told what is done now, and how much of all is done, from 0 to 1."""

Folder = str | os.PathLike[str]


class AuditOptions(TypedDict, total=False):
    """The options of `geffect.audit`, each a keyword of it."""

    tokenizer: Any
    template: bool
    base: Folder | None
    device: str | torch.device | None
    budget: str | Budget
    learning_rate: float | None
    run: Run | Folder | None
    checkpoints: Sequence[Folder]
    controls: bool
    report: Report | None


DEFAULTS: AuditOptions = {
    "tokenizer": None,
    "template": True,
    "base": None,
    "device": None,
    "budget": "quick",
    "learning_rate": None,
    "run": None,
    "checkpoints": (),
    "controls": False,
    "report": None,
}


def chosen_of(options: AuditOptions) -> dict[str, Any]:
    """The options with their defaults, the budget by what it is and the run opened."""
    unknown = [name for name in options if name not in DEFAULTS]
    if unknown:
        raise TypeError(
            f"The options of an audit should be some of {', '.join(DEFAULTS)}. Found "
            f"`{unknown[0]}`.{meant(unknown[0], DEFAULTS)} Choose from those."
        )
    chosen: dict[str, Any] = {**DEFAULTS, **options}
    budget = chosen["budget"]
    if not isinstance(budget, Budget):
        if budget not in BUDGETS:
            raise ValueError(
                f"`budget` should be one of {', '.join(BUDGETS)}, or a Budget. Found {budget!r}. "
                "Choose one of those."
            )
        chosen["budget"] = BUDGETS[budget]
    rate = chosen["learning_rate"]
    if rate is not None and not (is_number(rate) and rate > 0):
        raise ValueError(
            f"`learning_rate` should be a number above 0, that of the unlearning. Found {rate!r}. "
            "Leave it out, or pass, say, 1e-5."
        )
    chosen["run"] = _run_of(chosen)
    return chosen


def names_of(batteries: Iterable[str] | None, chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """The batteries that are asked for, in their order; where there is a run, geometry among them.

    >>> names_of(["utility", "memorised"], {"run": None})
    ('memorised', 'utility')
    """
    known = (*BATTERIES, GEOMETRY)
    default = known if chosen["run"] is not None else [*BATTERIES]
    names = [*(default if batteries is None else batteries)]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = f"`{unknown[0]}`" if unknown else "none"
        raise ValueError(
            f"`batteries` should be some of {', '.join(known)}. Found {found}."
            f"{meant(unknown[0], known) if unknown else ''} Choose from those."
        )
    if (GEOMETRY in names) != (chosen["run"] is not None):
        found = f"no {GEOMETRY} among them" if chosen["run"] is not None else "no `run`"
        raise ValueError(
            f"`batteries` should have {GEOMETRY} where a `run` is given, and only there. Found "
            f"{found}. Give both, or neither."
        )
    if names == [GEOMETRY]:
        raise ValueError(
            f"`batteries` should have another beside {GEOMETRY}, which looks at the run alone. "
            "Found no other. Add memorised, or draw the run with `geffect plot --kind accumulated`."
        )
    return tuple(name for name in known if name in names)


def _run_of(chosen: Mapping[str, Any]) -> Run | None:
    given = chosen["run"]
    if given is None:
        if chosen["checkpoints"]:
            raise ValueError(
                "`checkpoints` should be those of a `run`, which says what led to them. Found no "
                "run. Pass its file, or leave them out."
            )
        return None
    run = given if isinstance(given, Run) else open_run(given)
    check_run_of_updates(run)
    return run
