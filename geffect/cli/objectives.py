"""Options of the command line for objectives: one for each field of those in the catalogue."""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from .command import Command

if TYPE_CHECKING:
    from geffect.objectives import Objective

GIVEN = "geffect.cli.objectives"
"""Where a context keeps the texts of the options that were given, by name."""

CATALOGUED = "{catalogue}"
"""What stands in a help text for the names of the catalogue."""


class CommandOfObjectives(Command):
    """A subcommand that is told options of objectives: `--beta 0.1`, `--objective-option beta=0.1`.

    They are made when they are asked for, since the objectives need torch. An option that the
    subcommand has itself, such as `--seed`, is told by `--objective-option` alone.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of the function, and the options of the objectives."""
        own: list[Any] = [*super().get_params(ctx)]
        for parameter in own:
            text = getattr(parameter, "help", None)
            if text and CATALOGUED in text:
                from geffect.objectives import spelt

                parameter.help = text.replace(CATALOGUED, spelt())
        taken = {parameter.name for parameter in own}
        further = [option for option in _options() if option.name not in taken]
        return [*own[:-1], *further, *own[-1:]]  # --help stays the last


def objective_of(ctx: typer.Context, name: str) -> "Objective":
    """The objective of a name, with the options that were given for it."""
    from geffect.objectives import named, options_of

    texts = ctx.meta.get(GIVEN, {})
    try:
        defaults = options_of(named(name))
        return named(name, {o: _value(o, text, defaults.get(o)) for o, text in texts.items()})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def values_for(ctx: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, which each of some objectives has to have."""
    from geffect.objectives import options_of

    given = ctx.meta.get(GIVEN, {})
    if not given:
        return {}
    having = [options_of(objective_of(ctx, name)) for name in names]
    return {option: having[0][option] for option in given}


def _value(option: str, text: str, default: Any) -> Any:
    """The value of a text, of the type that the default has; an objective refuses what it lacks."""
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if default is None:
            return _number_in(text)
        return text if isinstance(default, bool) else type(default)(text)
    except ValueError as error:
        raise ValueError(
            f"`{option}` should be a number such as {default}. Found `{text}`. Pass, say, "
            f"--objective-option {option}={default}."
        ) from error


def _number_in(text: str) -> Any:
    """The number that a text is, if it is one: what has no default says no type."""
    try:
        return float(text)
    except ValueError:
        return text


def _keep(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> None:
    """Keep the text of an option of its own."""
    if value is not None and param.name is not None:
        _keep_once(ctx, param.name, value)


def _keep_named(ctx: typer.Context, value: list[str] | None) -> None:
    """Keep the texts of options that are given by name."""
    for text in value or []:
        name, equals, given = text.partition("=")
        if not (name and equals and given):
            raise typer.BadParameter(
                f"`--objective-option` should be a name and its value. Found `{text}`. Pass, say, "
                "--objective-option beta=0.1."
            )
        _keep_once(ctx, name.replace("-", "_"), given)


def _keep_once(ctx: typer.Context, option: str, text: str) -> None:
    known = ctx.meta.setdefault(GIVEN, {}).setdefault(option, text)
    if known != text:
        raise typer.BadParameter(
            f"`{option}` should be given once. Found `{known}` and `{text}`. Leave one of them out."
        )


@cache
def _options() -> list[Any]:
    """An option for each field, with the objectives that have it and their defaults."""
    from geffect.objectives import CATALOGUE, REGULARISERS, options_of

    having: dict[str, list[str]] = {}
    for name, objective in {**CATALOGUE, **{f"+{n}": r for n, r in REGULARISERS.items()}}.items():
        for option, default in options_of(objective).items():
            having.setdefault(option, []).append(f"{name} ({default})")
    named = typer.Option(
        metavar="NAME=VALUE",
        help="An option of the objective by its name, such as beta=0.1; may be repeated.",
        callback=_keep_named,
        expose_value=False,
    )
    made = {"objective_option": Annotated[list[str] | None, named]}
    for name, objectives in having.items():
        own = typer.Option(
            metavar="NUMBER",
            help=f"Of {', '.join(objectives)}.",
            callback=_keep,
            expose_value=False,
        )
        made[name] = Annotated[str | None, own]

    def options() -> None:
        """What typer reads the options from."""

    vars(options)["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=how)
            for name, how in made.items()
        ]
    )
    app = typer.Typer(add_completion=False)
    app.command()(options)
    return get_command(app).params
