"""The page of a study."""

import base64
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect.pages import page

if TYPE_CHECKING:
    from geffect.demo.tables import Table

BARS = {"retain_nll": "inside", "retain_heldout_authors_nll": "outside"}
"""The columns of a study's tables with a bar, and what kind of bar."""


def study_report(summary: Mapping[str, Any], out: Path) -> str:
    """The page of a study, from its summary and the figures in `out`."""
    from geffect.demo import figures
    from geffect.demo.columns import COLUMNS, KEYS
    from geffect.demo.tables import columns_of, tables

    main, *further = made = tables(summary)
    columns = columns_of(main.runs)
    return page(
        "study.html.jinja",
        "geffect.report",
        summary=summary,
        figures={
            name: embedded((out / "figures" / f"{name}.png").read_bytes())
            for name in figures.names(summary, out)
        },
        methods=list(dict.fromkeys(run["method"] for run in summary["runs"])),
        headings=[heading for heading, _ in (*KEYS.values(), *(COLUMNS[c] for c in columns))],
        violating=COLUMNS["share_update_violating"][0],
        bars=BARS,
        main=_table(summary, main, columns),
        further=[_table(summary, table, columns) for table in further],
        files=[f"{table.name}.csv" for table in made],
    )


def embedded(png: bytes) -> str:
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(summary: Mapping[str, Any], table: "Table", columns: Sequence[str]) -> dict[str, Any]:
    """What a page shows of a table of a study; the models before unlearning come last."""
    from geffect.demo.tables import before, rows

    originals = before(summary, table.runs["retain_feed"].unique())
    shown = [*rows(table.runs, columns), *rows(originals, columns)]
    means = [row.values[name].mean for row in shown for name in BARS]
    return {
        "heading": table.heading,
        "rows": shown,
        "worst": max(mean for mean in means if not isnan(mean)),
    }
