"""RepSelect in a single shot: one step up the forget loss, without what it shares with other text.

The public code is filyp/RepSelect, whose single-shot version this is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import get_args

from torch import Tensor, nn

from geffect.batch import Batch
from geffect.layers import trainable
from geffect.numbers import is_number, is_whole
from geffect.projection import Collapse
from geffect.projection.collapse import Basis, Side, Strength
from geffect.risk import as_batches, nll
from geffect.sources import FORGET, RETAIN

from .base import Data, Edit, Outcome
from .importance import check_answered, mean_importance
from .options import check_option, matching
from .task_vector import check_weights


@dataclass(frozen=True)
class RepSelect(Edit):
    """RepSelect: theta + length G' / |G'|, G' the forget gradient, each matrix of it collapsed.

    G is the gradient of the NLL, a mean over batches of token means, of each matrix; G' is G after
    `geffect.projection.Collapse` on the top k singular directions of the gradient of the basis.
    |G'| is over all matrices together. Public code takes the same step again and again, until the
    model is disrupted by a budget: choose `length` by that. The adapters that it may train before,
    so that more is found to be removed, are left out.

    - `k`: how many directions; where it is not given an eighth of the smaller side of each matrix.
    - `side`: "input", "output" or "both".
    - `basis`: whose gradient the directions are of, "forget" or "retain".
    - `strength`: "hard", "soft" or "quadratic".
    - `length`: |D|, in the unit of the parameters; 1 by default.
    - `include`: patterns of the names of parameters, with commas between them; the matrices among
      them change. By default those of MLPs.

    Factors of adapters are refused: merge the adapter first.

    >>> RepSelect(k=8, side="input", basis="retain", strength="hard").sets
    ('forget', 'retain')
    """

    k: int | None = None
    side: Side = "both"
    basis: Basis = "forget"
    strength: Strength = "soft"
    length: float = 1.0
    include: str = "*mlp*"

    def __post_init__(self) -> None:
        if self.k is not None:
            check_option(self, "k", is_whole(self.k, 1), "a whole number from 1 on")
        finite = is_number(self.length) and self.length > 0
        check_option(self, "length", finite, "a positive number")
        check_option(self, "basis", self.basis in get_args(Basis), '"forget" or "retain"')
        self._collapse(self.k or 1)

    @property
    def sets(self) -> tuple[str, ...]:
        return (FORGET,) if self.basis == "forget" else (FORGET, RETAIN)

    @property
    def source(self) -> str:
        return "code filyp/RepSelect"

    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        return self._along(model, self._direction(model, data))

    def varied(self, option: str, model: nn.Module, data: Data) -> Callable[[float], Outcome]:
        if option != "length":
            return super().varied(option, model, data)
        direction = self._direction(model, data)
        return lambda value: self.with_option(option, value)._along(model, direction)

    def _along(self, model: nn.Module, direction: dict[str, Tensor]) -> Outcome:
        parameters = trainable(model)
        values = {
            name: parameters[name].detach().double() + self.length * x
            for name, x in direction.items()
            if x.any()
        }
        lengths = {name: x.norm().item() for name, x in direction.items()}
        return Outcome(values, {"matrices": len(direction), "share_of_length": lengths})

    def _direction(self, model: nn.Module, data: Data) -> dict[str, Tensor]:
        """G' / |G'|."""
        parameters = trainable(model)
        check_weights(parameters, type(self).__name__)
        names = self._matrices(parameters)
        batches = {name: [*as_batches(data[name])] for name in self.sets}
        check_answered(model, batches)
        forget, *others = [_gradient(model, own, names) for own in batches.values()]
        (basis,) = others or (forget,)
        turned = _input_first(model)
        collapsed = {
            name: self._collapsed(forget[name], basis[name], turned=id(parameters[name]) in turned)
            for name in names
        }
        total = sum(x.square().sum().item() for x in collapsed.values()) ** 0.5
        if not 0.0 < total < inf:
            raise ValueError(
                "The forget gradient of RepSelect should leave something when it is collapsed. "
                f"Found a length of {total}. Give other data, or choose fewer directions."
            )
        return {name: x / total for name, x in collapsed.items()}

    def _collapse(self, k: int) -> Collapse:
        return Collapse(k, self.side, self.basis, self.strength)

    def _collapsed(self, gradient: Tensor, basis: Tensor, *, turned: bool) -> Tensor:
        collapse = self._collapse(self.k or max(1, min(gradient.shape) // 8))
        return collapse(gradient.mT, basis.mT).mT if turned else collapse(gradient, basis)

    def _matrices(self, parameters: dict[str, Tensor]) -> list[str]:
        """The names of what changes."""
        included = matching(parameters, self.include)
        for name in included:
            if parameters[name].ndim > 2:
                raise ValueError(
                    "`include` of RepSelect should have patterns of names of matrices. Found "
                    f"`{name}` of shape {tuple(parameters[name].shape)}, as of experts in one "
                    "tensor, of which no matrix is collapsed. Pass patterns that leave it out."
                )
        found = [name for name in included if parameters[name].ndim == 2]
        if not found:
            raise ValueError(
                "`include` of RepSelect should have patterns of names of matrices. Found "
                f"{self.include!r}, which none has, of names such as `{next(iter(parameters))}`. "
                "Pass others."
            )
        return found


def _gradient(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str]
) -> dict[str, Tensor]:
    """The mean gradient of the NLL, in float64."""
    return mean_importance(model, batches, nll, lambda gradient: gradient, names)


def _input_first(model: nn.Module) -> set[int]:
    """The weights, by identity, that are stored with their input side first, as in GPT-2."""
    return {
        id(module.weight)
        for module in model.modules()
        if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor)
    }
