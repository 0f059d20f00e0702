"""Options of the command line for the fields of what a catalogue names: objectives, edits."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, ClassVar

import typer
from typer.main import get_command

from .command import Command

GIVEN = "geffect.cli.fields"
"""Where a context keeps the texts of the options that were given, by name."""

CATALOGUED = "{catalogue}"
"""What stands in a help text for the names of the catalogue."""

SWITCH = "true|false"
"""What an option takes that is one of True and False."""


class CommandOfFields(Command):
    """A subcommand that is told options of one of a catalogue: `--beta 0.1`, and by their names.

    They are made when they are asked for, since what has them needs torch. An option that the
    subcommand has itself, such as `--seed`, is told by its name alone.
    """

    kind: ClassVar[str]
    """What the catalogue is of, which an option by name begins with: `--<kind>-option beta=0.1`."""

    example: ClassVar[str]
    metavar: ClassVar[str] = "NUMBER"

    @staticmethod
    def spelt() -> str:
        """The names of the catalogue, for a page of help."""
        raise NotImplementedError

    @staticmethod
    def having() -> Mapping[str, Mapping[str, Any]]:
        """The options and their defaults, by the name of what has them."""
        raise NotImplementedError

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of the function, and the options of the catalogue."""
        own: list[Any] = [*super().get_params(ctx)]
        for parameter in own:
            text = getattr(parameter, "help", None)
            if text and CATALOGUED in text:
                parameter.help = text.replace(CATALOGUED, self.spelt())
        taken = {parameter.name for parameter in own}
        further = [option for option in _options(type(self)) if option.name not in taken]
        return [*own[:-1], *further, *own[-1:]]  # --help stays the last


def texts_given(ctx: typer.Context) -> dict[str, str]:
    """The texts of the options that were given, by name."""
    return {**ctx.meta.get(GIVEN, {})}


def values_given(
    ctx: typer.Context, kind: type[CommandOfFields], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that were given, as values of the types of the defaults."""
    return {
        name: _value(kind, name, text, defaults.get(name))
        for name, text in texts_given(ctx).items()
    }


def _value(kind: type[CommandOfFields], option: str, text: str, default: Any) -> Any:
    """The value of a text, of the type that the default has; what has it refuses others."""
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if default is None:
            return _number_in(text)
        return text if isinstance(default, bool) else type(default)(text)
    except ValueError as error:
        raise ValueError(
            f"`{option}` should be a number such as {default}. Found `{text}`. Pass, say, "
            f"--{kind.kind}-option {option}={default}."
        ) from error


def _number_in(text: str) -> Any:
    """The number that a text is, if it is one: what has no default says no type.

    >>> [_number_in(text) for text in ("8", "0.5", "inf", "much")]
    [8, 0.5, inf, 'much']
    """
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _keep(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> None:
    """Keep the text of an option of its own."""
    if value is not None and param.name is not None:
        _keep_once(ctx, param.name, value)


def _keeping_named(kind: type[CommandOfFields]) -> Callable[..., None]:
    """What keeps the texts of options that are given by name."""

    def keep(ctx: typer.Context, value: list[str] | None) -> None:
        _keep_named(kind, ctx, value or [])

    return keep


def _keep_named(kind: type[CommandOfFields], ctx: typer.Context, texts: Iterable[str]) -> None:
    for text in texts:
        name, equals, given = text.partition("=")
        if not (name and equals and given):
            raise typer.BadParameter(
                f"`--{kind.kind}-option` should be a name and its value. Found `{text}`. Pass, "
                f"say, --{kind.kind}-option {kind.example}."
            )
        _keep_once(ctx, name.replace("-", "_"), given)


def _keep_once(ctx: typer.Context, option: str, text: str) -> None:
    known = ctx.meta.setdefault(GIVEN, {}).setdefault(option, text)
    if known != text:
        raise typer.BadParameter(
            f"`{option}` should be given once. Found `{known}` and `{text}`. Leave one of them out."
        )


def _told(default: Any) -> str:
    """A default behind its name, as it is written where it is given, with three digits.

    >>> [_told(default) for default in (1.0, 1 / 3, False, "", None)]
    [' (1.0)', ' (0.333)', ' (false)', ' (nothing)', '']
    """
    if default is None:
        return ""
    if isinstance(default, bool):
        return f" ({str(default).lower()})"
    short = float(f"{default:.3g}") if isinstance(default, float) else default
    return f" ({str(short) or 'nothing'})"


@cache
def _options(kind: type[CommandOfFields]) -> list[Any]:
    """An option for each field, with those of the catalogue that have it and their defaults."""
    owners: dict[str, dict[str, Any]] = {}
    for name, fields in kind.having().items():
        for option, default in fields.items():
            owners.setdefault(option, {})[name] = default
    named = typer.Option(
        metavar="NAME=VALUE",
        help=f"An option of the {kind.kind} by its name, such as {kind.example}; may be repeated.",
        callback=_keeping_named(kind),
        expose_value=False,
    )
    made: dict[str, Any] = {f"{kind.kind}_option": Annotated[list[str] | None, named]}
    for name, those in owners.items():
        own = typer.Option(
            metavar=SWITCH if all(isinstance(x, bool) for x in those.values()) else kind.metavar,
            help=f"Of {', '.join(name + _told(x) for name, x in those.items())}.",
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
