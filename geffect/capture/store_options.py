"""What a recording keeps beside the Gram matrices, which it always keeps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from geffect.encodings import ENCODINGS
from geffect.layers import Parameter
from geffect.sketch import Sketch

from .schedule import EACH, Schedule


@dataclass(frozen=True)
class StoreOptions:
    """Sketches of the gradients, the gradients themselves, or both.

    - `sketch`: a few thousand numbers a layer and source, from which inner products between steps
      and between runs are estimated, with a stated error. Runs compare if their sketches are equal.
    - `gradients`: the name of an encoding, "full", "bf16", "int8" or "int4", for the parameters
      whose names the regular expression `match` finds, at the steps of the schedule `when`.

    >>> StoreOptions(sketch=Sketch(width=1024))
    StoreOptions(sketch=Sketch(seed=0, width=1024, version=1), gradients=None, match='')
    """

    sketch: Sketch | None = None
    gradients: str | None = None
    match: str = ""
    when: Schedule = field(default=EACH, repr=False)

    def __post_init__(self) -> None:
        if self.gradients is None and self.match:
            raise ValueError(
                "`match` should choose the parameters whose `gradients` are kept. Found "
                f"`match = {self.match!r}` and no `gradients`. Name an encoding, or leave it out."
            )
        if self.gradients is not None and self.gradients not in ENCODINGS:
            raise ValueError(
                f"`gradients` should be one of {', '.join(ENCODINGS)}. "
                f"Found `gradients = {self.gradients!r}`. Choose one of those."
            )

    def indices(self, parameters: Sequence[Parameter]) -> tuple[int, ...]:
        """Which of the parameters the gradients are kept of."""
        found = tuple(i for i, p in enumerate(parameters) if re.search(self.match, p.name))
        if self.gradients and not found:
            raise ValueError(
                f"`match` should find the name of a parameter. Found `match = {self.match!r}` in "
                f"none of {[p.name for p in parameters][:3]} and the others. Pass another pattern, "
                "or none to keep them all."
            )
        return found


STORES = {
    "gram": StoreOptions(),
    "sketch": StoreOptions(sketch=Sketch()),
    **{name: StoreOptions(gradients=name) for name in ENCODINGS},
}
"""What the words of `store=` stand for."""


def kept(store: str | StoreOptions) -> StoreOptions:
    """What `store=` asks for."""
    if isinstance(store, StoreOptions):
        return store
    if store not in STORES:
        raise ValueError(
            f"`store` should be one of {', '.join(STORES)}, or a `StoreOptions`. "
            f"Found `store = {store!r}`. Choose one of those."
        )
    return STORES[store]
