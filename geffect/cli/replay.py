"""`geffect replay`: the G-effects of checkpoints that already exist."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .selection import written_as

if TYPE_CHECKING:
    from geffect import Run
    from geffect.objectives import Objective


class ObjectiveName(StrEnum):
    """The objectives by their name on the command line."""

    GA = "ga"
    WGA = "wga"
    NPO = "npo"
    TNPO = "tnpo"
    WTNPO = "wtnpo"
    GRADDIFF = "graddiff"
    NPO_GD = "npo+gd"


class EstimatorName(StrEnum):
    """The estimators by their name on the command line."""

    SPLIT_BATCH = "split_batch"
    SAME_BATCH = "same_batch"
    FULL = "full"


def command(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT",
            help="Folders of models with safetensors, or of LoRA adapters, such as "
            "run/checkpoint-*.",
            show_default=False,
        ),
    ],
    objective: Annotated[
        ObjectiveName, typer.Option(help="What unlearning minimised.", show_default=False)
    ],
    forget: Annotated[
        Path,
        typer.Option(
            metavar="DATA",
            help="JSONL with question and answer, prompt and completion, messages, or text; or a "
            "folder that `datasets` saved.",
            show_default=False,
        ),
    ],
    retain: Annotated[Path, typer.Option(metavar="DATA", help="Likewise.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            callback=written_as(".h5"),
            help="The run file: .h5.",
            show_default=False,
        ),
    ],
    risk: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DATA", help="A further risk; may be repeated.", show_default=False
        ),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of npo, tnpo, wtnpo, npo+gd.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of wga, wtnpo.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of the retain loss in graddiff, npo+gd.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The model before unlearning, for the objectives that compare with it; the first "
            "checkpoint if left out.",
        ),
    ] = None,
    estimator: Annotated[
        EstimatorName | None,
        typer.Option(
            help="Both factors of an inner product on disjoint batches (without bias), on the same "
            "batch, or on all of the data. The first if left out.",
            show_default=False,
        ),
    ] = None,
    reference_ema: Annotated[
        bool,
        typer.Option(
            "--reference-ema",
            help="The running averages of the paper's public code instead, in the order of the "
            "files.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    update: Annotated[
        bool, typer.Option("--update", help="Record the way to the next checkpoint, too.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The model that adapters are for, where it has moved."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A tokenizer, where the checkpoints have none."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; cuda if left out and there.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
) -> None:
    """Compute the G-effects of CHECKPOINTs, one step of a run file each. Nothing is trained."""
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from geffect.capture import estimators
    from geffect.capture.replay import replay
    from geffect.demo.workers import Progress

    from .progress import shown

    if reference_ema and estimator is not None:
        raise typer.BadParameter(
            "`--reference-ema` should be without `--estimator`. Found both. Choose one of them."
        )
    name = estimator or EstimatorName.SPLIT_BATCH
    minimised = _objective(objective, beta=beta, alpha=alpha, weight=weight)
    named_risks = _risks(risk or [])
    console = Console()
    disable_progress_bar()  # there is one of our own
    with shown(len(checkpoints), console) as take:

        def report(checkpoint: str, done: int, total: int) -> None:
            says = f"batch {done} of {total}"
            take(Progress(checkpoint, "replay", 1.0, done / total, says))
            if done == total:
                take(Progress(checkpoint, "replay", 1.0, 1.0, "done"))

        run = replay(
            checkpoints,
            output,
            objective=minimised,
            forget=forget,
            retain=retain,
            risks=named_risks,
            reference=reference,
            estimator=(
                estimators.reference_ema if reference_ema else getattr(estimators, name.value)
            ),
            batch_size=batch_size,
            seed=None if reference_ema else seed,
            update=update,
            base=base,
            tokenizer=tokenizer,
            device=device,
            overwrite=overwrite,
            report=report,
        )
    _summarise(run, output, console, told_reference=reference is not None)


def _objective(name: ObjectiveName, **given: float | None) -> "Objective | Mapping[str, float]":
    """The objective of a name, with the numbers that were given for it."""
    from geffect.objectives import NPO, TNPO, WTNPO, GradDiff, WeightedGradientAscent

    # Combinations of the risks are declared as such: they cost no backward pass.
    made: dict[ObjectiveName, Callable[..., Any]] = {
        ObjectiveName.GA: lambda: {"forget": -1.0},
        ObjectiveName.WGA: WeightedGradientAscent,
        ObjectiveName.NPO: NPO,
        ObjectiveName.TNPO: TNPO,
        ObjectiveName.WTNPO: WTNPO,
        ObjectiveName.GRADDIFF: lambda weight=1.0: {"forget": -1.0, "retain": weight},
        ObjectiveName.NPO_GD: lambda weight=1.0, **beta: GradDiff(NPO(**beta), weight),
    }
    options = {option: value for option, value in given.items() if value is not None}
    try:
        objective: Objective | Mapping[str, float] = made[name](**options)
    except TypeError as error:
        raise typer.BadParameter(
            f"`--objective {name}` should be with numbers of its own. Found "
            f"{', '.join(f'`--{option}`' for option in options)}. Leave out what it does not have."
        ) from error
    return objective


def _risks(given: list[str]) -> dict[str, Path]:
    risks = {}
    for text in given:
        name, equals, data = text.partition("=")
        if not (name and equals and data):
            raise typer.BadParameter(
                f"`--risk` should be a name and its data. Found `{text}`. Pass, say, "
                "--risk facts=facts.jsonl."
            )
        risks[name] = Path(data)
    return risks


def _summarise(run: "Run", output: Path, console: Any, *, told_reference: bool) -> None:
    from rich.table import Table

    from geffect.analysis import g_effect, intervals

    how = run.manifest["replay"]
    shown = Table(
        title=f"G-effects by {how['estimator']}, with 95 % intervals over batches",
        title_justify="left",
    )
    for column in ("step", "checkpoint", "unlearning e_u", "retaining e_r"):
        shown.add_column(column, justify="left" if column == "checkpoint" else "right")
    table = intervals(g_effect, run, by="model").set_index(["step", "effect"])
    for step in run.steps:
        effects = [table.loc[(step, effect)] for effect in ("unlearning", "retaining")]
        shown.add_row(
            str(step), run.metadata["checkpoints"][str(step)], *map(_with_interval, effects)
        )
    console.print(shown)
    if how["reference"] is not None:
        which = "" if told_reference else ", the first checkpoint"
        console.print(f"Reference model: {how['reference']}{which}.", highlight=False)
    console.print(f"{len(run.steps)} checkpoints in {output}", highlight=False, soft_wrap=True)


def _with_interval(row: Any) -> str:
    if row["low"] != row["low"]:
        return f"{row['value']:.4g}"
    return f"{row['value']:.4g} [{row['low']:.3g}, {row['high']:.3g}]".replace("[", r"\[")
