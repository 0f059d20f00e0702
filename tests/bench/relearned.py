"""What it costs to take the objective's gradient at a relearned copy, beside the same step."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from geffect import Rectifier, Relearned, relearned
from geffect.objectives import nll

from .bars import Bar, Row
from .capture import functions_of_weighted, stepping_of
from .memory import gradient_bytes, peak_gradients
from .rectification import passes_of
from .rounds import Load, Ratio, ratio
from .workload import Workload

STEPS = (1, 5)
RADIUS = 1e-6
"""In lengths: the model stays what it is, and each step is made."""


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """Passes and time of one step of relearning and of five, and memory."""
    for steps in STEPS:
        yield passes(workload, steps)
    yield time(workload, STEPS[-1])
    yield memory(workload.minute(), STEPS[-1])


def passes(workload: Workload, steps: int) -> Row:
    """Forward and backward passes beyond those of the step, counted."""
    stepping = stepping_of(workload)
    whole, without = (
        passes_of(workload, stepping(at_copy(workload, count))) for count in (steps, 0)
    )
    return Row(
        f"{_named(steps)}: more forward and backward passes / those of relearning",
        Ratio((whole - without) / (2 * steps)),
        Bar(1.0),
    )


def time(workload: Workload, steps: int) -> Row:
    """A step beside one that makes the same passes at theta."""
    stepping = stepping_of(workload)

    def same_passes() -> None:
        for _ in range(steps):
            nll(workload.model, workload.pair["forget"]).backward()
            workload.model.zero_grad()
        at_copy(workload, 0)()

    seconds = workload.seconds(
        {"plain": stepping(same_passes), "at copy": stepping(at_copy(workload, steps))}
    )
    return Row(
        f"{_named(steps)}: step / step and the same passes",
        ratio(seconds["at copy"], seconds["plain"]),
        Bar(1.05),
    )


def memory(workload: Workload, steps: int) -> Row:
    """A copy of the parameters, and the gradient that a pass at theta leaves as well."""

    def load() -> None:
        loss = partial(nll, workload.model, workload.pair["forget"])
        with relearned(workload.model, loss, radius=RADIUS, steps=steps, unit="length"):
            loss().backward()

    peak = peak_gradients(workload, load)
    workload.model.zero_grad()
    return Row(
        f"{_named(steps)}: memory at peak / a copy of the parameters and one gradient",
        Ratio(peak / (2 * gradient_bytes(workload))),
        Bar(1.0),
    )


def _named(steps: int) -> str:
    return f"objective at a relearned copy, {steps} step{'s' if steps > 1 else ''}"


def at_copy(workload: Workload, steps: int) -> Load:
    """The backward passes of a step whose objective relearns so many steps first."""
    way = Relearned(radius=RADIUS, steps=steps, unit="length")
    rectifier = Rectifier(workload.model, rule=None)
    return lambda: rectifier.backward(**functions_of_weighted(workload), relearned=way)
