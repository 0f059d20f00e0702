"""`geffect join`: metrics of open-unlearning beside a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geffect.numbers import counted

from .command import Needs, check_together
from .options import Format, FormatOption, OverwriteOption, check_output, written_to
from .selection import RunArgument
from .terminal import say, show, terminal, write_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SIDE_BY_SIDE = 4
"""Panels in a row, at most."""


RULES = (Needs("--overwrite", "--output"),)


def command(
    ctx: typer.Context,
    run: RunArgument,
    evaluations: Annotated[
        list[str],
        typer.Argument(
            metavar="EVALS",
            help="Summaries such as checkpoint-60/evals/TOFU_SUMMARY.json; where no folder tells "
            "the step, 60=FILE.",
        ),
    ],
    output: Annotated[
        Path | None,
        written_to("Also draw each metric over the predicted change", ".png", ".pdf", ".svg"),
    ] = None,
    overwrite: OverwriteOption = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Put evaluations of checkpoints beside the predicted change of a run.

    For each metric and risk: the rank correlation of the two, from 8 checkpoints on, and how far
    the predicted change is from the measured one. As TSV, CSV or JSON: every checkpoint.
    """
    from geffect import open_run
    from geffect.analysis import agreement, join, read_evaluations
    from geffect.plots.figures import save

    check_together(ctx, RULES)
    if output is not None:
        check_output(output, overwrite=overwrite)
    opened = open_run(run)
    joined = join(opened, read_evaluations(evaluations))
    if output is not None:
        save(draw(joined), output, dpi=150)
    if form is not Format.TABLE:
        write_table(joined, form)
        return
    console = terminal()
    steps = sorted(joined["step"].unique())
    say(
        console,
        f"{counted(len(steps), 'checkpoint')}, after {steps[0]} to {steps[-1]} updates",
    )
    names = ["metric", "risk"]
    lines = [
        [
            " ".join(filter(None, [row["suite"], row["metric"]])),
            row["risk"],
            *(_told(row[name]) for name in ("first", "last", "rho", "slope", "gap")),
        ]
        for row in _summed_up(joined, agreement(joined)).to_dict("records")
    ]
    show(console, [*names, "first", "last", "rho", "slope", "gap"], lines, names=names)
    say(
        console,
        "rho: the rank correlation of a metric and the predicted change, from 8 checkpoints on; "
        "slope: of a line through both; gap: how far the change is from what was measured, "
        "relative to that.",
    )
    captured = opened.steps[1:] - opened.steps[:-1]
    if (captured > 1).any():
        say(console, "Not every step was captured: each stands for those up to the next.")
    if output is not None:
        say(console, f"Each metric over the predicted change in {output}")


def draw(joined: "pd.DataFrame") -> "Figure":
    """A panel a metric."""
    from geffect.plots import evaluations
    from geffect.plots.figures import new_figure

    panels = [*joined.groupby(["suite", "metric"], sort=False, observed=True)]
    wide = min(SIDE_BY_SIDE, len(panels))
    tall = -(-len(panels) // wide)
    figure = new_figure(4.2 * wide, 3.4 * tall)
    for place, (_, part) in enumerate(panels, start=1):
        evaluations(part, ax=figure.add_subplot(tall, wide, place))
    return figure


def _summed_up(joined: "pd.DataFrame", agreeing: "pd.DataFrame") -> "pd.DataFrame":
    """What is shown of each metric, with its first and last value."""
    keys = ["suite", "metric", "risk"]
    values = joined.sort_values("step", kind="stable").groupby(keys)["value"]
    ends = values.agg(["first", "last"]).reset_index()
    return agreeing.merge(ends, on=keys)


def _told(value: float) -> str:
    return "" if value != value else f"{value:.3g}"
