"""A run whose rows stay in memory for a while: scores read the same ones again and again."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from numpy.typing import NDArray

from geffect.store import Run

Made = TypeVar("Made")


@dataclass(frozen=True, repr=False)
class Held(Run):
    """A run that reads each of its datasets once, until it is told to let go of them.

    What it says is not copied, and nobody can change it.
    """

    _rows: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = field(
        default_factory=dict, init=False, compare=False
    )
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False)

    def rows_of(self, names: Sequence[str], entry: tuple[int, ...] = ()) -> list[NDArray[Any]]:
        """Those of several datasets."""
        missing = [name for name in names if (name, entry) not in self._rows]
        if missing:
            for name, rows in zip(missing, super().rows_of(missing, entry), strict=True):
                rows.setflags(write=False)
                self._rows[name, entry] = rows
        return [self._rows[name, entry] for name in names]

    def once(self, of: Hashable, make: Callable[[], Made]) -> Made:
        """What is made of these rows, made once."""
        if of not in self._made:
            self._made[of] = make()
        found: Made = self._made[of]
        return found

    def let_go(self) -> None:
        """Forget what was read, and what was made of it."""
        self._rows.clear()
        self._made.clear()


def held(run: Run) -> Held:
    """The run, as one that holds what it reads.

    >>> held(example_run()).gram().shape
    (1, 1, 3, 3)
    """
    return Held(**{one.name: getattr(run, one.name) for one in fields(Run)})
