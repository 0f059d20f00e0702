"""A run whose rows stay in memory for a while: scores read the same ones again and again."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from numpy.typing import NDArray

from geffect.store import Run


@dataclass(frozen=True, repr=False)
class Held(Run):
    """A run that reads each of its datasets once, until it is told to let go of them."""

    _rows: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = field(
        default_factory=dict, compare=False
    )

    def rows_of(self, names: Sequence[str], entry: tuple[int, ...] = ()) -> list[NDArray[Any]]:
        """Those of several datasets; a copy, which may be changed."""
        missing = [name for name in names if (name, entry) not in self._rows]
        if missing:
            read = super().rows_of(missing, entry)
            self._rows.update(
                ((name, entry), rows) for name, rows in zip(missing, read, strict=True)
            )
        return [self._rows[name, entry].copy() for name in names]

    def let_go(self) -> None:
        """Forget what was read."""
        self._rows.clear()


def held(run: Run) -> Held:
    """The run, as one that holds what it reads.

    >>> held(example_run()).gram().shape
    (1, 1, 3, 3)
    """
    return Held(**{one.name: getattr(run, one.name) for one in fields(Run)})
