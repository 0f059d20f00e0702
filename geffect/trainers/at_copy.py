"""The gradient of a Trainer's objective, taken at a relearned copy."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from transformers import Trainer

from geffect import distributed
from geffect.batch import ORIGINAL
from geffect.forwards import AT_COPY
from geffect.gradients import AtCopy, reduced
from geffect.layers import trainable
from geffect.losses import Elsewhere, Loss, loss_scale, of_objective, plan
from geffect.objectives import Component, Objective, kept_losses
from geffect.relearning import Relearned, check_can_relearn, tell_unbounded
from geffect.risk import nll
from geffect.sources import FORGET
from geffect.store.schema import RELEARNED

Autocast = Callable[[], AbstractContextManager[Any]]


def check_trained(relearned: Relearned | None, model: nn.Module) -> None:
    """Refuse a model whose parameters cannot move, before the first step."""
    if relearned is not None:
        check_can_relearn(model)


def told(trainer: Trainer) -> dict[str, Any]:
    """What a run file says of where a Trainer takes the gradient of its objective."""
    steps = vars(trainer).get("_rectified")
    relearned = getattr(trainer if steps is None else steps, "relearned", None)
    return {RELEARNED: dict(relearned.options)} if isinstance(relearned, Relearned) else {}


def with_parts(
    relearned: Relearned | None, objective: Objective, parts: Mapping[str, Component]
) -> Relearned | None:
    """The same where the parts of an objective that are of data to keep stay at theta."""
    if relearned is None:
        return None
    if objective.unbounded and not any(part.weight < 0 for part in parts.values()):
        tell_unbounded(type(objective).__name__)  # ascent on a risk is told of by its weight
    return relearned.keeping(kept_losses(objective, parts))


@dataclass(frozen=True)
class OfBatch:
    """A `Relearned` for one micro-batch, whose forget risk it relearns if it has no loss."""

    relearned: Relearned
    risk: Callable[[], Tensor] | None

    @property
    def options(self) -> Mapping[str, object]:
        """What a run file says of it."""
        return self.relearned.options

    def elsewhere(
        self, model: nn.Module, losses: Mapping[str, Loss], scaler: GradScaler | None
    ) -> Elsewhere:
        """The place for one step of these losses."""
        own = {} if self.risk is None else {FORGET: self.risk}
        return self.relearned.elsewhere(model, {**losses, **own}, scaler)


def of_batch(
    relearned: Relearned | None, model: nn.Module, batch: Mapping[str, Any], autocast: Autocast
) -> OfBatch | None:
    """With what is relearned: a loss of its own, or the risk on the forget side of a batch."""
    if relearned is None:
        return None
    if relearned.loss is not None:
        return OfBatch(relearned, None)
    forget = batch.get(FORGET)
    if isinstance(forget, Mapping) and ORIGINAL in forget:
        forget = forget[ORIGINAL]
    if not (isinstance(forget, Mapping) and "labels" in forget):
        raise ValueError(
            "`relearned` should know what is relearned where batches have no forget side with "
            f"labels. Found {', '.join(map(str, batch)) or 'nothing'}. Pass "
            "Relearned(loss=lambda: ...)."
        )
    rows = forget

    def risk() -> Tensor:
        with distributed.unsynchronised(model), autocast():
            return nll(model, rows)

    return OfBatch(relearned, risk)


def backward_at_copy(
    model: nn.Module,
    relearned: AtCopy,
    losses: Mapping[str, Loss],
    scaler: GradScaler | None,
) -> None:
    """Add the gradient of the objective to `.grad`, as a recorder would that looks at nothing."""
    parameters = [*trainable(model).values()]
    passes = plan(
        parameters,
        of_objective(losses),
        scale=loss_scale(scaler, parameters[0].device),
        model=model,
        elsewhere=relearned.elsewhere(model, losses, scaler),
    )
    reduced(model, parameters, passes).deposit()


def is_at_copy() -> bool:
    """Whether a loss is asked at a relearned copy."""
    return AT_COPY.get() is not None
