"""`geffect demo`: the study, on the embedded model or a pretrained one, with its report."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import Apart, Needs, Rule, check_together
from .fields import texts_given
from .objectives import CATALOGUED, CommandOfObjectives, values_for
from .options import choice, whole
from .studies import draw_paper, run_family, run_study, say_memory
from .terminal import say, terminal

if TYPE_CHECKING:
    from geffect.demo.family_study import FamilyPlan
    from geffect.demo.pretrained import Pretrained

PRETRAINED_METHODS = ("ga",)
"""A run of a pretrained model takes minutes where one of the embedded model takes seconds."""


class DtypeName(StrEnum):
    """What the weights of a pretrained model are kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class DataName(StrEnum):
    """Data that a study is told of by name."""

    edu_relat = "edu_relat"


COMMAND = CommandOfObjectives

RULES: tuple[Rule, ...] = (
    Needs("--layers", "--model"),
    Needs("--lora", "--model"),
    Needs("--load-in-4bit", "--lora"),
    Needs("--device", "--model"),
    Needs("--dtype", "--model"),
    Apart("--layers", "--lora"),
    Apart("--quick", "--model"),
    Apart("--variants", "--all-variants"),
    Apart("--resume", "--overwrite"),
    Apart("--so-far", "--overwrite"),
    Apart("--edits", "--model"),
    Apart("--audit", "--model"),
    Apart("--paper", "--model"),
    Apart("--paper", "--so-far"),
    Needs("--data", "--data-folder"),
    Needs("--data-folder", "--data"),
    *(
        Apart("--data", other)
        for other in (
            "--methods",
            "--quick",
            "--all-variants",
            "--controls",
            "--model",
            "--variants",
            "--edits",
            "--audit",
            "--paper",
            "--so-far",
        )
    ),
)


def command(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for runs, figures and report.")
    ] = Path("runs/demo"),
    seeds: Annotated[
        str, typer.Option(metavar="N,N,...", help="Seeds, with commas between them.")
    ] = "0",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help=f"Some of {CATALOGUED}, with commas between them, or all: every objective in the "
            "variants plain, gru-update, gru-coordinate, select, and every edit; ga, wga, npo, "
            "graddiff, npo+gd if left out, ga of a quick study or a pretrained model.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model and fewer runs.")] = False,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="Every method in every variant.")
    ] = False,
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Every method in these variants alone, such as plain,gru,sago,hamu,gu,repselect.",
        ),
    ] = None,
    edits: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Also edits, such as ssd,negation,newton, as strong as equal forgetting takes; or "
            "all.",
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also with few retain facts, other learning rates, several retain sets.",
        ),
    ] = False,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Also audit each unlearned model: what comes back of what it forgot. Takes as "
            "long again.",
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Also runs of several alpha, beta, layers and regularisers, and the figures of "
            "arXiv 2502.19301 from them, in DIR/paper.",
        ),
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Study this pretrained model: a folder as save_pretrained leaves it, or GGUF.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="N..M", help="Train only these layers of --model, from 0.")
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="RANK", help="Train only adapters of --model."),
    ] = None,
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            "--load-in-4bit", help="Keep the matrices under the adapters of --lora in 4 bits (NF4)."
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where --model lies; the CPU if left out.")
    ] = None,
    dtype: Annotated[
        DtypeName | None,
        choice(
            "--dtype", DtypeName, "What the weights of --model are kept in, float32 if left out"
        ),
    ] = None,
    data: Annotated[
        DataName | None,
        choice("--data", DataName, "Study these data instead of generated ones"),
    ] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of --data, with its JSON files."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            parser=whole(1),
            metavar="N",
            help="Processes. If left out: 2 of one thread each; with --model 1 of all threads.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a study in DIR that was cut short.")
    ] = False,
    so_far: Annotated[
        bool,
        typer.Option("--so-far", help="Run nothing: report what a study in DIR has so far."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the study in DIR, if there is one.")
    ] = False,
) -> None:
    """Teach a language model facts, unlearn a part of them in several ways, and report.

    Nothing is downloaded. DIR then holds a run file for each method and variant, summary.json,
    equal_forgetting.csv, figures, and report.html, which opens offline.
    """
    from geffect.demo.edits import EDITS
    from geffect.demo.methods import (
        METHODS,
        OF_ALL,
        RETAIN_SETS,
        RIVALS,
        VARIANTS,
        every_objective,
    )
    from geffect.demo.plan import QUICK_METHODS, Plan
    from geffect.demo.study import whole

    check_together(ctx, RULES)
    console = terminal()
    if data is not None and data_folder is not None:
        run_family(out, _family_plan(ctx, data_folder, seeds, workers, resume, overwrite), console)
        return
    named = _names(methods)
    in_variants = _names(variants)
    edited = _names(edits)
    if named == ("all",):
        named, in_variants = every_objective(), in_variants or (() if all_variants else OF_ALL)
        edited = edited or (() if model else ("all",))
    if edited == ("all",):
        edited = tuple(EDITS)
    try:
        subject = None
        if model is not None:
            subject = _subject(model, layers, lora, load_in_4bit, device, dtype)
        chosen = named or (PRETRAINED_METHODS if subject else QUICK_METHODS if quick else METHODS)
        processes = workers or (1 if subject else 2)
        plan = Plan(
            seeds=_whole_numbers(seeds),
            methods=chosen,
            options=values_for(ctx, chosen),
            quick=quick,
            all_variants=all_variants,
            controls=controls,
            workers=processes,
            threads=max(1, (os.cpu_count() or 1) // processes) if subject else 1,
            resume=resume,
            overwrite=overwrite,
            so_far=so_far,
            subject=subject,
            variants=subject.paced(VARIANTS) if subject else VARIANTS,
            retain_sets=subject.paced(RETAIN_SETS) if subject else RETAIN_SETS,
            rivals=subject.paced(RIVALS) if subject else RIVALS,
            named=in_variants,
            edits=edited,
            audit=audit,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if subject:
        say_memory(subject, processes, console)
    try:
        run_study(out, plan, console)
        if paper:
            draw_paper(out, plan, console)
    except KeyboardInterrupt:
        done, jobs = whole(out, plan)
        say(
            terminal(stderr=True),
            f"geffect: The study was interrupted. {done} of {jobs} runs are whole in "
            f"`{out}`. The same command with --resume goes on from there.",
        )
        raise typer.Exit(130) from None


def _names(given: str | None) -> tuple[str, ...]:
    return () if given is None else tuple(name.strip() for name in given.split(","))


def _family_plan(
    ctx: typer.Context,
    folder: Path,
    seeds: str,
    workers: int | None,
    resume: bool,
    overwrite: bool,
) -> "FamilyPlan":
    """The plan of a study of the family in a folder; one seed."""
    from geffect.demo.family_study import FamilyPlan

    try:
        if texts_given(ctx):
            raise ValueError(
                "Options of objectives should be given with --methods. Found them with --data, "
                f"which has none: {', '.join(texts_given(ctx))}. Leave them out."
            )
        numbers = _whole_numbers(seeds)
        if len(numbers) > 1:
            raise ValueError(
                f"`--seeds` should be one seed with --data. Found `{seeds}`. Run the command for "
                "each seed, with a folder of its own as --out."
            )
        return FamilyPlan(folder, numbers[0], workers or 2, resume, overwrite)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _subject(
    model: Path,
    layers: str | None,
    lora: int | None,
    in_4bit: bool,
    device: str | None,
    dtype: DtypeName | None,
) -> "Pretrained":
    """The pretrained model that is asked for."""
    from geffect.demo.pretrained import Pretrained, Trained, layers_from
    from geffect.devices import there

    trained = Trained(None if layers is None else layers_from(layers), lora, in_4bit)
    where = str(there(device or "cpu"))
    kept = (dtype or DtypeName.float32).value
    return Pretrained(str(model), trained, device=where, dtype=kept)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"`--seeds` should be whole numbers with commas between them. Found `{text}`. "
            "Pass, say, --seeds 0,1,2."
        ) from error
