"""The command line: `geffect`, with one file a subcommand."""

import sys
from typing import Annotated

import typer

from . import demo, info, plot, replay, report, scores, validate

app = typer.Typer(
    help="See what an unlearning run does to a language model, layer by layer, and mend it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for subcommand in (demo, info, scores, plot, report, replay, validate):
    name, kind = subcommand.__name__.rpartition(".")[2], getattr(subcommand, "COMMAND", None)
    app.command(name, cls=kind)(subcommand.command)


def _show_version(asked: bool) -> None:
    if asked:
        from geffect import __version__

        typer.echo(f"geffect {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """The options of `geffect` itself."""


def main() -> None:
    """Run the command line. Exit code 0: done; 1: it could not be done; 2: it was asked wrongly."""
    try:
        app(prog_name="geffect")  # also where it is `python -m geffect`
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"geffect: {error}", err=True)
        sys.exit(1)
