"""The options of an objective: its fields, told by name, and as a run file keeps them."""

from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any, TypeVar

from .base import Objective

Of = TypeVar("Of", bound=Objective)


def options_of(objective: Objective) -> dict[str, Any]:
    """The options by name, those of the objectives that it is made of among them.

    >>> from geffect.objectives import NPO, GradDiff
    >>> options_of(GradDiff(NPO(), weight=2.0))
    {'beta': 0.1, 'weight': 2.0}
    """
    found: dict[str, Any] = {}
    for field in _own(objective):
        value = getattr(objective, field.name)
        further = options_of(value) if isinstance(value, Objective) else {field.name: value}
        twice = sorted(further.keys() & found.keys())
        if twice:
            raise ValueError(
                f"The options of an objective should have names of their own. Found "
                f"`{twice[0]}` twice in {objective!r}. Set them where it is made."
            )
        found |= further
    return found


def with_options(objective: Of, options: Mapping[str, Any]) -> Of:
    """The objective with other values of some options.

    >>> from geffect.objectives import NPO, GradDiff
    >>> with_options(GradDiff(NPO()), {"beta": 0.5})
    GradDiff(forget=NPO(beta=0.5), weight=1.0)
    """
    known = options_of(objective)
    foreign = [name for name in options if name not in known]
    if foreign:
        named = ", ".join(f"`{name}`" for name in known) or "none"
        raise ValueError(
            f"The options of {type(objective).__name__} should be among those it has: {named}. "
            f"Found {', '.join(f'`{name}`' for name in foreign)}. Leave that out."
        )
    changed = {}
    for field in _own(objective):
        value = getattr(objective, field.name)
        if isinstance(value, Objective):
            own = {n: given for n, given in options.items() if n in options_of(value)}
            changed[field.name] = with_options(value, own)
        elif field.name in options:
            changed[field.name] = options[field.name]
    return replace(objective, **changed)


def provenance(objective: Objective, reference: str | None = None) -> dict[str, Any]:
    """What a run file says of the objective; `reference` tells where its reference is from.

    >>> from geffect.objectives import NPO
    >>> provenance(NPO(), reference="a copy of the model")  # doctest: +NORMALIZE_WHITESPACE
    {'name': 'NPO', 'options': {'beta': 0.1}, 'reduction': {'forget': 'sequence_sum of forget'},
     'reference': {'needs': 'likelihoods', 'is': 'a copy of the model'}}
    """
    risks = objective.risks
    return {
        **_named(objective),
        **({} if risks is None else {"risks": dict(risks)}),
        "reduction": {name: f"{r.kind} of {r.side}" for name, r in objective.reductions.items()},
        "reference": None
        if objective.reference == "none"
        else {"needs": objective.reference, "is": reference},
    }


def _named(objective: Objective) -> dict[str, Any]:
    """The name and the options, those of its parts nested."""
    names = {field.name for field in fields(objective)}
    others = sorted(vars(objective).keys() - names)
    if others:
        raise TypeError(
            "An objective should be a frozen dataclass whose fields are its options, for a run "
            f"file to keep them. Found `{type(objective).__name__}` with "
            f"{', '.join(f'`{name}`' for name in others)} beside its fields. Declare fields."
        )
    values = {field.name: getattr(objective, field.name) for field in _own(objective)}
    return {
        "name": type(objective).__name__,
        "options": {
            name: _named(value) if isinstance(value, Objective) else value
            for name, value in values.items()
        },
    }


def _own(objective: Objective) -> list[Field[Any]]:
    """The fields that can be passed."""
    return [field for field in fields(objective) if field.init]
