"""`geffect plan`: which sets an unlearning will damage, before it is done."""

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geffect.drafts import write_whole
from geffect.numbers import as_json

from .command import Needs, check_together
from .objectives import CATALOGUED, CommandOfObjectives, objective_of
from .options import (
    BaseOption,
    BatchSizeOption,
    DeviceOption,
    ForgetOption,
    Format,
    FormatOption,
    MaxLengthOption,
    ModelArgument,
    OverwriteOption,
    TemplateOption,
    TokenizerOption,
    check_output,
    number,
    paths_by_name,
    whole,
    written_to,
)
from .terminal import say, show, showing_rows, terminal, write_json, write_table

if TYPE_CHECKING:
    from geffect.checkpoints.plan import Prediction

COMMAND = CommandOfObjectives

RULES = (Needs("--overwrite", "--output"),)


_rate = number(
    "a learning rate above 0",
    lambda rate: 0 < rate < inf,
    "that of the unlearning, such as 1e-5",
)


def command(
    ctx: typer.Context,
    model: ModelArgument,
    forget: ForgetOption,
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"What unlearning will minimise: one of {CATALOGUED}.",
            show_default=False,
        ),
    ],
    sets: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=DATA",
            help="A set that may be damaged; may be repeated.",
            show_default=False,
        ),
    ],
    lr: Annotated[
        float,
        typer.Option(
            "--lr", parser=_rate, metavar="RATE", help="The learning rate.", show_default=False
        ),
    ],
    retain: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="As --forget: for an objective with a retain term."),
    ] = None,
    probe: Annotated[
        int, typer.Option(parser=whole(3), metavar="K", help="Probing steps, at least 3.")
    ] = 3,
    seeds: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Probes, each in another order.")
    ] = 3,
    output: Annotated[
        Path | None,
        written_to("Also write the plan, layer by layer", ".json"),
    ] = None,
    batch_size: BatchSizeOption = 8,
    template: TemplateOption = True,
    max_length: MaxLengthOption = None,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Rank sets by the damage that unlearning will do to them, by a few steps on a copy of MODEL.

    A plan tells an order, and no size: it is printed how well such orders agree with the damage.
    """
    import pandas as pd
    from transformers.utils.logging import disable_progress_bar

    from geffect.checkpoints.plan import MEASURED, Probe, plan_of

    check_together(ctx, RULES)
    if output is not None:
        check_output(output, overwrite=overwrite)
    console = terminal(stderr=form is not Format.TABLE)
    disable_progress_bar()
    found = plan_of(
        model,
        paths_by_name("--set", sets, "neighbours=neighbours.jsonl"),
        forget=forget,
        retain=retain,
        objective=objective_of(ctx, objective),
        probe=Probe(lr, probe, tuple(range(seeds)), batch_size),
        base=base,
        device=device,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        show=showing_rows(console),
    )
    try:
        if output is not None:
            write_whole(output, as_json(_facts(found, layers=True), indent=1) + "\n")
    finally:  # what took so long is told, whatever became of the file
        if form is Format.TABLE:
            _show(found, probe, console)
            say(console, MEASURED)
        elif form is Format.JSON:
            write_json({"sets": _facts(found, layers=True), "measured": MEASURED})
        else:
            write_table(pd.DataFrame(_facts(found, layers=False)), form)


def _facts(found: "list[Prediction]", *, layers: bool) -> list[dict[str, Any]]:
    return [
        {
            "set": one.name,
            "predicted": one.predicted,
            "low": one.low,
            "high": one.high,
            "rank": one.rank,
            "reason": one.reason,
            **({"layers": dict(one.layers)} if layers else {}),
        }
        for one in found
    ]


def _show(found: "list[Prediction]", steps: int, console: Any) -> None:
    say(
        console,
        f"Rise of the risks over {steps} steps, to first order, in nats per token, a mean with the "
        "least and the most of all probes; the first set is damaged most:",
    )
    rows = [
        [
            str(one.rank),
            one.name,
            f"{one.predicted:.3g} [{one.low:.3g}, {one.high:.3g}]",
            one.reason,
        ]
        for one in found
    ]
    names = ["set", "reason"]
    show(console, ["rank", "set", "predicted", "reason"], rows, names=names, spare=["reason"])
