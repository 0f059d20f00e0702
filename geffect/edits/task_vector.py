"""Negation of a task vector: away from where training on the forget data leads.

"Editing Models with Task Arithmetic" (ICLR 2023, arXiv 2212.04089).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geffect.layers import trainable
from geffect.numbers import is_number
from geffect.places import is_adapter

from .base import Data, Edit, Outcome, state_of
from .options import check_option


@dataclass(frozen=True)
class TaskVectorNegation(Edit):
    """Task-vector negation: theta - alpha tau, with tau = theta_tuned - theta.

    `tuned` is the model after training on what is to be forgotten, given in the data of the edit.
    The model that is edited is the one before that training.

    - `alpha`: how far, in lengths of tau; 1 by default. 0 changes nothing.

    Tensors of adapters are refused: of the factors of LoRA the product is the weight, and the
    difference of factors is no task vector. Merge both models first.

    >>> before, tuned = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(before.weight, 1.0), nn.init.constant_(tuned.weight, 1.5)
    >>> TaskVectorNegation(alpha=2.0).displacement(before, {"tuned": tuned})
    {'weight': tensor([[-1.]])}
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_option(self, "alpha", is_number(self.alpha), "a finite number")

    @property
    def states(self) -> tuple[str, ...]:
        return ("tuned",)

    @property
    def source(self) -> str:
        return "arXiv 2212.04089"

    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        parameters = trainable(model)
        check_weights(parameters, type(self).__name__)
        tuned = state_of("tuned", data["tuned"], model)
        # Of what does not move every bit stays, the sign of a zero among them.
        values = {
            name: negated(parameter.detach(), tuned[name], self.alpha)
            for name, parameter in parameters.items()
            if self.alpha and not torch.equal(parameter, tuned[name])
        }
        return Outcome(values)


def check_weights(parameters: Mapping[str, Tensor], owner: str) -> None:
    """Refuse the tensors of adapters, from which the weights are made, as products of factors."""
    own = next(filter(is_adapter, parameters), None)
    if own is not None:
        raise ValueError(
            f"{owner} should be of weights. Found `{own}`, of an adapter, from which the weights "
            "are made. Merge the adapter into its model first, by "
            "`merge_and_unload()`; on the command line with --merge."
        )


def negated(theta: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """theta - alpha tau in the type of theta; what tau leaves alone keeps its bits."""
    exact = theta.double()
    tau = tuned.double() - exact
    return torch.where(tau == 0, theta, (exact - alpha * tau).to(theta.dtype))
