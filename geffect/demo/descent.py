"""An objective that is minimised on a model of the study, step by step into a run file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from geffect import Recorder, Relearned
from geffect.batch import Pair
from geffect.layers import trainable
from geffect.objectives import (
    FrozenModel,
    Objective,
    SharedForward,
    kept_losses,
    named,
    step_losses,
)
from geffect.risk import nll

from .methods import Variant


@dataclass(frozen=True)
class Descent:
    """The objective as it has begun on the model, what it refers to, and who steps what."""

    model: PreTrainedModel
    objective: Objective
    original: FrozenModel | None
    variant: Variant
    trained: list[Tensor]
    optimizer: torch.optim.Optimizer

    @classmethod
    def begun(
        cls,
        model: PreTrainedModel,
        method: str,
        options: Iterable[tuple[str, float]],
        variant: Variant,
        learning_rate: float,
    ) -> "Descent":
        """An objective by its name, with the optimizer of a variant for what is then trained."""
        objective = named(method, dict(options)).begin(model)
        original = None if objective.reference == "none" else FrozenModel.copied(model)
        trained = list(trainable(model).values())
        optimizer = variant.stepping(trained, learning_rate)
        return cls(model, objective, original, variant, trained, optimizer)

    def note(self, recorder: Recorder) -> None:
        """Tell a file what is minimised."""
        recorder.note_objective(
            self.objective, reference="a frozen copy of the model" if self.original else None
        )

    def step(
        self,
        recorder: Recorder,
        batch: Pair,
        *,
        risks: Mapping[str, Any] | None = None,
        rectifier: Any = None,
        place: Relearned | None = None,
    ) -> None:
        """Record the gradients on a batch and take the step.

        - `risks`: the batches whose risks are recorded; by default those of the step.
        - `place`: where the gradient of the objective is taken, if not at the model.
        """
        shared = SharedForward(self.model)
        reference = self.original and FrozenModel(SharedForward(self.original.model))
        parts = self.objective.components(shared, batch, reference)
        losses: dict[str, Any] = self.variant.objective(step_losses(parts, apart=len(parts) > 1))
        # In the order of the sets, so that all runs have their sources in one order.
        beside: dict[str, Any] = {
            name: losses.pop(name) if name in losses else partial(nll, shared, own)
            for name, own in (batch if risks is None else risks).items()
        }
        recorder.backward(
            **losses,
            **beside,
            rectifier=rectifier,
            weights=partial(self.objective.implicit_weights, shared, batch, reference),
            relearned=place and place.keeping(kept_losses(self.objective, parts)),
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.advance()
