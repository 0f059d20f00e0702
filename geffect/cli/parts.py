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
        if (ends := _ends(steps)) is None:
            raise typer.BadParameter(
                f"`--steps` should be two whole numbers with a colon between them. Found "
                f"`{plain(steps)}`. Pass, say, --steps 100:500."
            )
        low, high = ends
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
    ends = _ends(asked)
    if ends is None:
        return fnmatchcase(name, asked)
    number = NUMBER.search(name.replace(".", " "))
    return number is not None and ends[0] <= int(number[0]) <= ends[1]


def _ends(written: str) -> tuple[float, float] | None:
    """Both ends of a number or a range, as in 5, 100: and 0:7; None where it is neither."""
    found = re.fullmatch(r"\s*(\d*)\s*(?:(:)\s*(\d*)\s*)?", written)
    if found is None or not (found[1] or found[3]):
        return None
    low, colon, high = found.groups()
    return (float(low or 0), float(high or "inf")) if colon else (float(low), float(low))
