"""What a step moves between a GPU and its memory beyond the plain step, pass by pass.

In numbers of float32 for each parameter: what is read and what is written. `test_traffic` counts
what the kernels of a step are given, and holds this list to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """A walk over all parameters."""

    words: str
    read: float
    written: float = 0.0


@dataclass(frozen=True)
class Step:
    """The passes of a step, and the fewest numbers that it could be taken with.

    The floor is what is left where nothing is read twice but what has to be: a pass ends where a
    number of all coordinates is needed before the next can begin.
    """

    passes: Sequence[Pass]
    floor: float

    @property
    def read(self) -> float:
        """Numbers read for each parameter."""
        return sum(p.read for p in self.passes)

    @property
    def written(self) -> float:
        """Numbers written for each parameter."""
        return sum(p.written for p in self.passes)


PEAK = Pass("is the retain gradient r finite", 1)
PEAKS = Pass("are both gradients finite", 2)
AVERAGE = Pass("average of r", 2, 1)
COPY = Pass("copy of the parameters", 1, 1)

STEPS: Mapping[str, Step] = {
    "recorder, two gradients": Step([Pass("products", 2)], 2),
    "rectifier, gradient space": Step(
        [PEAK, AVERAGE, Pass("products", 2), Pass("correction", 2, 1)], 7
    ),
    "rectifier, update space": Step(
        [PEAK, AVERAGE, COPY, Pass("products", 3), Pass("correction", 2, 1)], 10
    ),
    "rectifier, coordinate scope": Step(
        [PEAKS, AVERAGE, COPY, Pass("products", 3), Pass("correction", 3, 1)], 8
    ),
    "rectifier, SAGO": Step([PEAKS, AVERAGE, Pass("products", 2), Pass("correction", 2, 1)], 3),
    "rectifier, select": Step(
        [
            PEAK,
            AVERAGE,
            Pass("squares of r", 3, 2),
            Pass("mask, twice", 4, 0.5),
            Pass("products", 2.25),
            Pass("correction", 2.25, 1),
        ],
        12,
    ),
}
"""The steps in float32."""


def table() -> str:
    """The list as a table of Markdown."""
    lines = [
        "| beyond the plain step, float32 | passes: numbers read + written | in all | floor |",
        "|---|---|---:|---:|",
    ]
    for name, step in STEPS.items():
        passes = "; ".join(f"{p.words} {p.read:g} + {p.written:g}" for p in step.passes)
        lines.append(f"| {name} | {passes} | {step.read + step.written:g} | {step.floor:g} |")
    return "\n".join(lines)
