"""`geffect layers`: what each layer gains and costs, and which to train."""

from typing import TYPE_CHECKING, Annotated

import typer

from geffect.numbers import percent_of_two

from .command import Apart, check_together
from .options import Format, FormatOption, number, whole
from .selection import RunArgument
from .terminal import say, show, terminal, write_json, write_table

if TYPE_CHECKING:
    import pandas as pd

LIKELIEST = 2
"""So many blocks are named in which the facts were learned: the first alone is wrong too often."""

RULES = (Apart("--recommend", "--gain"),)


_share = number("a share above 0 and at most 1", lambda share: 0 < share <= 1, "0.5, say")


def command(
    ctx: typer.Context,
    run: RunArgument,
    recommend: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="N", help="How many layers to choose, at most."),
    ] = None,
    gain: Annotated[
        float | None,
        typer.Option(
            parser=_share,
            metavar="SHARE",
            help="Choose until so much of the gain is had; 0.5 if neither is given.",
        ),
    ] = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Tell for each layer how much a run forgets there and what that costs, and which to train.

    Needs a run of at least 8 steps that was recorded with its updates.
    """
    from geffect import open_run
    from geffect.analysis import recommended_layers

    check_together(ctx, RULES)
    chosen = recommended_layers(open_run(run), count=recommend, share=gain)
    if form is Format.JSON:
        facts = {"layers": chosen.layers, "pattern": chosen.pattern, "warnings": chosen.warnings,
                 "learned": chosen.learned}  # fmt: skip
        write_json({**facts, "table": chosen.table.to_dict("records")})
        return
    if form is not Format.TABLE:
        write_table(chosen.table, form)
        return
    console = terminal()
    _show(chosen.table)
    if chosen.layers:
        say(console, f"To train: {', '.join(chosen.layers)}", f"Parameters: {chosen.pattern}")
    else:
        say(console, "No layer is certain to forget.")
    if len(chosen.learned) > LIKELIEST:  # else these are all there are
        likely = " or ".join(chosen.learned[:LIKELIEST])
        say(
            console,
            f"If one block alone has learned the facts, it is most likely {likely}: there "
            "the forget gradient of the first step is smallest beside that of retain.",
        )
    say(console, *chosen.warnings)


def _show(table: "pd.DataFrame") -> None:
    lines = [
        [
            str(row["layer"]),
            f"{row['gain']:.4g} [{row['low']:.3g}, {row['high']:.3g}]",
            f"{row['harm']:.4g}",
            f"{row['ratio']:.3g}",
            _chosen(row["fraction"]),
        ]
        for row in table.to_dict("records")
    ]
    console = terminal()
    say(
        console,
        "Rise of the forget risk (gain, with its 95 % interval) and of the others (harm), in nats "
        "to first order:",
    )
    headings = ["layer", "gain", "harm", "gain/harm", "needed"]
    show(console, headings, lines, names=["layer"], spare=headings[3:])
    if table["chosen"].any():
        say(console, "needed: how much of its gain a layer that is chosen has to give.")


def _chosen(fraction: float) -> str:
    """How much is needed of the gain of a layer that is chosen."""
    return "" if not fraction else "all" if fraction == 1 else percent_of_two(fraction)
