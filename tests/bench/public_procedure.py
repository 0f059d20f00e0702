"""The whole tool beside the procedure that was published with the G-effect (arXiv 2502.19301).

A model of what that procedure does and of what it keeps, not its code. For every micro-batch: a
forward and a backward for each of three gradients, which go to the host into running averages, and
one more with the loss times zero, for the trainer. Every fourth time, two inner products.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from geffect import Recorder
from geffect.objectives import WeightedGradientAscent, nll

from .bars import Bar, Row
from .capture import weighted
from .memory import peak_gradients
from .rounds import Ratio, ratio
from .workload import Workload

WINDOW = 4
"""Micro-batches from one readout of the averages to the next."""


class PublicProcedure:
    """Running averages 0.6 G + 0.4 g of three gradients, each with passes of its own."""

    def __init__(self, workload: Workload) -> None:
        self._model, self._pair = workload.model, workload.pair
        self._objective = WeightedGradientAscent()
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._count = 0

    def micro_batch(self) -> None:
        """What is done with one batch of either side."""
        self._average("forget", nll(self._model, self._pair["forget"]))
        self._average("objective", self._objective(self._model, self._pair))
        self._average("retain", nll(self._model, self._pair["retain"]))
        self._count += 1
        if self._count % WINDOW == 0:
            self._effect("forget")
            self._effect("retain")
        (nll(self._model, self._pair["forget"]) * 0).backward()
        self._model.zero_grad()

    def _average(self, source: str, loss: Tensor) -> None:
        loss.backward()
        average = self._averages.setdefault(source, {})
        for name, parameter in self._model.named_parameters():
            fresh = parameter.grad.view(-1).to("cpu", copy=True)
            average[name] = 0.6 * average[name] + 0.4 * fresh if name in average else fresh
        self._model.zero_grad()

    def _effect(self, risk: str) -> float:
        device = next(self._model.parameters()).device
        objective, other = self._averages["objective"], self._averages[risk]
        products = [(objective[n].to(device) * other[n].to(device)).sum().item() for n in objective]
        return sum(products)


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """Time of as many micro-batches as lie between two readouts, and gradients alive meanwhile."""
    # Four samples are what the procedure takes at a time; a readout is 32 passes of them.
    micro = workload.resized(samples=4, positions=workload.size.positions // 2)
    with Recorder(micro.model, folder / "tool.h5") as recorder:
        published = PublicProcedure(micro)

        def recorded() -> None:
            recorder.backward(**weighted(micro))
            micro.model.zero_grad()

        seconds = micro.seconds(
            {"published": published.micro_batch, "recorded": recorded}, turns=WINDOW
        )
        yield Row(
            f"whole tool, {micro.size.tokens}: time / public procedure",
            ratio(seconds["recorded"], seconds["published"]),
            Bar(0.7),
        )
        small = workload.minute()
        peak = peak_gradients(small, lambda: recorder.backward(**weighted(small)))
        small.model.zero_grad()
        of_procedure = peak_gradients(small, partial(_window, PublicProcedure(small)))
        yield Row(
            "whole tool: gradients alive / public procedure", Ratio(peak / of_procedure), Bar(0.5)
        )


def _window(published: PublicProcedure) -> None:
    for _ in range(WINDOW):
        published.micro_batch()
