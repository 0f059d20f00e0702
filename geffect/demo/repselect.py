"""RepSelect's single shot as a run of the study: one collapsed gradient is that of every step."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from geffect import Rectifier
from geffect.gradients import Gradients, Rectification, Vector
from geffect.layers import trainable
from geffect.projection import Collapse
from geffect.sources import OBJECTIVE, RETAIN

MATRICES = r"\bmlp\b"
"""The names of what is changed: the projections of MLPs; all else stays as it is."""


class SingleShot:
    """The gradient of the first step, collapsed once and taken again at every step.

    It is brought to length 1 over all its matrices together, so that the learning rate of plain
    gradient descent is the length of a step. The retain gradients are watched, as by a rectifier
    without a rule. Without the adapters that the public code may train before.
    """

    changes_gradient = True

    def __init__(self, model: nn.Module, collapse: Collapse, ema: float) -> None:
        self._watching = Rectifier(model, None, ema=ema)
        self._collapse = collapse
        self._names = list(trainable(model))
        self._kept: Sequence[Tensor | None] | None = None
        self.blocks = self._watching.blocks
        self.options: Mapping[str, object] = {
            **self._watching.options,
            "collapse": repr(collapse),
            "matrices": MATRICES,
        }

    @property
    def watched(self) -> Mapping[str, Vector]:
        """The running averages of the retain gradients."""
        return self._watching.watched

    @property
    def report(self) -> Rectification | None:
        """What the step was, beside the retain gradients, before it was exchanged."""
        return self._watching.report

    def observe(self, gradients: Gradients) -> None:
        """Take note of the retain gradients."""
        self._watching.observe(gradients)

    def rectify(self, gradients: Gradients, *, copy: bool = False) -> None:
        """Leave the one gradient in `.grad`."""
        if self._kept is None:
            self._kept = self._collapsed(gradients)
        self._watching.rectify(gradients, copy=copy)
        for parameter, kept in zip(gradients.parameters, self._kept, strict=True):
            parameter.grad = None if kept is None else kept.clone()

    def detach(self) -> None:
        """Nothing is attached to an optimizer."""
        self._watching.detach()

    def _collapsed(self, gradients: Gradients) -> Sequence[Tensor | None]:
        own = gradients.of(OBJECTIVE)
        basis = own if self._collapse.source == "forget" else gradients.of(RETAIN)
        found = [
            self._collapse(g, b)
            if g is not None and b is not None and g.ndim == 2 and re.search(MATRICES, name)
            else None
            for name, g, b in zip(self._names, own, basis, strict=True)
        ]
        length = sum(float(x.double().norm()) ** 2 for x in found if x is not None) ** 0.5
        if length == 0.0:
            raise ValueError(
                f"The gradient to collapse should have matrices named like `{MATRICES}`, and not "
                f"be zero in all of them. Found {len(found)} tensors without. Take another model, "
                "or fewer directions."
            )
        return [None if x is None else x / length for x in found]
