"""The gradient of an objective where a checkpoint has relearned, once for all of its batches."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from geffect.devices import swap
from geffect.forwards import AT_COPY
from geffect.layers import trainable
from geffect.objectives import Objective
from geffect.relearning import Relearned, check_relearned, tell_unbounded
from geffect.sources import OBJECTIVE

RELEARNS = "the forget set"
"""What a run file says that a checkpoint relearns."""


def check_replayed(way: Relearned | None, objective: Objective) -> None:
    """Refuse a relearned copy that no replay can make; warn of an objective without a bound."""
    check_relearned(way)
    if way is None:
        return
    if way.loss is not None:
        raise ValueError(
            "`relearned` of a replay should have no `loss`: each checkpoint relearns the whole "
            "forget set. Found one. Leave it out."
        )
    ascends = any(
        weight < 0 and side not in objective.keeps
        for side, weight in (objective.risks or {}).items()
    )
    if objective.unbounded or ascends:
        tell_unbounded(repr(objective))


def told(way: Relearned, objective: Objective, sets: Collection[str]) -> Mapping[str, Any]:
    """What a run file says of the copy that each of its checkpoints had."""
    kept = [name if name in sets else f"{OBJECTIVE}.{name}" for name in sorted(objective.keeps)]
    return {**way.keeping(kept).options, "relearns": RELEARNS}


def copy_of(
    model: nn.Module, loss: Callable[[], Tensor], way: Relearned
) -> Callable[[], AbstractContextManager[None]]:
    """Blocks at the place where the model has relearned: it is found now, for all of them.

    Inside of each the parameters are there; behind it they have every bit of before. Memory: a copy
    of the trained parameters, on the device of the way.
    """
    parameters = [*trainable(model).values()]
    with way.block(model, loss):
        other = [p.detach().to(way.device or p.device, copy=True) for p in parameters]

    @contextmanager
    def block() -> Iterator[None]:
        before = AT_COPY.get()
        swap(parameters, other)
        AT_COPY.set(object())
        try:
            yield
        finally:
            AT_COPY.set(before)
            swap(parameters, other)

    return block
