"""Kinds of options: one of some names, a whole number, a format."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from geffect.drafts import check_writable, is_stream
from geffect.near import meant
from geffect.sources import FORGET, RETAIN, check_risks


def choice(option: str, names: type[StrEnum], says: str, metavar: str = "NAME") -> OptionInfo:
    """An option that takes one of some names, which its help lists."""

    def parsed(text: str) -> StrEnum:
        if text in [*names]:
            return names(text)
        raise typer.BadParameter(
            f"should be one of {', '.join(names)}. Found `{text}`.{meant(text, names)} Choose one "
            "of those."
        )

    info: OptionInfo = typer.Option(
        option,
        parser=parsed,
        autocompletion=lambda: [*names],
        metavar=metavar,
        help=f"{says}: {', '.join(names)}.",
    )
    return info


def whole(least: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers, of at least `least`."""
    kind = "a whole number" if least is None else f"a whole number of at least {least}"

    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or (least is not None and number < least):
            raise typer.BadParameter(f"should be {kind}. Found `{text}`. Pass, say, {least or 0}.")
        return number

    return parsed


def number(kind: str, fits: Callable[[float], bool], example: str) -> Callable[[str], float]:
    """A parser of numbers of a kind; `fits` is never true of NaN."""

    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not fits(value):
            raise typer.BadParameter(f"should be {kind}. Found `{text}`. Pass {example}.")
        return value

    return parsed


def written_as(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """A check of a path that is to be written: an existing folder, and a kind that can be."""

    def check(path: Path | None) -> Path | None:
        if path is None:
            return None
        if path.suffix not in suffixes:
            raise typer.BadParameter(
                f"should end in {', '.join(suffixes)}. Found `{path}`. Choose one of those."
            )
        if path.is_dir():
            raise typer.BadParameter(
                f"should be a file. Found the folder `{path}`. Choose another name."
            )
        if not path.parent.is_dir():
            raise typer.BadParameter(
                f"should be in a folder that exists. Found no folder `{path.parent}`. Create it."
            )
        return path

    return check


def written_to(says: str, *suffixes: str) -> OptionInfo:
    """The option of the file that a subcommand writes; its help lists the kinds."""
    info: OptionInfo = typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        callback=written_as(*suffixes),
        help=f"{says}: {', '.join(suffixes)}.",
        show_default=False,
    )
    return info


class Format(StrEnum):
    """How a table is printed."""

    TABLE = "table"
    TSV = "tsv"
    CSV = "csv"
    JSON = "json"


class FactsFormat(StrEnum):
    """How facts are printed."""

    TEXT = "text"
    JSON = "json"


class Medium(StrEnum):
    """What a picture is made for."""

    COLUMN = "column"
    PAGE = "page"
    SLIDE = "slide"


FormatOption = Annotated[
    Format,
    choice("--format", Format, "How the table is printed, for you or for a script", "FORMAT"),
]
FactsFormatOption = Annotated[
    FactsFormat,
    choice("--format", FactsFormat, "How it is printed, for you or for a script", "FORMAT"),
]

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file if it exists.")
]

DATA_FORMS = (
    "JSONL with question and answer or messages (through the chat template), prompt and completion "
    "or text (plain); or a folder that `datasets` saved."
)
"""The data files that are read, for help texts."""

RiskOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=DATA", help="A further risk; may be repeated.", show_default=False),
]

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="The folder of a model with safetensors, or of a LoRA adapter.",
        show_default=False,
    ),
]
ForgetOption = Annotated[Path, typer.Option(metavar="DATA", help=DATA_FORMS, show_default=False)]
RetainOption = Annotated[
    Path, typer.Option(metavar="DATA", help="As --forget: what should stay.", show_default=False)
]
BatchSizeOption = Annotated[
    int, typer.Option(parser=whole(1), metavar="N", help="Examples a batch, at most.")
]
TemplateOption = Annotated[
    bool, typer.Option("--template/--no-template", help="Whether to use the chat template.")
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(parser=whole(1), metavar="N", help="Cut rows off after so many tokens."),
]
BaseOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The model that adapters are for, where it has moved."),
]
TokenizerOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A tokenizer, where the model has none.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; cuda if left out and there."),
]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to write where a file is that nobody said is to be replaced, or where none can be."""
    if output.exists() and not (overwrite or is_stream(output)):
        raise FileExistsError(
            f"The output should not exist yet. Found `{output}`. Choose another name, or replace "
            "it with --overwrite."
        )
    check_writable(output)


def risks_of(given: Iterable[str]) -> dict[str, Path]:
    """The further risks of `--risk NAME=DATA`, by name."""
    risks = paths_by_name("--risk", given, "facts=facts.jsonl")
    try:
        check_risks("--risk", risks, taken=(FORGET, RETAIN))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return risks


def paths_by_name(option: str, given: Iterable[str], example: str) -> dict[str, Path]:
    """The paths of an option that takes NAME=PATH and may be repeated."""
    paths: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(
                f"`{option}` should be a name and its data. Found `{text}`. Pass, say, "
                f"{option} {example}."
            )
        if name in paths:
            raise typer.BadParameter(
                f"`{option}` should be given once for each name. Found `{name}` twice. Choose "
                "another name."
            )
        paths[name] = Path(path)
    return paths
