"""`geffect info`: what a run file holds and where it comes from."""

import json
from textwrap import indent

import typer

from geffect.layers import layers_of

from .selection import JsonOption, RunArgument


def command(run: RunArgument, as_json: JsonOption = False) -> None:
    """Show the sources, steps, size and provenance of a run."""
    from geffect import open_run

    opened = open_run(run)
    steps = opened.steps
    facts = {
        "file": str(run),
        "bytes": run.stat().st_size,
        "state": opened.state,
        "steps": len(steps),
        "first_step": int(steps[0]) if len(steps) else None,
        "last_step": int(steps[-1]) if len(steps) else None,
        "sources": list(opened.sources),
        "parameters": len(opened.layers),
        "numbers": sum(parameter.numel for parameter in opened.layers),
        "layers": layers_of(opened.layers),
        **opened.manifest,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(f"[bold]{name.replace('_', ' ')}[/]", _said(value))
    Console().print(table)


def _said(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(_line(name, inner) for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)  # True is an int too


def _line(name: str, value: object) -> str:
    inside = isinstance(value, dict) and value
    return f"{name}:\n{indent(_said(value), '  ')}" if inside else f"{name}: {_said(value)}"
