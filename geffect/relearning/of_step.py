"""Where a step takes the gradient of its objective, if not at the parameters as they are."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect.losses import Elsewhere, Loss, check_function
from geffect.sources import FORGET, OBJECTIVE, RETAIN

from .at_copy import Copy, relearned
from .way import Way

UNBOUNDED = (
    "An objective that is taken at a relearned copy should saturate where a token is forgotten. "
    "Found {found}, of which single tokens carry the mean. On the embedded model, with selective "
    "steps and one step of relearning, recognition after the attack was .81 and extraction "
    "strength .33 with GA, .85 and .29 with NPO, which left a loss of .230 on world facts (.045 "
    "with WGA). Choose, say, WGA or TNPO."
)
"""What is told of an objective without a bound."""


@dataclass(frozen=True, kw_only=True)
class Relearned(Way):
    """How far parameters relearn: `steps` steps of gradient descent, each of a chosen length.

    - `radius`: the length of all steps together, in units of `unit`. 0 is no step.
    - `steps`: how many; each is a forward and a backward pass. 0 is none.
    - `unit`: "theta", the Euclidean norm of all trained parameters together; "length", 1; or
      "loss", by effect: the share of the loss that should be gone, 0.5 for half. Each step then
      has the length at which the loss, to first order, falls by its part of that, and no more than
      1/steps of the norm of theta.

    As an argument of `UnlearningTrainer`, `rectify` and `backward` of a recorder or rectifier, it
    says where the gradient of the objective is taken in each step, and also:

    - `loss`: a function that returns what is relearned, as the loss of all facts to forget; if left
      out, the loss that is named `forget` of the step, or the risk on its forget batch.
    - `stays`: of an objective that is a sum, the terms that are taken at theta, by the names of
      their losses. A trainer adds the parts of its objective that are not of forget data.
    - `device`: where the copy of the trained parameters lies meanwhile, such as "cpu"; beside them
      if left out.

    No radius is right for all models: see the page on rectifying.

    >>> Relearned(radius=0.006)
    Relearned(radius=0.006, steps=5, unit='theta')
    """

    loss: Callable[[], Tensor] | None = field(default=None, repr=False)
    stays: tuple[str, ...] = field(default=(RETAIN,), repr=False)

    @property
    def options(self) -> Mapping[str, object]:
        """What a run file says of it."""
        return {
            "source": OBJECTIVE,
            "radius": self.radius,
            "unit": self.unit,
            "steps": self.steps,
            "relearns": FORGET if self.loss is None else "a loss of its own",
            "stays": list(self.stays),
        }

    def keeping(self, names: Iterable[str]) -> "Relearned":
        """The same, where the losses of these names stay at theta too."""
        return replace(self, stays=tuple(dict.fromkeys((*self.stays, *names))))

    def elsewhere(
        self, model: nn.Module, losses: Mapping[str, Loss], scaler: GradScaler | None
    ) -> Elsewhere:
        """The place where a step of these losses takes the gradient of its objective."""
        loss = losses.get(FORGET) if self.loss is None else self.loss
        if loss is None or isinstance(loss, Mapping):
            raise ValueError(
                "`relearned` should know what is relearned. Found no loss named `forget` that is a "
                "function. Pass forget=lambda: ..., or Relearned(loss=lambda: ...)."
            )
        if isinstance(loss, Tensor):
            raise ValueError(
                "What is relearned should be a function, which each step of relearning asks. "
                "Found a tensor as the loss `forget`. Pass lambda: ... with the forward inside."
            )
        objective = losses.get(OBJECTIVE)
        if isinstance(objective, Mapping):
            rising = [n for n, w in objective.items() if w < 0 and n not in self.stays]
            if rising:
                tell_unbounded(f"ascent on `{rising[0]}`")
        return Elsewhere(lambda: self.block(model, loss, scaler), self.stays)

    def block(
        self, model: nn.Module, loss: Callable[[], Tensor], scaler: GradScaler | None = None
    ) -> AbstractContextManager[Copy]:
        """A block inside of which the model has relearned so far by the loss."""
        return relearned(
            model,
            loss,
            radius=self.radius,
            steps=self.steps,
            unit=self.unit,
            scaler=scaler,
            device=self.device,
        )

    def __post_init__(self) -> None:
        if self.loss is not None:
            check_function("`loss`", self.loss)
        super().__post_init__()


def check_relearned(relearned: object) -> None:
    """Refuse what says of no copy where it is."""
    if not isinstance(relearned, Relearned | None):
        raise TypeError(
            f"`relearned` should be a geffect.Relearned. Found `{type(relearned).__name__}`. Pass, "
            "say, Relearned(radius=0.006)."
        )


def tell_unbounded(found: str) -> None:
    """Warn of an objective without a bound, once at each place that asks for it."""
    warnings.warn(UNBOUNDED.format(found=found), stacklevel=4)
