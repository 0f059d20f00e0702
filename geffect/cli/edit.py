"""`geffect edit`: an edited copy of a checkpoint, and what the edit does to each risk."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geffect.numbers import percent

from .fields import CATALOGUED, CommandOfFields, values_given
from .options import (
    BaseOption,
    BatchSizeOption,
    DeviceOption,
    ForgetOption,
    Format,
    FormatOption,
    MaxLengthOption,
    ModelArgument,
    RetainOption,
    RiskOption,
    TemplateOption,
    TokenizerOption,
    paths_by_name,
    risks_of,
    written_as,
)
from .terminal import say, show, showing_rows, terminal, write_json, write_table

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from geffect.edits import Edit


class CommandOfEdits(CommandOfFields):
    """A subcommand that is told options of edits: `--alpha 5`, `--edit-option alpha=5`."""

    kind = "edit"
    example = "alpha=5"
    metavar = "VALUE"

    @staticmethod
    def spelt() -> str:
        """The names of the catalogue."""
        from geffect.edits import CATALOGUE

        return ", ".join(CATALOGUE)

    @staticmethod
    def having() -> Mapping[str, Mapping[str, Any]]:
        """The options of edits."""
        from geffect.edits import CATALOGUE, options_of

        return {name: options_of(edit) for name, edit in CATALOGUE.items()}


COMMAND = CommandOfEdits


def command(
    ctx: typer.Context,
    model: ModelArgument,
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"The edit: one of {CATALOGUED}.", show_default=False),
    ],
    forget: ForgetOption,
    retain: RetainOption,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The folder to make, of the edited model.",
            show_default=False,
        ),
    ],
    risk: RiskOption = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Another model that the edit is made from, such as tuned=run/checkpoint-9 of a "
            "negation; may be repeated.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=written_as(".h5"),
            help="The run file: .h5; if left out, edit.h5 in the folder of the edited model.",
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Merge adapters, and edit the weights, not their factors."),
    ] = False,
    batch_size: BatchSizeOption = 4,
    template: TemplateOption = True,
    max_length: MaxLengthOption = None,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Edit MODEL into a new folder, without training, and tell what that does to each risk."""
    from transformers.utils.logging import disable_progress_bar

    from geffect.analysis import edited
    from geffect.checkpoints.edited import edit

    console = terminal(stderr=form is not Format.TABLE)
    disable_progress_bar()

    made = edit(
        model,
        output,
        edit_of(ctx, method),
        forget=forget,
        retain=retain,
        risks=risks_of(risk or []),
        states=paths_by_name("--state", state or [], "tuned=run/checkpoint-9"),
        run=run,
        merge=merge,
        base=base,
        device=device,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        batch_size=batch_size,
        show=showing_rows(console),
    )
    table, told = edited(made), made.manifest["edit"]
    if form is Format.TABLE:
        _summarise(table, told, console)
        say(console, f"The edited model in {output}, its run in {made.path}")
    elif form is Format.JSON:
        facts = {"output": str(output), "run": str(made.path), "edit": told}
        write_json({**facts, "effects": table.to_dict("records")})
    else:
        write_table(table, form)


def edit_of(ctx: typer.Context, name: str) -> "Edit":
    """The edit of a name, with the options that were given for it."""
    from geffect.edits import named, options_of

    try:
        return named(name, values_given(ctx, CommandOfEdits, options_of(named(name))))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _summarise(table: "pd.DataFrame", told: Mapping[str, Any], console: "Console") -> None:
    from geffect.analysis.edited import beyond_first_order

    risks = [*table["risk"].cat.categories]
    space = "factors of adapters" if told["space"] == "adapter" else "weights"
    say(console, f"{told['name']} of {space}: predicted falls of the risks, in nats per token")
    rows = []
    for block, own in table.groupby("layer", observed=True):
        falls = dict(zip(own["risk"], own["predicted"], strict=True))
        first = own.iloc[0]
        rows.append(
            [
                str(block),
                *(f"{falls[risk] + 0.0:.4g}" for risk in risks),
                f"{first['length']:.4g}",
                percent(first["touched"], ".3g"),
            ]
        )
    measured = table[table["measured"].notna()].set_index("risk")["measured"]
    rows.append(["measured", *(f"{measured[risk]:.4g}" for risk in risks), "", ""])
    headings = ["layer", *risks, "|D|", "touched"]
    show(console, headings, rows, names=["layer"], spare=["|D|", "touched"])
    say(console, *beyond_first_order(table))
    for name, value in told["facts"].items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{_told(count)} of {part}" for part, count in value.items())
        say(console, f"{name.replace('_', ' ')}: {_told(value)}")


def _told(value: Any) -> str:
    """A fact as it is read: counts in groups of three, other numbers with four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
