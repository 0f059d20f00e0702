"""The table of G-effects beside each other, and whether they tell what a study has measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from geffect.correlation import Correlation, correlation, ranks
from geffect.drafts import write_whole
from geffect.sources import FORGET, RETAIN
from geffect.text import in_markdown

from .scales import REMOVED, SCALES

NAME = "g_effects"

OUTSIDE = "retain_heldout_authors_nll"

KEYS = ("method", "variant")

COLUMNS = {
    **{f"{scale}_{risk}": f"{words}, {risk}" for scale, words in SCALES.items()
       for risk in (FORGET, RETAIN)},
    REMOVED: "forget rise over retain change",
}  # fmt: skip
"""What is shown of each row, with its heading."""


def g_effects(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each run and edit of the comparison, with its G-effects up to the level.

    Columns: method, variant, seed, those of `on_common_scales`, and the retain NLL of authors
    outside the retain gradient at the level; NaN where a number is not known.
    """
    made = [*summary["runs"], *summary.get("edits", ())]
    rows = [
        {
            "method": run["method"],
            "variant": run["variant"],
            "seed": run["seed"],
            **run["g_effects"],
            OUTSIDE: (run["at_level"] or {}).get(OUTSIDE),
        }
        for run in made
        if run.get("g_effects")
    ]
    frame = pd.DataFrame(rows, columns=[*KEYS, "seed", *COLUMNS, OUTSIDE])
    return frame.astype(dict.fromkeys((*COLUMNS, OUTSIDE), float))


def as_markdown(table: pd.DataFrame) -> str:
    """Means over seeds."""
    lines = [[*KEYS, *COLUMNS.values()], ["---", "---", *["---:"] * len(COLUMNS)]]
    for key, part in table.groupby(list(KEYS), sort=False):
        means = part[list(COLUMNS)].mean()
        cells = ["" if value != value else f"{value:.3g}" for value in means]
        lines.append([*map(in_markdown, map(str, key)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def agreement(table: pd.DataFrame) -> dict[str, Correlation]:
    """By scale, the rank correlation of the retaining G-effect with the retain NLL outside.

    Over the runs that reached the level and have both.
    """
    found = {}
    for scale in SCALES:
        effect = f"{scale}_{RETAIN}"
        both = table[[effect, OUTSIDE]].dropna()
        found[scale] = correlation(ranks(both[effect].to_list()), ranks(both[OUTSIDE].to_list()))
    return found


def write(summary: Mapping[str, Any], out: Path) -> None:
    """The table of a study as out/g_effects.csv and, in means, as out/g_effects.md."""
    table = g_effects(summary)
    if len(table):
        write_whole(out / f"{NAME}.csv", table.to_csv(index=False))
        write_whole(out / f"{NAME}.md", as_markdown(table))
