"""`geffect info`: what a run file holds and where it comes from."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import indent
from typing import TYPE_CHECKING, Any, TypeGuard

from geffect.layers import in_network_order, layers_of, part_of
from geffect.numbers import is_whole
from geffect.places import OTHER
from geffect.text import plain

from .options import FactsFormat, FactsFormatOption
from .selection import RunArgument
from .terminal import say, terminal, write_json

if TYPE_CHECKING:
    from geffect.store import Run


def command(run: RunArgument, form: FactsFormatOption = FactsFormat.TEXT) -> None:
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
        "towers": in_network_order(opened.layers, [row.tower for row in opened.layers]),
        "layers": layers_of(opened.layers),
        "other": [row.name for row in opened.layers if part_of(row) == OTHER],
        **opened.manifest,
        **_masks(opened),
        **_stopped(opened),
        **_waited(opened),
    }
    if form is FactsFormat.JSON:
        write_json(facts, indent=1)
        return
    console, room = terminal(), max(map(len, facts)) + 2
    for name, value in facts.items():
        said = indent(_said(value), " " * room)[room:]
        lines = f"{plain(name).replace('_', ' '):{room}}{said}".split("\n")
        say(console, *lines, hang=room + 2)


def _masks(run: "Run") -> dict[str, Any]:
    """What masks keep of all coordinates, and their overlap from step to step: means over steps."""
    if not run.contents.blocks:
        return {}
    _, numbers = run.rectification()

    def mean(part: str, whole: str) -> float | None:
        """Of the steps that have it; None where none has."""
        pairs = zip(numbers[part].sum(axis=1), numbers[whole].sum(axis=1), strict=True)
        shares = [float(some / all_of) for some, all_of in pairs if all_of > 0]
        return sum(shares) / len(shares) if shares else None

    kept = mean("selected", "among")
    if kept is None:
        return {}
    return {"masks": {"kept": kept, "overlap": mean("selected_again", "selected_either")}}


def _stopped(run: "Run") -> dict[str, Any]:
    """What stopped the run, where a rule did."""
    from geffect.store.schema import STOP

    table = run.table(STOP) if STOP in run.tables else {}
    if not {"clause", "message"} <= table.keys() or not len(table["message"]):
        return {}
    return {"stopped": f"{table['clause'][0]}: {table['message'][0]}"}


def _waited(run: "Run") -> dict[str, Any]:
    """For how long training waited for the disk, where gradients are kept."""
    from geffect.store.background import waited_for_disk

    told = waited_for_disk(run)
    if told is None:
        return {}
    seconds, rows = told
    return {"waited_for_disk": {"seconds": round(seconds, 3), "rows": rows}}


def _said(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(_line(name, inner) for name, inner in value.items()) or "none"
    if _are_tables(value):
        return "\n".join(map(_said, value))
    if isinstance(value, list):
        return ", ".join(_spanned([*map(plain, value)])) or "none"
    if value is None:
        return "none"
    if isinstance(value, float):
        value = float(f"{value:.6g}")  # all digits are in the JSON
    return f"{value:,}" if is_whole(value) else plain(value)


FEW = 8
"""So many names that count on are listed one by one, more by the first and the last."""


def _spanned(names: Sequence[str]) -> Iterator[str]:
    """The names, with the first and the last in the place of many that count on.

    >>> [*_spanned(["embedding", *(f"layer {n}" for n in range(60)), "head"])]
    ['embedding', 'layer 0 to layer 59', 'head']
    """

    def beginning(numbered: tuple[int, str]) -> tuple[str, int] | str:
        """What names that count on have in common: their words, and where they began to count."""
        place, name = numbered
        counted = re.fullmatch(r"(.*\D)(\d{1,9})", name)
        return (counted[1], int(counted[2]) - place) if counted else name

    for _, together in groupby(enumerate(names), key=beginning):
        own = [name for _, name in together]
        yield from [f"{own[0]} to {own[-1]}"] if len(own) > FEW else own


def _line(name: str, value: object) -> str:
    is_below = bool(value) and (isinstance(value, dict) or _are_tables(value))
    said = f"\n{indent(_said(value), '  ')}" if is_below else f" {_said(value)}"
    return f"{plain(name)}:{said}"


def _are_tables(value: object) -> TypeGuard[list[dict[str, object]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(of, dict) for of in value)
