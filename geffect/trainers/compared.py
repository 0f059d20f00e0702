"""The model before unlearning, as an UnlearningTrainer compares with it."""

from typing import Any

from torch import nn

from geffect.objectives import FrozenModel, Objective, Reference


class Compared:
    """The reference of an objective in one training, and where it is from.

    It is the one that is given, or a frozen copy of the model where the objective needs one.
    """

    def __init__(self, objective: Objective, model: Any, given: Reference | None) -> None:
        self.reference, self.origin = given, "given"
        self._copied: nn.Module | None = None
        if objective.reference == "none":
            return
        if given is not None:
            objective.compared(given, model)
            return
        made = FrozenModel.copied(model)
        self.reference, self.origin = made, "a frozen copy of the model"
        self._copied = made.model

    def prepare(self, accelerator: Any) -> None:
        """Bring a copy to where, and to the precision that, the model is trained in; once."""
        copied, self._copied = self._copied, None
        if copied is not None:
            accelerator.prepare_model(copied, device_placement=True, evaluation_mode=True)
