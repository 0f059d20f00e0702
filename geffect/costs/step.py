"""The estimate of a step: memory of a process, bytes to the disk and the network, extra time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from geffect.capture.recording import WAITING_BYTES
from geffect.capture.store_options import StoreOptions, kept
from geffect.distributed.reduction import BUCKET_BYTES
from geffect.layers import Parameter, describe, layers_of
from geffect.numbers import is_whole
from geffect.projection.portions import PORTION_BYTES
from geffect.risk import predicts_next
from geffect.risk.limits import POSITIONS, limit_in
from geffect.sources import RECTIFIED, RETAIN, average_of
from geffect.store.schema import Contents, StoredGradients
from geffect.store.size import projected_bytes

from .measured import Share, share_of
from .sizes import config_of
from .traced import Shape, Traced, on_meta, traced

SHARDINGS = ("none", "ddp", "fsdp", "zero3")
DTYPES = ("float32", "bfloat16")
GRADIENTS = (2, 3)
SOURCES = ("objective", "forget", "retain")

FLOAT = 4
ONE_SAMPLE = Shape()
LIVE_OF_ZERO = 10**9
"""Parameters that DeepSpeed keeps whole at once, at most, where its config says nothing else."""
BUCKET_OF_ZERO = 5 * 10**8
"""Numbers in its bucket of gradients."""


@dataclass(frozen=True)
class Rectifying:
    """What a rectifier needs in a step, beside an average in float32 and a gradient.

    - `changes_gradient`: it writes to `.grad`, so that a recorder keeps a copy of what was there.
    - `keeps_before`: the parameters as they were before the step.
    - `selects`: a mean square and, while coordinates are chosen, two further vectors in float32.
    - `portion`: bytes of the few tensors that are changed at a time.
    - `new`, `rounded`: new tensors in float32 as large as the largest, in any case, and where
      parameters in half precision are rounded.
    """

    changes_gradient: bool = False
    keeps_before: bool = False
    selects: bool = False
    portion: int = 0
    new: int = 0
    rounded: int = 0


RECTIFIERS: Mapping[str, Rectifying] = {
    "gradient": Rectifying(changes_gradient=True, rounded=3),
    "update": Rectifying(keeps_before=True),
    "coordinate": Rectifying(portion=PORTION_BYTES),
    "select": Rectifying(changes_gradient=True, selects=True, rounded=3),
    "sago": Rectifying(changes_gradient=True, new=2),
}


@dataclass(frozen=True)
class Estimate:
    """What a step of unlearning takes, of which no process has seen the model.

    - `setting`: what it is of.
    - `memory`: bytes of a process by what they are for, at the peak of a step.
    - `plain`: bytes of a process at the peak of the same step without geffect.
    - `host`: bytes of rows of gradients that wait for the disk, at most, a process.
    - `disk`: bytes that a step adds to the run, on all processes together.
    - `network`: bytes that a process sends in a step: `passes` for weights and gradients, `own`
      for Gram matrices, losses and sketches.
    - `time`: extra time as a share of the step, measured or at least.
    """

    setting: Mapping[str, Any]
    memory: Mapping[str, int]
    plain: int
    host: int
    disk: int
    network: Mapping[str, int]
    time: tuple[Share, ...]

    @property
    def peak(self) -> int:
        """Bytes of a process at the peak of a step."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        """All of it as numbers and texts."""
        return asdict(self) | {"peak": self.peak}


def estimate(
    model: Any,
    *,
    gpus: int = 1,
    sharding: str = "none",
    rectifier: str | None = None,
    store: str | StoreOptions | None = "gram",
    gradients: int = 2,
    dtype: str = "bfloat16",
    batch: Shape = ONE_SAMPLE,
) -> Estimate:
    """What recording and rectifying a step will take, from the configuration of a model alone.

    All parameters are trained by AdamW. One forward and one backward pass are traced on tensors
    without numbers, two layers of it; what else is held is counted.

    - `model`: a configuration of transformers, a folder or file with one, or "1b", "7b", "70b",
      "405b".
    - `gpus`, `sharding`: processes, and how a model is on them: "none" of one, "ddp", "fsdp"
      (`fully_shard` of every layer and the model) or "zero3" (DeepSpeed's defaults).
    - `rectifier`: "gradient" and "update" space, "coordinate" scope, "select", "sago", or None.
    - `store`: what a recorder keeps, as its own `store`; None where nothing is recorded.
    - `gradients`: 2 where the objective is a sum of risks, 3 where it has passes of its own.
    - `dtype`: of parameters, gradients and, but for "zero3", moments.
    - `batch`: a `Shape`, samples and positions of one process, maybe with activation checkpointing.

    >>> from geffect.costs import Shape
    >>> found = estimate("1b", batch=Shape(1, 128))
    >>> found.memory["weights"], found.network
    (2471628800, {'passes': 0, 'own': 0})
    """
    config = config_of(model)
    _check(gpus, sharding, rectifier, store, gradients, dtype)
    kind: torch.dtype = getattr(torch, dtype)
    _check_positions(config, batch)
    one = traced(config, kind, batch)
    whole = on_meta(config, kind)
    table = describe(whole)
    _check_layers(whole, one)
    keep = None if store is None else kept(store)
    held = _Held(one, gpus, sharding, kind.itemsize)
    passes = gradients if rectifier is None else 2
    setting = {
        "model": str(getattr(config, "model_type", "model")),
        "parameters": sum(p.numel for p in table),
        "gpus": gpus,
        "sharding": sharding,
        "rectifier": rectifier,
        "store": None if store is None else str(store) if isinstance(store, str) else "options",
        "gradients": passes,
        "dtype": dtype,
        "samples": batch.samples,
        "positions": batch.positions,
        "checkpointing": batch.checkpointing,
    }
    rectifying = None if rectifier is None else RECTIFIERS[rectifier]
    sources = SOURCES if rectifying is None else (*SOURCES, average_of(RETAIN))
    if rectifying is not None and rectifying.changes_gradient:
        sources = (*sources, RECTIFIED)
    disk = 0 if keep is None else _disk(table, keep, sources, rectified=rectifier is not None)
    row = int(disk * held.share)
    keeps = keep is not None and keep.gradients is not None
    return Estimate(
        setting,
        held.at_peak(passes, rectifying, records=keep is not None),
        held.plain(passes),
        host=max(row, WAITING_BYTES) if keeps else 0,
        disk=disk,
        network={
            "passes": held.sent(passes, averages=keep is not None or rectifier is not None),
            "own": _own(table, len(sources), keep) if gpus > 1 and keep is not None else 0,
        },
        time=share_of(setting),
    )


@dataclass(frozen=True)
class _Held:
    """What a process holds, in bytes, from a traced pass."""

    pass_: Traced
    gpus: int
    sharding: str
    width: int  # bytes of a number

    @property
    def share(self) -> float:
        """Of the parameters, what a process holds between two passes."""
        return 1 / self.gpus if self.sharding in ("fsdp", "zero3") else 1.0

    @property
    def vector(self) -> int:
        """Bytes of a gradient."""
        return int(self.pass_.parameters * self.share)

    @property
    def average(self) -> int:
        """Bytes of an average, in float32."""
        return self.vector * FLOAT // self.width

    @property
    def fixed(self) -> dict[str, int]:
        """What is there in every phase of a step, with and without geffect."""
        master = self.sharding == "zero3" and self.width < FLOAT
        moments = 3 * self.average if master else 2 * self.vector
        return {"weights": self.vector, "optimizer": moments, "gathered": self.gathered}

    @property
    def gathered(self) -> int:
        """Parameters and gradients that are whole for a moment, and buffers of reductions."""
        of = self.pass_
        if self.sharding == "fsdp":
            # The root, and its gradient; two layers, the gradient of one and what it is sent from.
            return 2 * of.rest + 4 * of.layer
        if self.sharding == "zero3":
            whole = of.parameters // self.width
            return self.width * (min(whole, LIVE_OF_ZERO) + min(whole, BUCKET_OF_ZERO))
        return BUCKET_BYTES if self.sharding == "ddp" else 0

    @property
    def largest(self) -> int:
        """Bytes of what is held of the largest parameter, of which a new tensor is made."""
        return int(self.pass_.largest * self.share)

    def plain(self, passes: int) -> int:
        """The peak without geffect: as many passes, one after the other, into one gradient."""
        first = self.pass_.peak(lambda g: g * self.share)
        further = self.vector + self.pass_.peak(lambda g: 0.0) if passes > 1 else 0
        step = self.vector + self.largest
        return sum(self.fixed.values()) + max(first, further, step)

    def at_peak(
        self, passes: int, rectifying: Rectifying | None, *, records: bool
    ) -> dict[str, int]:
        """The peak with geffect, by what it is for."""
        if rectifying is None and not records:
            held = dict(self.fixed)
            held["gradients and activations"] = self.plain(passes) - sum(held.values())
            return held
        # A gradient that is compared with the others in a backward pass is let go in it.
        streams = rectifying is None and self.sharding in ("none", "fsdp")
        arriving = (lambda g: 0.0) if streams else (lambda g: g * self.share)
        last = (passes - 1) * self.vector + self.pass_.peak(arriving)
        averages = before = 0
        change = self.vector + self.largest  # the optimizer's step
        if rectifying is not None:
            averages = self.average * (1 + rectifying.selects)
            before = self.vector * rectifying.keeps_before
            change = self._change(rectifying, records=records)
        return {
            **self.fixed,
            "averages of the rectifier": averages,
            "parameters before the step": before,
            "gradients and activations": max(last, change),
        }

    def _change(self, rectifying: Rectifying, *, records: bool) -> int:
        """What is there while a gradient or a step is rectified."""
        copies = self.vector * (records and rectifying.changes_gradient)
        masks = 2 * self.average * rectifying.selects
        rounded = rectifying.rounded if self.width < FLOAT else 0
        new = max(rounded, rectifying.new) * (self.largest * FLOAT // self.width)
        return 2 * self.vector + copies + masks + rectifying.portion + new

    def sent(self, passes: int, *, averages: bool) -> int:
        """Bytes of weights and gradients that a process sends in a step, by rings."""
        whole, others = self.pass_.parameters, (self.gpus - 1) / self.gpus
        if self.sharding == "ddp":
            # Each gradient is averaged by itself where they are compared.
            return int(2 * whole * others * (passes if averages else 1))
        return int(3 * whole * others * passes) if self.sharding in ("fsdp", "zero3") else 0


def _disk(
    table: tuple[Parameter, ...], keep: StoreOptions, sources: tuple[str, ...], *, rectified: bool
) -> int:
    """The bytes that a row takes."""
    indices = keep.indices(table) if keep.gradients else ()
    ranges = (tuple((0, table[i].numel) for i in indices),)
    stored = StoredGradients(keep.gradients, indices, ranges, 1) if keep.gradients else None
    contents = Contents(
        sources,
        manifest={},
        blocks=("model",) if rectified else (),
        sketch=keep.sketch,
        gradients=stored,
    )
    few, more = (
        projected_bytes(table, contents, rows, rows if stored else 0) for rows in (1000, 2000)
    )
    return (more - few) // 1000


def _own(table: tuple[Parameter, ...], sources: int, keep: StoreOptions | None) -> int:
    """Bytes of the numbers that are reduced for a row."""
    sketches = (
        0 if keep is None or keep.sketch is None else keep.sketch.width * len(layers_of(table))
    )
    return 2 * 8 * (len(table) * sources**2 + sources * sketches + sources + 3)


def _check_positions(config: Any, batch: Shape) -> None:
    limit = limit_in(config, POSITIONS)
    if limit is not None and batch.positions > limit:
        raise ValueError(
            f"A sample should have at most {limit} positions, as many as the model has. Found "
            f"{batch.positions}. Pass, say, Shape({batch.samples}, {limit})."
        )


def _check_layers(model: nn.Module, one: Traced) -> None:
    """Refuse layers that are not alike, and models that look ahead."""
    predicts_next(model)
    count = sum(p.nbytes for p in model.parameters())
    if count != one.parameters:
        raise ValueError(
            "The layers of the model should be as the second, which is traced for all of them. "
            f"Found {count} bytes of parameters in `{type(model).__name__}`, and "
            f"{one.parameters} if they were. Measure a step of it instead."
        )


def _check(
    gpus: int,
    sharding: str,
    rectifier: str | None,
    store: str | StoreOptions | None,
    gradients: int,
    dtype: str,
) -> None:
    for name, value, known in (
        ("sharding", sharding, SHARDINGS),
        ("rectifier", rectifier, (None, *RECTIFIERS)),
        ("gradients", gradients, GRADIENTS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(
                f"`{name}` should be one of {', '.join(map(str, known))}. Found `{value}`. Choose "
                "one of those."
            )
    if not is_whole(gpus, 1):
        raise ValueError(
            f"`gpus` should be a whole number of at least 1. Found `{gpus}`. Pass, say, gpus=8."
        )
    if (gpus == 1) != (sharding == "none"):
        raise ValueError(
            '`sharding` should be "none" on one process, and say how the model is on several. '
            f'Found `gpus = {gpus}` and `sharding = "{sharding}"`. Pass, say, gpus=8, '
            'sharding="fsdp".'
        )
    encoding = None if store is None else kept(store).gradients
    if sharding in ("fsdp", "zero3") and encoding not in (None, "full", "bf16"):
        raise ValueError(
            '`store` should be "full", "bf16" or a sketch for a sharded model, as its recorder '
            f"takes no others. Found `{encoding}`. Choose one of those."
        )
