"""`geffect validate`: whether a run file is whole, and what is lost."""

from dataclasses import asdict

import typer

from geffect.numbers import counted

from .options import FactsFormat, FactsFormatOption
from .selection import RunArgument
from .terminal import say, terminal, write_json


def command(run: RunArgument, form: FactsFormatOption = FactsFormat.TEXT) -> None:
    """Check every step of a run file. Exit code 1 if something in it cannot be trusted."""
    from geffect.store import validate

    health = validate(run)
    if form is FactsFormat.JSON:
        write_json({**asdict(health), "whole": health.whole})
    else:
        console, verdict = terminal(), "whole" if health.whole else "damaged"
        say(console, f"{run}: {verdict}, {counted(health.steps, 'step')}")
        say(console, *(f"  {sentence}" for sentence in (*health.problems, *health.remarks)))
    raise typer.Exit(code=0 if health.whole else 1)
