"""A row of the benchmark: a ratio, how well it is known, and the bar it should hold."""

from dataclasses import asdict, dataclass
from typing import Any

from .rounds import Ratio


@dataclass(frozen=True)
class Bar:
    """What a ratio should not exceed, or with `at_least` not fall below."""

    limit: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is on the right side. One that is not a number is on neither."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """A measured quantity beside its bar."""

    quantity: str
    measured: Ratio
    bar: Bar

    @property
    def holds(self) -> bool:
        """Whether the ratio is on the right side of the bar."""
        return self.bar.holds(self.measured.ratio)

    def as_json(self) -> dict[str, Any]:
        """The row as an object of numbers and text."""
        return {
            "quantity": self.quantity,
            **asdict(self.measured),
            "bar": self.bar.limit,
            "at_least": self.bar.at_least,
            "holds": self.holds,
        }
