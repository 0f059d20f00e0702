"""`geffect audit`: whether an unlearned model forgot, or only hides it."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geffect.near import meant

from .command import Needs, check_together
from .options import (
    BaseOption,
    DeviceOption,
    ForgetOption,
    OverwriteOption,
    RetainOption,
    TemplateOption,
    TokenizerOption,
    check_output,
    choice,
    number,
    written_to,
)
from .progress import News, Told, shown
from .terminal import say, show, terminal, write

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from geffect.audit import AuditReport

GEOMETRY = "geometry"
BATTERIES = ("memorised", "privacy", "hidden", "utility", GEOMETRY)
MODELS = "A folder of a model or of an adapter, or a GGUF file"
RULES = (Needs("--overwrite", "--output"), Needs("--checkpoints", "--run"))
SHOWN = 6
"""So many attacks are listed, those that bring most back."""


class BudgetName(StrEnum):
    """How far an audit goes."""

    QUICK = "quick"
    FULL = "full"


def batteries_of(text: str) -> tuple[str, ...]:
    """The batteries of an option, with commas between them."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in BATTERIES:
            raise typer.BadParameter(
                f"should be some of {', '.join(BATTERIES)}, with commas between them. Found "
                f"`{name}`.{meant(name, BATTERIES)} Choose from those."
            )
    return names


def models_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, as a trainer names them."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    if not found:
        raise typer.BadParameter(
            "`--checkpoints` should be a folder with checkpoint-1 and further models in it. Found "
            f"none in `{folder}`. Pass the output folder of the training."
        )
    return found


_rate = number("a learning rate between 0 and 1", lambda rate: 0 < rate < 1, "1e-5, say")


def command(
    ctx: typer.Context,
    unlearned: Annotated[Path, typer.Argument(metavar="MODEL", help=f"{MODELS}: what is audited.")],
    original: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The model before unlearning.", show_default=False),
    ],
    forget: ForgetOption,
    retain: RetainOption,
    retrained: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A model that never saw the forget data; several of different seeds, by one "
            "--retrained each, tell how much such models differ. Without it --holdout is needed, "
            "and the best verdict is that these attacks recover nothing.",
            show_default=False,
        ),
    ] = None,
    neighbours: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="What should stay, of the kind of the forget data."),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="Data of that kind that no model has seen."),
    ] = None,
    world: Annotated[
        Path | None, typer.Option(metavar="DATA", help="General knowledge that should stay.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Running text, plain or as JSONL.")
    ] = None,
    batteries: Annotated[
        Any,
        typer.Option(
            parser=batteries_of,
            metavar="NAME,...",
            help=f"What is measured, some of {', '.join(BATTERIES)}; all if left out, "
            f"{GEOMETRY} with --run.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The run file of the unlearning (.h5), with its updates: how far they explain "
            "what is measured.",
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder of checkpoint-1 and further models of that run, for their metrics.",
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also build models of which it is known whether they forgot, and tell how the "
            "audit reads them.",
        ),
    ] = False,
    budget: Annotated[
        BudgetName, choice("--budget", BudgetName, "How far it goes, for a look or a report")
    ] = BudgetName.QUICK,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            parser=_rate,
            metavar="RATE",
            help="That of the unlearning, from which relearning takes its own; one that suits the "
            "size of the weights if left out.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        written_to("The page to write", ".html"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for a script.")
    ] = False,
    overwrite: OverwriteOption = False,
    template: TemplateOption = True,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = None,
) -> None:
    """Audit MODEL: is what should be forgotten gone, or does it come back when it is attacked?

    Exit code 0: never knew, partly forgotten, or not recovered by these attacks; 3: hidden; 4:
    remembers; 5: broken. 1: it could not be done, or nothing can be said; 2: it was asked wrongly.
    """
    if not retrained and holdout is None:
        raise typer.BadParameter(
            "`geffect audit` should be given --retrained or --holdout: without them nothing says "
            "what a model shows that never knew. Found neither. Pass one of them."
        )
    check_together(ctx, RULES)
    if output is not None:
        check_output(output, overwrite=overwrite)
    from transformers.utils.logging import disable_progress_bar

    from geffect.audit.auditing import audit

    disable_progress_bar()
    given = {
        "forget": forget, "retain": retain, "neighbours": neighbours, "holdout": holdout,
        "world": world, "text": text,
    }  # fmt: skip
    console = terminal(stderr=True)
    several = retrained or []
    roles = 2 + len(several) + controls
    with shown(roles, console, "audit") as tell:
        report = audit(
            unlearned,
            original,
            several[0] if len(several) == 1 else several or None,
            sets={name: path for name, path in given.items() if path is not None},
            batteries=batteries,
            budget=budget.value,
            learning_rate=learning_rate,
            template=template,
            base=base,
            tokenizer=tokenizer,
            device=device,
            run=run,
            checkpoints=[] if checkpoints is None else models_in(checkpoints),
            controls=controls,
            report=_telling(tell, roles, lambda time: say(console, f"The audit takes {time}")),
        )
    try:
        if output is not None:
            report.to_html(output)
    finally:  # what took so long is told, whatever became of the page
        if as_json:
            write(report.to_json())
        else:
            _summarise(report, terminal())
    if output is not None and not as_json:
        say(terminal(), f"The page is in {output}")
    raise typer.Exit(code=report.judgement.exit_code)


def _telling(
    tell: Callable[[News], None], roles: int, begin: Callable[[str], None]
) -> Callable[[str, float], None]:
    """What tells how long it will take, and then how far the model is that is looked at now."""
    begun: list[str] = []

    def told(what: str, done: float) -> None:
        role, _, battery = what.partition(": ")
        if begun and begun[-1] != role:
            tell(Told(begun[-1], "audit", 1.0, 1.0, "done"))
        if not battery:
            return
        if not begun:
            begin(battery)
        if not begun or begun[-1] != role:
            begun.append(role)
        share = min(1.0, max(0.0, done * roles - (len(begun) - 1)))
        tell(Told(role, "audit", 1.0, share, battery))

    return told


def _summarise(report: "AuditReport", console: "Console") -> None:
    from geffect.audit.models import UNLEARNED
    from geffect.audit.verdict import DIRECT, RECOVERABLE

    say(console, report.judgement.sentence, *(f"  {flag}" for flag in report.flags))
    own = report.table[report.table["model"] == UNLEARNED]
    shares = own[own["battery"].isin([DIRECT, RECOVERABLE]) & own["value"].notna()]
    if len(shares):
        say(console, "Shares of what the original knows, with intervals of 95 %:")
    for battery, heading in ((DIRECT, "asked directly"), (RECOVERABLE, "attack")):
        most = shares[shares["battery"] == battery].nlargest(SHOWN, "value")
        rows = [
            [row["metric"], *(_told(row[c]) for c in ("value", "low", "high"))]
            for row in most.to_dict("records")
        ]
        if rows:
            show(console, [heading, "share", "low", "high"], rows, names=[heading])
    if report.geometry is not None:
        say(console, "How far the updates of the run explain what was measured, to first order:")
        _show(console, report.geometry.table)
    if report.controls is not None:
        say(console, "How it reads models of which it is known whether they forgot:")
        _show(console, report.controls.drop(columns="says"))
    for what, why in report.manifest["skipped"].items():
        say(console, f"Not measured: {what}. {why}")


def _show(console: "Console", table: "pd.DataFrame") -> None:
    """A table whose words are names and whose numbers have two digits."""
    from pandas.api.types import is_numeric_dtype

    names = [str(c) for c in table if not is_numeric_dtype(table[c])]
    rows = [
        [_told(x) if isinstance(x, float) else str(x) for x in row]
        for row in table.itertuples(index=False)
    ]
    show(console, [*map(str, table.columns)], rows, names=names)


def _told(share: float) -> str:
    """A share; nothing where too few items bound it.

    >>> _told(0.625), _told(-0.004), _told(float("nan"))
    ('0.62', '0.00', '')
    """
    return "" if share != share else f"{round(share, 2) + 0.0:.2f}"
