"""A subcommand: its page of help, and the options that do not go together."""

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import TextWrapper
from typing import Any, Protocol

import typer
from typer.core import TyperCommand, TyperGroup

from geffect.interrupts import interrupt_behind
from geffect.near import meant

from .terminal import say, terminal

WIDEST = 100
"""The columns of a page of help, at most: longer lines are hard to read."""

COMMAND_LINE = "COMMANDLINE"
"""Where a parser says that a value is from that was given."""


class Rule(Protocol):
    """What options go together."""

    def broken(self, given: set[str]) -> str | None:
        """What is wrong with the options that were given, if it is."""


@dataclass(frozen=True)
class Needs:
    """An option that says something of another one alone."""

    option: str
    other: str

    def broken(self, given: set[str]) -> str | None:
        if self.option not in given or self.other in given:
            return None
        return (
            f"`{self.option}` should go with `{self.other}`. Found it alone. Pass {self.other}, or "
            f"leave {self.option} out."
        )


@dataclass(frozen=True)
class Apart:
    """Two options that leave nothing for each other to say."""

    option: str
    other: str

    def broken(self, given: set[str]) -> str | None:
        if not {self.option, self.other} <= given:
            return None
        return (
            f"`{self.option}` should be without `{self.other}`. Found both. Leave one of them out."
        )


def check_together(ctx: typer.Context, rules: Iterable[Rule]) -> None:
    """Refuse options that were given and that would say nothing beside the others."""
    options = given(ctx)
    for rule in rules:
        if (wrong := rule.broken(options)) is not None:
            raise typer.BadParameter(wrong)


def given(ctx: typer.Context) -> set[str]:
    """The options that the user gave, by their long names."""
    return {
        max(parameter.opts, key=len)
        for parameter in ctx.command.get_params(ctx)
        if parameter.name is not None and _is_given(ctx, parameter.name)
    }


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == COMMAND_LINE


class Command(TyperCommand):
    """A subcommand whose page of help breaks between words and cuts none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind the subcommand; none may undo another."""
        if not ctx.resilient_parsing:
            _, _, read = self.make_parser(ctx).parse_args(args=[*args])
            _check_once(read)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page of help."""
        formatter.write("\n".join(page(self, ctx)) + "\n")


def _check_once(read: Iterable[Any]) -> None:
    """Refuse an option with a value that was given twice: only the last would hold."""
    counts = Counter(
        max(parameter.opts, key=len)
        for parameter in read
        if parameter.param_type_name == "option"
        and not (parameter.multiple or (parameter.is_flag and not parameter.secondary_opts))
    )
    for option, count in counts.items():
        if count > 1:
            raise typer.BadParameter(
                f"`{option}` should be given once. Found it {count} times. Leave all but one out."
            )


PIPE_CLOSED = 128 + getattr(signal, "SIGPIPE", 13)
"""The exit code where nobody reads on, as a shell counts it."""


@contextmanager
def _quiet_where_nobody_reads_on() -> Iterator[None]:
    """Ends without a word where the reader of a pipe has gone, as in `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left to be flushed at the end has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None


@contextmanager
def telling_of_interrupts() -> Iterator[None]:
    """Ends with a line where there was a Ctrl-C."""
    try:
        yield
    except (KeyboardInterrupt, SystemError) as error:
        if not isinstance(interrupt_behind(error, None), KeyboardInterrupt):
            raise
        say(terminal(stderr=True), "geffect: Interrupted.")
        raise typer.Exit(130) from None


class Group(TyperGroup):
    """The command with its subcommands, whose page of help is like theirs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show the page of help where nothing is asked."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand, and tell of an interrupt that it does not tell of itself."""
        with telling_of_interrupts(), _quiet_where_nobody_reads_on():
            return super().invoke(ctx)

    def make_context(self, *given: Any, **how: Any) -> Any:
        """Read the words before the subcommand, which may ask for help."""
        with telling_of_interrupts(), _quiet_where_nobody_reads_on():
            return super().make_context(*given, **how)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand of the first word."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            raise typer.BadParameter(
                f"A command should be one of {', '.join(names)}. Found `{args[0]}`."
                f"{meant(args[0], names)} See geffect --help."
            )
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page of help."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        listed = [(name, command.get_short_help_str(1000)) for name, command in commands if command]
        shown = page(self, ctx, "COMMAND", "...")
        formatter.write("\n".join([*shown, "", *_section("Commands", listed)]) + "\n")


def page(command: Any, ctx: Any, *further: str) -> Iterator[str]:
    """The lines of a page of help: how it is called, what it does, its arguments and options.

    `further` are words of the call that are no argument of its own.
    """
    parameters = [p for p in command.get_params(ctx) if not getattr(p, "hidden", False)]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    called = [*map(_called, arguments), *further]
    yield from _wrapped(" ".join(["Usage:", ctx.command_path, "[OPTIONS]", *called]))
    for paragraph in (command.help or "").split("\n\n"):
        yield from ("", *_wrapped(" ".join(paragraph.split())))
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        entries = [_entry(p, ctx) for p in parameters if p.param_type_name == kind]
        if entries:
            yield from ("", *_section(title, entries))


def _called(argument: Any) -> str:
    return f"{argument.metavar or argument.name.upper()}{'' if argument.nargs == 1 else '...'}"


def _entry(parameter: Any, ctx: Any) -> tuple[str, str]:
    """How a parameter is written, and what it does."""
    _, says = parameter.get_help_record(ctx)
    if parameter.param_type_name == "argument":
        return _called(parameter), says
    names = [*sorted(parameter.opts, key=len), *parameter.secondary_opts]
    metavar = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
    return f"{', '.join(names)}{metavar}", says


def _section(title: str, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"{title}:"
    for written, says in entries:
        yield from _wrapped(written, "  ")
        yield from _wrapped(" ".join(says.split()), "      ")


def _wrapped(text: str, indent: str = "") -> list[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    wrapper = TextWrapper(
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(text)
