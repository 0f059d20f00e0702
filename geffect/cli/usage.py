"""What a request that was wrong is told: `--x` should be ... Found ... Do ..."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

from geffect.near import meant

_exceptions = import_module(typer.BadParameter.__module__)  # click's, or a copy of them

UsageError: type[Exception] = _exceptions.UsageError
"""What all of them are."""


def told(error: Any) -> str:
    """The sentence for an error of the request."""
    for kind in type(error).__mro__:
        if kind in SENTENCES:
            return SENTENCES[kind](error)
    raise error


def _bad(error: Any) -> str:
    name, says = _name(error), str(error.message)
    if "should" in says and "Found" in says:  # one of our own
        return f"`{name}` {says}" if name and says.startswith("should") else says
    if unreadable := re.fullmatch(r"\w+ '(.*)' is not readable\.?", says, re.DOTALL):
        return (
            f"`{name}` should be readable. Found `{unreadable[1]}`, which is not. Mend that, or "
            "choose another file."
        )
    return f"`{name}` should have a value of its kind. Found: {_end(says)}{_see(error)}"


def _missing(error: Any) -> str:
    return f"`{_name(error)}` should be given. Found none.{_see(error)}"


def _ill_used(error: Any) -> str:
    if "requires" in error.message:
        return f"`{error.option_name}` should be followed by a value. Found none. Pass one."
    return f"`{error.option_name}` should stand alone. Found a value behind it. Leave that out."


def _no_such_option(error: Any) -> str:
    names = [
        name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts
    ]
    near = meant(error.option_name, names)
    if not error.option_name.startswith("--"):  # `-a.h5` is read as the letter that it begins with
        near = " Put -- before a name that begins with a dash."
    return (
        f"An option should be one of {', '.join(n for n in names if n.startswith('-'))}. Found "
        f"`{error.option_name}`.{near}{_see(error)}"
    )


def _other(error: Any) -> str:
    if found := re.search(
        r"unexpected extra argument(?:\(s\)|s)? \((.*)\)", str(error.message), re.DOTALL
    ):
        return (
            f"`{error.ctx.command_path}` should be given its arguments alone. Found `{found[1]}` "
            f"as well. Leave that out.{_see(error)}"
        )
    return (
        f"A request should be as its help says. Found: {_end(error.format_message())}{_see(error)}"
    )


SENTENCES: dict[type, Callable[[Any], str]] = {
    _exceptions.MissingParameter: _missing,
    _exceptions.BadOptionUsage: _ill_used,
    _exceptions.NoSuchOption: _no_such_option,
    _exceptions.BadParameter: _bad,
    _exceptions.UsageError: _other,
}


def _name(error: Any) -> str:
    parameter = error.param
    if parameter is None:
        return ""
    if parameter.param_type_name == "option":
        return max(map(str, parameter.opts), key=len)
    return str(parameter.metavar or parameter.name.upper())


def _end(sentence: str) -> str:
    return f"{sentence.strip().rstrip('.')}."


def _see(error: Any) -> str:
    return f" See {error.ctx.command_path} --help." if error.ctx else ""
