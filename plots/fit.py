"""What a table holds, and whether one panel can hold it: the one check behind every plot."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from geffect.scores import BLOCKS, SAYS, blocks_of
from geffect.text import plain

SEED = "seed"
"""The column that tells runs apart that differ in their random numbers alone."""


def levels(column: pd.Series) -> list[str]:
    """The values that occur, in the order of the categories, else of appearance.

    >>> levels(pd.Series(["late", "early", "late"]))
    ['late', 'early']
    """
    present = column.dropna().unique()
    if isinstance(column.dtype, pd.CategoricalDtype):
        held = set(present)
        return [str(name) for name in column.cat.categories if name in held]
    return [str(name) for name in present]


def all_levels(column: pd.Series) -> list[str]:
    """As `levels`, with the categories that do not occur: a colour then survives a selection."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return [str(name) for name in column.cat.categories]
    return levels(column)


def blocks_in(table: pd.DataFrame) -> list[str]:
    """The blocks that occur, in network order."""
    return levels(table[blocks_of(table)])


def short(names: Sequence[str]) -> list[str]:
    """The names without the dotted parts that almost all of them share: those tell nothing apart.

    >>> short(["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    ['0', '1']
    """
    parts = [name.split(".") for name in names]
    count = Counter(part for those in parts for part in set(those))
    return [
        ".".join(part for part in those if count[part] <= 0.8 * len(names)) or name
        for those, name in zip(parts, names, strict=True)
    ]


def require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuses what is no table, and a table that lacks a column or has no rows."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            "`table` should be a table made by geffect.analysis. Found "
            f"`{type(table).__name__}`. Pass a score of the run, such as g_effect(run)."
        )
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"`table` should have the columns {', '.join(columns)}. "
            f"Found no {', '.join(missing)} among {', '.join(map(str, table.columns))}. "
            "Pass a table made by geffect.analysis or geffect.demo."
        )
    if table.empty:
        raise ValueError(
            "`table` should have at least one row. Found none. "
            "Widen the selection of steps, blocks or runs that it was made with."
        )
    if "value" in table and not pd.api.types.is_numeric_dtype(table["value"]):
        raise ValueError(
            f"`table` should have numbers in the column `value`. Found `{table['value'].dtype}`, "
            f"the first of them {table['value'].iloc[0]!r}. Convert them with "
            "table.assign(value=pandas.to_numeric(table['value']))."
        )


def require_names(table: pd.DataFrame, column: str, names: Sequence[str], advice: str) -> None:
    """Refuses a table without rows of each of the names in a column, and gives the advice.

    >>> require_names(pd.DataFrame({"risk": ["forget"]}), "risk", ["forget"], "Record both.")
    """
    found = levels(table[column])
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"`table` should have rows of each {column}: {', '.join(names)}. Found none of "
            f"{', '.join(missing)}. {advice}"
        )


def names_in(table: pd.DataFrame) -> dict[str, list[str]]:
    """The columns that name rows besides step and block, each with the names that occur.

    >>> table = pd.DataFrame({"step": [0], "layer": ["head"], "effect": "retaining"})
    >>> names_in(table)
    {'effect': ['retaining']}
    """
    return {
        str(name): levels(column)
        for name, column in table.items()
        if name not in {"step", "value", *BLOCKS, *SAYS}
        and not pd.api.types.is_numeric_dtype(column)
    }


def told_apart(table: pd.DataFrame, *, most: int) -> list[str]:
    """The columns, `most` of them at most, whose names tell rows of one step and block apart.

    >>> table = pd.DataFrame({"step": 0, "layer": "head", "effect": ["a", "b"], "value": 1.0})
    >>> told_apart(table, most=1)
    ['effect']
    """
    require(table, ["step", "value"])
    block = blocks_of(table)
    several = {
        column: names
        for column, names in names_in(table).items()
        if len(names) > 1 and column != SEED
    }
    if len(several) > most:
        column, names = next(iter(several.items()))
        found = "; ".join(f"{of} ({', '.join(map(repr, those))})" for of, those in several.items())
        raise ValueError(
            f"`table` should have {f'at most {most}' if most else 'no'} columns that tell rows of "
            f"one step and {block} apart, to fit one panel. Found {found}. "
            f"Choose with table[table[{column!r}] == {names[0]!r}], "
            f"or draw a panel for each with facets(table, ..., by={column!r})."
        )
    place = ["step", block, *several, *seed_in(table)]
    # Scores that were put below one another are told apart by what they are.
    if most > len(several) and "score" in table and table.duplicated(place).any():
        several["score"] = levels(table["score"])
    once_only(table, ["step", block, *several, *seed_in(table)])
    return list(several)


def seed_in(table: pd.DataFrame) -> list[str]:
    """The column of seeds, where there are several of them.

    >>> seed_in(pd.DataFrame({"seed": [0, 1]})), seed_in(pd.DataFrame({"seed": [0, 0]}))
    (['seed'], [])
    """
    return [SEED] if SEED in table and table[SEED].nunique() > 1 else []


def has_intervals(table: pd.DataFrame) -> bool:
    """Whether rows have an interval, as those of `geffect.analysis.intervals` do."""
    ends = {"low", "high"} <= {*table.columns}
    return ends and bool(table[["low", "high"]].notna().all(axis=1).any())


def once_only(table: pd.DataFrame, place: Sequence[str]) -> None:
    """Refuses a table with two rows in one place."""
    twice = table.loc[table.duplicated(list(place)), list(place)]
    if not twice.empty:
        where = ", ".join(f"{column} {name}" for column, name in twice.iloc[0].items())
        raise ValueError(
            f"`table` should have one row for each {', '.join(place)}. "
            f"Found {len(twice)} more, the first at {where}. "
            "Name what tells them apart in a column, with geffect.scores.stack, or choose."
        )


def one_block(table: pd.DataFrame) -> None:
    """Refuses a table of several blocks, for a picture that has room for one.

    >>> one_block(pd.DataFrame({"step": [0, 1], "layer": "head"}))
    """
    blocks = blocks_in(table) if {*BLOCKS} & {*table.columns} else []
    if len(blocks) > 1:
        raise ValueError(
            f"`table` should be of one block. Found {len(blocks)}, among them "
            f'{", ".join(map(plain, blocks[:3]))}. Make it with by="model", or choose one of them.'
        )


def constants(table: pd.DataFrame) -> str:
    """The names that hold for all rows, in words: what a panel or a figure is of.

    >>> constants(pd.DataFrame({"step": [0, 1], "effect": "retaining", "run": ["ga", "npo"]}))
    'retaining'
    """
    return ", ".join(names[0] for names in names_in(table).values() if len(names) == 1)
