"""What changes a gradient on its way to the optimizer, as far as a recorder has to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.amp.grad_scaler import GradScaler

from geffect.losses import Elsewhere, Loss

from .of_step import Gradients
from .vectors import Vector


class GradientTransform(Protocol):
    """What may change a gradient on its way to the optimizer, as far as a recorder has to know."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """What the report has a number for."""

    @property
    def watched(self) -> Mapping[str, Vector]:
        """Gradients of its own that belong into the record, such as a running average."""

    @property
    def changes_gradient(self) -> bool:
        """Whether it changes `.grad`, and not the optimizer's own step, or nothing."""

    @property
    def report(self) -> "Rectification | None":
        """What it did in the step that has just been taken."""

    @property
    def options(self) -> Mapping[str, object]:
        """How it was set up, for the record."""

    def observe(self, gradients: Gradients) -> None:
        """Take note of the gradients of a step, before anything is changed."""

    def rectify(self, gradients: Gradients, *, copy: bool = False) -> None:
        """Leave the objective's gradient in `.grad`, changed, or prepare to change the step.

        With `copy` the tensors of `gradients` stay as they are.
        """


class AtCopy(Protocol):
    """Where the objective's gradient is taken, if not at the parameters as they are.

    As far as a recorder and a rectifier have to know of `geffect.Relearned`.
    """

    @property
    def options(self) -> Mapping[str, object]:
        """What it is, for the record."""

    def elsewhere(
        self, model: nn.Module, losses: Mapping[str, Loss], scaler: GradScaler | None
    ) -> Elsewhere:
        """The place for one step of these losses."""


@dataclass(frozen=True)
class Rectification:
    """What a rectifier did in one step, one number a block.

    `inner` and `norm` are <u, r> and |u| of what was rectified before and after, `retain_norm` is
    |r|, and `coefficient` the weight that r got: NaN where no multiple of r was added. `applied` is
    <step, r> of the step that the optimizer took, theta before minus theta after, against the
    average and against the retain gradient of this step: NaN where it was not followed. A negative
    inner product harms what should stay. `unmet` is 1 where the rule could not keep what it
    promises. Against several retain sets there is a number for each block and set.

    Of a selection that tells what it keeps, such as SSU's mask: how many coordinates it is `among`,
    how many are `selected`, how many of these the mask of the step before had, `selected_again`,
    and how many are in either mask; else NaN.
    """

    blocks: tuple[str, ...]
    fired: tuple[float, ...]
    coefficient: tuple[float, ...]
    inner_before: tuple[float, ...]
    inner_after: tuple[float, ...]
    norm_before: tuple[float, ...]
    norm_after: tuple[float, ...]
    retain_norm: tuple[float, ...]
    applied_average: tuple[float, ...]
    applied_fresh: tuple[float, ...]
    unmet: tuple[float, ...]
    among: tuple[float, ...]
    selected: tuple[float, ...]
    selected_again: tuple[float, ...]
    selected_either: tuple[float, ...]
