"""The command line: `geffect`, with one file a subcommand."""

import sys

import typer

from . import demo, info, plot, replay, report, scores, validate

app = typer.Typer(
    help="See what an unlearning run does to a language model, layer by layer, and mend it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for subcommand in (demo, info, scores, plot, report, replay, validate):
    app.command(subcommand.__name__.rpartition(".")[2])(subcommand.command)


def main() -> None:
    """Run the command line. Exit code 0: done; 1: it could not be done; 2: it was asked wrongly."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"geffect: {error}", err=True)
        sys.exit(1)
