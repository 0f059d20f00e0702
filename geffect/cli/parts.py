"""Which steps and layers of a table a user wants."""

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from geffect.near import meant
from geffect.text import plain

if TYPE_CHECKING:
    import pandas as pd

StepsOption = Annotated[
    str | None,
    typer.Option(
        "--steps",
        metavar="FROM:TO",
        help="Of these steps alone, both ends included; either may be left out, as in 100:.",
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="LAYERS",
        help="Of these alone, with commas between them: numbers, ranges of them with both ends "
        "included, and names of blocks, with * for any letters. Say, 0:7,head.",
    ),
]

NUMBER = re.compile(r"(?<![\w])\d+(?![\w])")


def chosen(table: "pd.DataFrame", steps: str | None, layers: str | None) -> "pd.DataFrame":
    """The rows of the steps and the layers that are asked for. Raises BadParameter for none."""
    if steps is not None:
        low, high = _ends(steps)
        found = table["step"]
        table = table[(found >= low) & (found <= high)]
        if table.empty:
            raise typer.BadParameter(
                f"`--steps` should hold a captured step, from {found.min()} to {found.max()}. "
                f"Found `{plain(steps)}`. Choose among those."
            )
    if layers is not None:
        table = _of_layers(table, layers)
    return table


def _ends(steps: str) -> tuple[float, float]:
    written = re.fullmatch(r"\s*(\d*)\s*(:?)\s*(\d*)\s*", steps)
    if written is None or not (written[1] or written[3]):
        raise typer.BadParameter(
            f"`--steps` should be two whole numbers with a colon between them. Found "
            f"`{plain(steps)}`. Pass, say, --steps 100:500."
        )
    low, colon, high = written.groups()
    if not colon:
        return float(low), float(low)
    return float(low or 0), float(high or "inf")


def _of_layers(table: "pd.DataFrame", layers: str) -> "pd.DataFrame":
    from geffect.scores import blocks_of

    column = table[blocks_of(table)].astype(str)
    names = list(dict.fromkeys(column))
    if len(names) == 1:
        raise typer.BadParameter(
            f"`--layers` should go with several layers. Found one value a step, of {names[0]}. "
            "Leave it out, or choose blocks with --by layer."
        )
    kept: set[str] = set()
    for asked in layers.split(","):
        those = {name for name in names if _is_asked(name, asked.strip())}
        if not those:
            raise typer.BadParameter(
                f"`--layers` should name blocks of the run: {', '.join(map(plain, names[:4]))}"
                f"{', ...' if len(names) > 4 else ''}. Found `{plain(asked)}`."
                f"{meant(asked.strip(), names)} Choose among those."
            )
        kept |= those
    return table[column.isin(kept)]


def _is_asked(name: str, asked: str) -> bool:
    span = re.fullmatch(r"(\d*)(:?)(\d*)", asked)
    if span is None or not (span[1] or span[3]):
        return fnmatchcase(name, asked)
    number = NUMBER.search(name.replace(".", " "))
    if number is None:
        return False
    low, colon, high = span.groups()
    return int(low or 0) <= int(number[0]) <= (float(high or "inf") if colon else int(low))
