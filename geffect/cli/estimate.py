"""`geffect estimate`: what recording and rectifying will take, from a configuration alone."""

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from geffect.numbers import percent, percent_of_two

from .options import FactsFormat, FactsFormatOption, choice, whole
from .terminal import say, terminal, write_json

if TYPE_CHECKING:
    from geffect.costs import Estimate


class ShardingName(StrEnum):
    """How a model is on several processes."""

    none = "none"
    ddp = "ddp"
    fsdp = "fsdp"
    zero3 = "zero3"


class RectifierName(StrEnum):
    """What rectifies a step."""

    gradient = "gradient"
    update = "update"
    coordinate = "coordinate"
    select = "select"
    sago = "sago"


class StoreName(StrEnum):
    """What a recorder keeps."""

    gram = "gram"
    sketch = "sketch"
    int4 = "int4"
    int8 = "int8"
    bf16 = "bf16"
    full = "full"


class DtypeName(StrEnum):
    """What a model is kept in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def command(
    model: Annotated[
        str,
        typer.Option(
            metavar="CONFIG",
            help="A folder with a config.json, that file, or 1b, 7b, 70b, 405b.",
            show_default=False,
        ),
    ],
    gpus: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Processes, with a device each.")
    ] = 1,
    sharding: Annotated[
        ShardingName | None,
        choice(
            "--sharding",
            ShardingName,
            "How the model is on them; none of one, else fsdp if left out",
        ),
    ] = None,
    rectifier: Annotated[
        RectifierName | None,
        choice("--rectifier", RectifierName, "Also rectify, by its space, scope or rule"),
    ] = None,
    store: Annotated[
        StoreName, choice("--store", StoreName, "What is recorded of gradients")
    ] = StoreName.gram,
    no_recorder: Annotated[
        bool, typer.Option("--no-recorder", help="Record nothing: rectify alone.")
    ] = False,
    gradients: Annotated[
        int,
        typer.Option(
            parser=whole(2),
            metavar="N",
            help="2 where the objective is a sum of risks, 3 where it has passes of its own.",
        ),
    ] = 2,
    dtype: Annotated[
        DtypeName, choice("--dtype", DtypeName, "What the model is kept in")
    ] = DtypeName.bfloat16,
    samples: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Samples of a batch of one process.")
    ] = 1,
    positions: Annotated[
        int, typer.Option(parser=whole(2), metavar="N", help="Positions of a sample.")
    ] = 2048,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Layers compute their activations anew in a backward."
        ),
    ] = False,
    form: FactsFormatOption = FactsFormat.TEXT,
) -> None:
    """Tell memory, bytes to disk and network, and extra time of a step, without a model.

    All parameters are trained by AdamW. Nothing is loaded: one pass of two layers is traced on
    tensors without numbers, and the rest is counted.
    """
    from geffect.costs import Shape, estimate

    default = ShardingName.none if gpus == 1 else ShardingName.fsdp
    try:
        found = estimate(
            model,
            gpus=gpus,
            sharding=(sharding or default).value,
            rectifier=None if rectifier is None else rectifier.value,
            store=None if no_recorder else store.value,
            gradients=gradients,
            dtype=dtype.value,
            batch=Shape(samples, positions, checkpointing),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if form is FactsFormat.JSON:
        write_json(found.as_json(), indent=1)
        return
    say(terminal(), *lines(found))


def lines(found: "Estimate") -> Iterator[str]:
    """The estimate as a page of text."""
    of = found.setting
    told = f"{of['parameters'] / 1e9:.3g} G parameters of {of['dtype']}, {of['samples']} x "
    told += f"{of['positions']} tokens a process and side"
    told += ", checkpointing" * of["checkpointing"]
    yield f"{told}, {of['gpus']} processes ({of['sharding']})" if of["gpus"] > 1 else told
    yield f"Memory of a process at the peak of a step: {_bytes(found.peak)}"
    for name, count in found.memory.items():
        if count:
            yield f"  {_bytes(count):>10}  {name}"
    yield f"  {_bytes(found.plain):>10}  in all, without geffect"
    if found.host:
        yield f"  {_bytes(found.host):>10}  of the host, at most: rows that wait for the disk"
    yield f"Disk: {_bytes(found.disk)} a step, of all processes"
    if of["gpus"] > 1:
        yield "Network, sent by a process in a step:"
        yield f"  {_bytes(found.network['passes']):>10}  weights and gradients"
        yield f"  {_bytes(found.network['own']):>10}  inner products and losses"
    yield "Extra time:" if found.time else "Extra time: not measured."
    for share in found.time:
        said = "at least " if share.at_least else ""
        spread = "" if share.at_least else f" (spread {percent(share.spread, '.1f')})"
        why = "by the memory traffic alone" if share.at_least else "measured"
        yield f"  {said}{percent_of_two(share.share)} of the step{spread}, {share.device}, {why};"
        yield f"    {share.workload}"


def _bytes(count: int) -> str:
    """A number of bytes in words.

    >>> _bytes(3 * 2**29), _bytes(700)
    ('1.5 GiB', '700 B')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
