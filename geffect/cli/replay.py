"""`geffect replay`: the G-effects of checkpoints that already exist."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geffect.numbers import counted

from .command import Apart, Needs, check_together
from .objectives import CATALOGUED, CommandOfObjectives, objective_of
from .options import (
    DATA_FORMS,
    BaseOption,
    BatchSizeOption,
    DeviceOption,
    Format,
    FormatOption,
    MaxLengthOption,
    OverwriteOption,
    RetainOption,
    RiskOption,
    TemplateOption,
    TokenizerOption,
    check_output,
    choice,
    number,
    risks_of,
    whole,
    written_to,
)
from .terminal import say, show, showing_rows, terminal, write_json, write_table

if TYPE_CHECKING:
    from rich.console import Console

    from geffect import Relearned, Run


COMMAND = CommandOfObjectives

RULES = (
    Apart("--reference-ema", "--estimator"),
    Apart("--reference-ema", "--seed"),
    Needs("--relearned-steps", "--relearned-radius"),
    Needs("--relearned-unit", "--relearned-radius"),
)


class EstimatorName(StrEnum):
    """The estimators by their name on the command line."""

    SPLIT_BATCH = "split_batch"
    SAME_BATCH = "same_batch"
    FULL = "full"


class UnitName(StrEnum):
    """What a radius of relearning is measured in, by its name on the command line."""

    THETA = "theta"
    LENGTH = "length"
    LOSS = "loss"


class StoreName(StrEnum):
    """What may be kept of the gradients, by its name on the command line."""

    GRAM = "gram"
    SKETCH = "sketch"
    FULL = "full"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


def command(
    ctx: typer.Context,
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
        str,
        typer.Option(
            metavar="NAME",
            help=f"What unlearning minimised: one of {CATALOGUED}.",
            show_default=False,
        ),
    ],
    forget: Annotated[
        Path,
        typer.Option(
            metavar="DATA",
            help=f"{DATA_FORMS} Objectives of two "
            "answers, such as dpo, take the other one from alternate.",
            show_default=False,
        ),
    ],
    retain: RetainOption,
    output: Annotated[
        Path,
        written_to("The run file", ".h5"),
    ],
    risk: RiskOption = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The model before unlearning, for the objectives that compare with it; if left "
            "out, the one that adapters are for, else the first checkpoint.",
        ),
    ] = None,
    estimator: Annotated[
        EstimatorName | None,
        choice(
            "--estimator",
            EstimatorName,
            "Both factors of an inner product on disjoint batches (without bias; if left out), on "
            "the same batch, or on all of the data",
            "NAME",
        ),
    ] = None,
    reference_ema: Annotated[
        bool,
        typer.Option(
            "--reference-ema",
            help="Mix batches by running averages, as the paper's public code does, in the order "
            "of the files.",
        ),
    ] = False,
    relearned_radius: Annotated[
        float | None,
        typer.Option(
            parser=number("a number from 0", lambda value: 0 <= value < inf, "0.006"),
            metavar="RADIUS",
            help="Take the gradient of the objective where each checkpoint has relearned the "
            "forget set: so far away, in units of --relearned-unit.",
        ),
    ] = None,
    relearned_steps: Annotated[
        int, typer.Option(parser=whole(0), metavar="N", help="The steps of relearning.")
    ] = 5,
    relearned_unit: Annotated[
        UnitName,
        choice(
            "--relearned-unit",
            UnitName,
            "A share of the norm of all trained parameters, a length of theirs, or the share of "
            "the loss that should be gone",
            "NAME",
        ),
    ] = UnitName.THETA,
    batch_size: BatchSizeOption = 4,
    seed: Annotated[
        int, typer.Option(parser=whole(), metavar="N", help="Of the order of the examples.")
    ] = 0,
    template: TemplateOption = True,
    max_length: MaxLengthOption = None,
    store: Annotated[
        StoreName,
        choice("--store", StoreName, "What is kept beside the Gram matrices", "NAME"),
    ] = StoreName.GRAM,
    update: Annotated[
        bool, typer.Option("--update", help="Record the way to the next checkpoint, too.")
    ] = False,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Compute the G-effects of CHECKPOINTs, one step of a run file each. Nothing is trained."""
    import pandas as pd
    from transformers.utils.logging import disable_progress_bar

    from geffect.checkpoints import estimators
    from geffect.checkpoints.replay import replay

    from .progress import Told, shown

    check_together(ctx, RULES)
    check_output(output, overwrite=overwrite)
    name = estimator or EstimatorName.SPLIT_BATCH
    named_risks = risks_of(risk or [])
    relearned = _relearned(relearned_radius, relearned_steps, relearned_unit)
    # What a script reads is all that stands on the standard output.
    console = terminal(stderr=form is not Format.TABLE)
    disable_progress_bar()  # there is one of our own
    with shown(len(checkpoints), console, "replay") as take:

        def report(checkpoint: str, done: int, total: int) -> None:
            says = f"batch {done} of {total}"
            take(Told(checkpoint, "replay", 1.0, done / total, says))
            if done == total:
                take(Told(checkpoint, "replay", 1.0, 1.0, "done"))

        run = replay(
            checkpoints,
            output,
            objective=objective_of(ctx, objective),
            forget=forget,
            retain=retain,
            risks=named_risks,
            estimator=(
                estimators.reference_ema if reference_ema else getattr(estimators, name.value)
            ),
            reference=reference,
            base=base,
            device=device,
            relearned=relearned,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            batch_size=batch_size,
            seed=None if reference_ema else seed,
            update=update,
            store=store.value,
            overwrite=overwrite,
            report=report,
            show=showing_rows(console),
        )
    facts = _facts(run, output)
    if form is Format.TABLE:
        _summarise(facts, console)
    elif form is Format.JSON:
        write_json(facts)
    else:
        write_table(pd.DataFrame(facts["effects"]), form)


def _relearned(radius: float | None, steps: int, unit: UnitName) -> "Relearned | None":
    """Where the gradient of the objective is taken, if not at the checkpoints themselves."""
    from geffect import Relearned

    if radius is None:
        return None
    try:
        return Relearned(radius=radius, steps=steps, unit=unit.value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _facts(run: "Run", output: Path) -> dict[str, Any]:
    """What the summary says, for a script to read."""
    from geffect.analysis import g_effect, intervals
    from geffect.store.schema import RELEARNED

    how = {
        **run.manifest["replay"],
        "objective": run.manifest["objective"],
        RELEARNED: run.manifest.get(RELEARNED),
    }
    table = intervals(g_effect, run, by="model").astype(object)
    table = table.where(table.notna(), None)
    named = run.metadata["checkpoints"]
    return {
        "output": str(output),
        "how": how,
        "unit": "nats per unit learning rate",
        "effects": [
            {"checkpoint": named[str(row["step"])], **row}
            for row in table.drop(columns="model").to_dict("records")
        ],
    }


def _summarise(facts: Mapping[str, Any], console: "Console") -> None:
    how, effects = facts["how"], facts["effects"]
    certain = any(effect["low"] is not None for effect in effects)
    title = f"G-effects by {how['estimator']}{' (biased)' if how['biased'] else ''}"
    if certain:
        title += ", with 95 % intervals over batches"
    say(console, f"{title}, in {facts['unit']}")
    by_step: dict[int, dict[str, Mapping[str, Any]]] = {}
    for effect in effects:
        by_step.setdefault(effect["step"], {})[effect["effect"]] = effect
    rows = []
    for step, of_step in by_step.items():
        both = [of_step[name] for name in ("unlearning", "retaining")]
        names = (str(step), both[0]["checkpoint"], str(both[0]["rows"]))
        rows.append([*names, *map(_with_interval, both)])
    headings = ["step", "checkpoint", "rows", "unlearning e_u", "retaining e_r"]
    show(console, headings, rows, names=["checkpoint"], spare=["rows", "checkpoint"])
    for line in _told(how, certain):
        say(console, line)
    count = f"{len(by_step)} checkpoint{'s' if len(by_step) > 1 else ''}"
    say(console, f"{count} in {facts['output']}")


def _told(how: Mapping[str, Any], certain: bool) -> Iterator[str]:
    """What has to be known of the numbers in the table."""
    used, there = how["batches_used"], how["batches"]
    counts = [f"{used[name]} of {count} of {name}" for name, count in there.items()]
    yield f"Batches used: {', '.join(counts)}."
    if how["biased"]:
        yield "Biased by the variance of a batch; no interval tells of that."
    if not certain:
        yield "No intervals: fewer than 8 rows. More examples, or smaller batches, make more rows."
    if (copy := how["relearned"]) is not None:
        way = f"{counted(copy['steps'], 'step')}, {copy['radius']:g} of {copy['unit']}"
        yield f"Objective at a copy that has relearned {copy['relearns']}: {way}."
    if how["objective"]["reference"] is not None:
        yield f"Reference model: {how['objective']['reference']['is']}."


def _with_interval(effect: Mapping[str, Any]) -> str:
    value = "-" if effect["value"] is None else f"{effect['value']:.4g}"
    return value if effect["low"] is None else f"{value} {_interval(effect)}"


def _interval(effect: Mapping[str, Any]) -> str:
    return f"[{effect['low']:.3g}, {effect['high']:.3g}]"
