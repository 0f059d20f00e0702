"""Options of the command line for objectives: one for each field of those in the catalogue."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from .fields import CATALOGUED, CommandOfFields, texts_given, values_given

if TYPE_CHECKING:
    from geffect.objectives import Objective

__all__ = ["CATALOGUED", "CommandOfObjectives", "objective_of", "values_for"]


class CommandOfObjectives(CommandOfFields):
    """A subcommand that is told options of objectives, such as `--beta 0.1`."""

    kind = "objective"
    example = "beta=0.1"

    @staticmethod
    def spelt() -> str:
        """The names of the catalogue."""
        from geffect.objectives import spelt

        return spelt()

    @staticmethod
    def having() -> Mapping[str, Mapping[str, Any]]:
        """The options of objectives and of regularisers."""
        from geffect.objectives import CATALOGUE, REGULARISERS, options_of

        every = {**CATALOGUE, **{f"+{name}": r for name, r in REGULARISERS.items()}}
        return {name: options_of(objective) for name, objective in every.items()}


def objective_of(ctx: typer.Context, name: str) -> "Objective":
    """The objective of a name, with the options that were given for it."""
    from geffect.objectives import named, options_of

    try:
        return named(name, values_given(ctx, CommandOfObjectives, options_of(named(name))))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def values_for(ctx: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, which each of some objectives has to have."""
    from geffect.objectives import options_of

    given = texts_given(ctx)
    if not given:
        return {}
    having = [options_of(objective_of(ctx, name)) for name in names]
    return {option: having[0][option] for option in given}
