"""From values to places on an axis, with ticks: the same in a picture and in the browser."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["linear", "log", "symlog"]

DECADES = 6
"""A symmetric-log scale turns linear so many decades below the largest value, at most."""

SMALLEST, LARGEST = 1e-290, 1e300
"""Nearer to zero is zero on a scale, and farther is at its end: so differences are numbers."""

Tick = tuple[float, str]


@dataclass(frozen=True)
class Scale:
    """How values are spread between `low` and `high`.

    - `threshold`: where a "symlog" scale, asinh(v / threshold), turns linear; else 1.

    >>> scale = Scale("symlog", -100.0, 100.0, 0.01)
    >>> scale.place(0.0), scale.place(100.0)
    (0.5, 1.0)
    >>> [label for _, label in scale.ticks()]
    ['-10', '-0.1', '0', '0.1', '10']
    """

    kind: Kind
    low: float
    high: float
    threshold: float = 1.0

    @classmethod
    def symmetric(cls, values: Iterable[float], kind: Kind) -> "Scale":
        """About zero, as far as the values reach; the room of stray near-zeros is bounded.

        >>> Scale.symmetric([3.0, -4.0, float("nan")], "linear")
        Scale(kind='linear', low=-4.0, high=4.0, threshold=1.0)
        """
        sizes = np.abs(_finite(values))
        sizes = sizes[sizes > 0]
        largest = float(sizes.max(initial=0.0)) or 1.0
        if kind != "symlog":
            return cls(kind, -largest, largest)
        top = ceil(log10(largest))
        smallest = float(np.quantile(sizes, 0.05, method="lower")) if sizes.size else largest
        decade = min(max(floor(log10(smallest)), top - DECADES), top - 1)
        return cls(kind, -largest, largest, float(f"1e{decade}"))

    @classmethod
    def signed(cls, values: Iterable[float], kind: Kind) -> "Scale":
        """With zero inside, as far as the values reach on either side of it.

        >>> Scale.signed([1.0, 4.0], "linear")
        Scale(kind='linear', low=-0.2, high=4.2, threshold=1.0)
        """
        known = _finite(values)
        about = cls.symmetric(known, kind)
        low, high = float(known.min(initial=0.0)), float(known.max(initial=0.0))
        if low == high:
            return about
        across = cls(kind, low, high, about.threshold)
        return cls(kind, across.value(-0.05), across.value(1.05), about.threshold)

    @classmethod
    def positive(cls, values: Iterable[float]) -> "Scale":
        """Linear from zero; logarithmic where positive values span two decades or more.

        >>> Scale.positive([0.5, 2.0]).kind, Scale.positive([0.01, 2.0]).kind
        ('linear', 'log')
        """
        known = _finite(values)
        smallest, largest = float(known.min(initial=np.inf)), float(known.max(initial=-np.inf))
        if known.size and 0 < smallest <= largest / 100:
            return cls("log", smallest / 1.2, largest * 1.2)
        return cls.signed(known, "linear")

    def place(self, value: float) -> float:
        """From 0 at `low` to 1 at `high`."""
        return float(self.places(np.array(value)))

    def places(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same of many values."""
        low, high = self._spread(self.low), self._spread(self.high)
        return np.asarray((self._spread(values) - low) / (high - low))

    def value(self, place: float) -> float:
        """The value at a place; the inverse of `place`."""
        low, high = self._spread(self.low), self._spread(self.high)
        at = low + place * (high - low)
        if self.kind == "log":
            return float(10.0**at)
        return float(np.sinh(at) * self.threshold) if self.kind == "symlog" else at

    def ticks(self, most: int = 5) -> list[Tick]:
        """Round values within the scale, as they are written."""
        return [
            (value, f"{value:g}") for value in self._round(most) if self.low <= value <= self.high
        ]

    def _spread(self, value: Any) -> Any:
        if self.kind == "log":
            return np.log10(value)
        return np.arcsinh(value / self.threshold) if self.kind == "symlog" else value

    def _round(self, most: int) -> list[float]:
        if self.kind == "linear":
            return _multiples(self.low, self.high, most)
        if self.kind == "log":
            first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
            if last - first < 1:
                return _multiples(self.low, self.high, most)
            return _powers(first, last, most)
        reach = max(-self.low, self.high)
        last = floor(log10(reach) + 1e-9)
        powers = _powers(min(round(log10(self.threshold)) + 1, last), last, (most + 1) // 2)
        return [*(-power for power in reversed(powers)), 0.0, *powers]

    def told(self) -> dict[str, Any]:
        """What the browser needs of it."""
        return {
            "kind": self.kind, "low": self.low, "high": self.high, "threshold": self.threshold,
            "ticks": self.ticks(),
        }  # fmt: skip


def _finite(values: Iterable[float]) -> NDArray[np.float64]:
    known = np.asarray([*values], dtype=float)
    known = np.clip(known[np.isfinite(known)], -LARGEST, LARGEST)
    return np.where(np.abs(known) < SMALLEST, 0.0, known)


def _powers(first: int, last: int, most: int) -> list[float]:
    stride = max(1, -(-(last - first + 1) // most))
    return [float(f"1e{power}") for power in range(first, last + 1, stride)]


def _multiples(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = floor(log10(rough))
    step = next(m * 10.0**power for m in (1, 2, 5, 10) if m * 10.0**power >= rough * (1 - 1e-9))
    return [float(f"{k * step:.10g}") for k in range(ceil(low / step), floor(high / step) + 1)]
