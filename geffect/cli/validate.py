"""`geffect validate`: whether a run file is whole, and what is lost."""

import json
from dataclasses import asdict

import typer

from .selection import JsonOption, RunArgument


def command(run: RunArgument, as_json: JsonOption = False) -> None:
    """Check every step of a run file. Exit code 1 if something in it cannot be trusted."""
    from geffect.store import validate

    health = validate(run)
    if as_json:
        typer.echo(json.dumps({**asdict(health), "whole": health.whole}))
    else:
        verdict = "whole" if health.whole else "damaged"
        typer.echo(f"{run}: {verdict}, {health.steps} steps")
        for sentence in (*health.problems, *health.remarks):
            typer.echo(f"  {sentence}")
    raise typer.Exit(code=0 if health.whole else 1)
