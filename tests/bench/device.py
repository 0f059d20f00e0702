"""What a step costs at the size of a model that is unlearned, beside what else there is.

`python -m tests.bench --device cuda --size 1b`. Losses are functions. A plain step is the same
forward and backward passes, one after the other, and the optimizer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from geffect import Recorder, Rectifier
from geffect.gradients import differentiate
from geffect.objectives import WeightedGradientAscent, nll
from geffect.projection import SAGO, orthogonal
from geffect.trainers import GEffectCallback

from . import public_procedure
from .bars import Bar, Row
from .capture import stepping_of
from .memory import peak_bytes
from .others import AutogradLoop, PublicGRU, gramian_of_torchjd
from .rectification import ascent, rectify
from .rounds import Load, Ratio, ratio
from .workload import Size, Workload

SMALL = Size(
    hidden=32, layers=2, vocabulary=64, samples=2, positions=16, rounds=3, dtype=torch.bfloat16
)
SIZES: dict[str, Size] = {
    "small": SMALL,
    "34m": Size(rounds=3),
    "361m": replace(
        SMALL, hidden=1024, layers=24, vocabulary=25_600, samples=8, positions=256, rounds=5
    ),
    "1b": replace(
        SMALL, hidden=2048, intermediate=8192, layers=16, vocabulary=128_256, samples=8,
        positions=256, rounds=5, heads=32, groups=8, tied=True,
    ),
}  # fmt: skip
"""The sizes that have a name: one that runs anywhere, and two of models that are unlearned."""

RECTIFIERS: Mapping[str, tuple[Mapping[str, Any], tuple[float, float]]] = {
    "gradient space": ({"rule": orthogonal}, (1.15, 1.12)),
    "update space": ({"rule": orthogonal, "space": "update"}, (1.25, 1.20)),
    "coordinate scope": ({"scope": "coordinate", "space": "update"}, (1.25, 1.20)),
    "SAGO": ({"rule": SAGO(), "ema": 1.0}, (1.25, 1.20)),
    "select": ({"rule": orthogonal, "select": 0.1}, (1.30, 1.25)),
}
"""Options of a rectifier, and the bars of its step at the smaller and the larger size."""

FASTER = Bar(1.0)


@dataclass(frozen=True)
class Bench:
    """A workload of one of the sizes, and where run files go."""

    name: str
    workload: Workload
    folder: Path

    def rows(self) -> Iterator[Row]:
        """The table of bars, and after it what somebody would use instead."""
        yield from self.recorded()
        yield self.on_a_trainer()
        yield from self.rectified()
        yield from self.memory()
        yield from self.instead()

    def recorded(self) -> Iterator[Row]:
        """Recorded steps of two and three gradients, and what may be kept of them."""
        for name, risks, options, bars in (
            ("two gradients", two, {}, (1.08, 1.04)),
            ("three gradients", three, {}, (1.08, 1.04)),
            ("two gradients and the update", two, {"update": True}, (1.15, 1.10)),
            ('two gradients, store="sketch"', two, {"store": "sketch"}, (1.25, 1.15)),
            ('two gradients, store="int4"', two, {"store": "int4"}, (1.25, 1.25)),
        ):
            losses, stepping = risks(self.workload), stepping_of(self.workload)
            path = self.folder / "recorded.h5"
            with Recorder(self.workload.model, path, overwrite=True, **options) as recorder:
                step = stepping(partial(recorder.backward, **losses))
                seconds = self._beside_plain(losses, step)
            yield self._row(f"recorder, {name}", seconds, bars)

    def on_a_trainer(self) -> Row:
        """Steps of a Trainer that are recorded, beside the same passes without the callback."""
        probes = self.workload.pair

        def train(*callbacks: Any) -> None:
            trainer_of(self.workload, self.folder, *callbacks).train()

        def plain() -> None:
            train()
            for _ in range(STEPS):
                for batch in probes.values():
                    nll(self.workload.model, batch).backward()
                    self.workload.model.zero_grad()

        def captured() -> None:
            path = self.folder / "trainer.h5"
            train(GEffectCallback(path, probes=probes, update=False, log=False, overwrite=True))

        seconds = self.workload.seconds({"plain": plain, "ours": captured})
        return self._row("callback on a Trainer", seconds, (1.10, 1.05), to="its own passes")

    def rectified(self) -> Iterator[Row]:
        """Rectified steps."""
        for name, (options, bars) in RECTIFIERS.items():
            optimizer = self.workload.optimizer()
            rectifier = Rectifier(self.workload.model, optimizer=optimizer, **options)
            losses = two(self.workload)

            def step(
                rectifier: Rectifier = rectifier,
                optimizer: torch.optim.Optimizer = optimizer,
                losses: Mapping[str, Any] = losses,
            ) -> None:
                rectifier.backward(**losses)
                optimizer.step()
                optimizer.zero_grad()

            seconds = self._beside_plain(losses, step)
            rectifier.detach()
            yield self._row(f"rectifier, {name}", seconds, bars)

    def memory(self) -> Iterator[Row]:
        """All memory at peak, beside that of the plain passes and of the gradients compared."""
        gradients = sum(p.numel() * p.element_size() for p in self.workload.parameters)
        for count, risks in ((2, two), (3, three)):
            losses = risks(self.workload)
            plain = self._peak(partial(passes, losses))
            with Recorder(self.workload.model, self.folder / f"memory of {count}.h5") as recorder:
                ours = self._peak(partial(recorder.backward, **losses))
            words = "two" if count == 2 else "three"
            yield Row(
                f"{words} losses: memory at peak / plain passes and the gradients compared",
                Ratio(ours / (plain + (count - 1) * gradients)),
                Bar(1.02),
            )

    def instead(self) -> Iterator[Row]:
        """What somebody would use instead, in the same run."""
        workload = self.workload
        gradients = differentiate(workload.parameters, ascent(workload))
        ours = partial(rectify, Rectifier(workload.model, orthogonal), gradients)
        for dtype in (torch.float64, torch.float32):
            public = partial(PublicGRU(dtype).rectify, gradients)
            seconds = workload.seconds({"ours": ours, "public": public})
            yield Row(
                f"rectification / public GRU procedure, {str(dtype).removeprefix('torch.')}",
                ratio(seconds["ours"], seconds["public"]),
                FASTER,
            )
        del gradients, ours, public
        workload.model.zero_grad()
        losses, stepping = two(workload), stepping_of(workload)
        loop = AutogradLoop(workload.parameters, {n: losses[n] for n in ("forget", "retain")})
        with Recorder(workload.model, self.folder / "beside a loop.h5") as recorder:
            backward = partial(recorder.backward, **losses)
            seconds = workload.seconds(
                {"ours": stepping(backward), "loop": stepping(loop.backward)}
            )
            yield Row(
                "recorded step, two gradients / torch.autograd.grad and torch.dot",
                ratio(seconds["ours"], seconds["loop"]),
                FASTER,
            )
        few = replace(workload, size=replace(workload.size, rounds=2))
        yield from public_procedure.rows(few, self.folder)
        with Recorder(workload.model, self.folder / "beside torchjd.h5") as recorder:
            ours = cleared(workload, partial(recorder.backward, **losses))
            seconds = workload.seconds({"ours": ours, "jd": gramian_of_torchjd(workload)})
        yield Row(
            "two gradients recorded / Gramian of torchjd's engine",
            ratio(seconds["ours"], seconds["jd"]),
            FASTER,
        )

    def _beside_plain(self, losses: Mapping[str, Any], step: Load) -> dict[str, list[float]]:
        plain = stepping_of(self.workload)(partial(passes, losses))
        return self.workload.seconds({"plain": plain, "ours": step})

    def _row(
        self,
        name: str,
        seconds: Mapping[str, list[float]],
        bars: tuple[float, float],
        *,
        to: str = "plain step",
    ) -> Row:
        bar = bars[1 if self.name == "1b" else 0]
        return Row(f"{name} / {to}", ratio(seconds["ours"], seconds["plain"]), Bar(bar))

    def _peak(self, load: Load) -> int:
        if self.workload.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            load()
            found = torch.cuda.max_memory_allocated()
        else:
            found = peak_bytes(load)
        self.workload.model.zero_grad()
        return found


def two(workload: Workload) -> dict[str, Any]:
    """Gradient ascent beside data to retain: two functions."""
    risks = {side: partial(nll, workload.model, workload.pair[side]) for side in workload.pair}
    return {"objective": {"forget": -1.0}, **risks}


def three(workload: Workload) -> dict[str, Any]:
    """The same with an objective that has a forward and a backward pass of its own."""
    objective = partial(WeightedGradientAscent(), workload.model, workload.pair)
    return two(workload) | {"objective": objective}


def passes(losses: Mapping[str, Callable[[], Tensor] | Mapping[str, float]]) -> None:
    """A forward and a backward pass of each function."""
    for loss in losses.values():
        if callable(loss):
            loss().backward()


def cleared(workload: Workload, load: Load) -> Load:
    """The load without a step, on empty gradients."""

    def run() -> None:
        load()
        workload.model.zero_grad()

    return run


STEPS = 3
"""Of a training, each time."""


def trainer_of(workload: Workload, folder: Path, *callbacks: Any) -> Trainer:
    """A Trainer that takes some steps on the forget side."""
    batch = workload.pair["forget"]
    data = [
        {name: column[i].cpu() for name, column in batch.items()}
        for i in range(len(batch["labels"]))
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=len(data),
        learning_rate=1e-7,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=workload.device == "cpu",
        optim="adamw_torch_fused" if workload.device == "cuda" else "adamw_torch",
    )
    return Trainer(workload.model, arguments, train_dataset=data, callbacks=list(callbacks))
