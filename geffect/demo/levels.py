"""The levels that a run has to reach, where runs are compared, and how it comes along."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

APPRECIABLE = 0.01
"""Of the level: a loss that rises by less stands still."""

Values = Mapping[str, float]
"""What is measured after a step, by the names of levels and maybe of more."""


@dataclass
class Rising:
    """Whether a loss of a run still rises towards its level."""

    level: float
    mark: float
    patience: int
    highest: float
    since: int = 0  # steps after the mark was set

    def goes_on(self, loss: float) -> bool:
        """Told of the loss after each step: whether it has risen appreciably of late."""
        self.highest = max(self.highest, loss)
        self.since += 1
        if loss >= self.mark + APPRECIABLE * self.level:
            self.mark, self.since = loss, 0
        return self.since < self.patience


class Levels:
    """The levels of one run, and those that it has reached.

    A forget NLL and that of the values rise to theirs, an extraction strength falls.
    """

    def __init__(self, levels: Values, start: Values, patience: int) -> None:
        self._levels = levels
        self._left = set(levels)
        self._rising = {
            name: Rising(levels[name], start[name], patience, highest=start[name])
            for name in ("forget_nll", "value_nll")
            if name in levels
        }

    @property
    def are_reached(self) -> bool:
        """Whether none is left."""
        return not self._left

    @property
    def highest_forget_nll(self) -> float:
        """The highest forget NLL so far."""
        return self._rising["forget_nll"].highest

    def reached(self, before: Values, after: Values) -> Iterator[tuple[str, float]]:
        """Those that a step reaches first, each with the share of the step that it took."""
        for name, level in self._levels.items():
            sign = -1 if name == "forget_es" else 1
            crosses = sign * before[name] < sign * level <= sign * after[name]
            if crosses and name in self._left:
                self._left.remove(name)
                yield name, (level - before[name]) / (after[name] - before[name])

    def are_out_of_reach(self, after: Values) -> bool:
        """Told of the values after each step: whether what is left to reach comes no nearer."""
        stand = {name for name, loss in self._rising.items() if not loss.goes_on(after[name])}
        hopeless = stand & self._left
        return "forget_nll" in hopeless or hopeless == self._left == {"value_nll"}
