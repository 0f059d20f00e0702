"""The leaf identity: what the samples of a batch contribute to a gradient inside one module.

With delta the gradient at the output of a module f(theta, x) that treats the rows of x one by one,
<g_b, v> = <delta_b, d/de f(theta + e v, x_b)>, where g_b is what sample b adds to the gradient of
theta.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .differential import differential, products

# d/de f(theta + e v, x) where that is cheaper than the module in forward mode. By full names:
# a subclass may compute something else, and transformers is not imported here.
_RULES: Mapping[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("torch.nn.modules.linear.Linear", "weight"): lambda x, v: x @ v.T,
    ("torch.nn.modules.linear.Linear", "bias"): lambda x, v: v,
    ("transformers.pytorch_utils.Conv1D", "weight"): lambda x, v: x @ v,
    ("transformers.pytorch_utils.Conv1D", "bias"): lambda x, v: v,
    ("torch.nn.modules.sparse.Embedding", "weight"): lambda x, v: v[x],
}


@dataclass(frozen=True)
class Call:
    """One call of a module, with what it was given."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def effects(self, name: str, v: Tensor, delta: Tensor) -> Tensor:
        """<g_b, v> of every sample b, `Float64[sample]`, for the parameter of this name.

        >>> call = Call(nn.Linear(2, 1), (torch.tensor([[3.0, 4.0], [5.0, 6.0]]),), {})
        >>> call.effects("weight", torch.tensor([[1.0, 0.0]]), delta=torch.ones(2, 1))
        tensor([3., 5.], dtype=torch.float64)
        """
        kind = f"{type(self.module).__module__}.{type(self.module).__qualname__}"
        rule = _RULES.get((kind, name))
        if rule is None:
            return self._differential(name, v, delta)
        if isinstance(self.module, nn.Embedding) and self.module.padding_idx is not None:
            # The gradient leaves the row of the padding index out.
            padding = self._input.eq(self.module.padding_idx)
            delta = delta.masked_fill(padding.unsqueeze(-1), 0.0)
        # Sample by sample: no second output has to be in memory.
        rows = self._input.expand(len(delta), *self._input.shape[1:])
        return torch.stack([_of_sample(rule, x, v, d) for x, d in zip(rows, delta, strict=True)])

    @property
    def _input(self) -> Tensor:
        (x,) = (*self.args, *self.kwargs.values())
        assert isinstance(x, Tensor)
        return x

    def _differential(self, name: str, v: Tensor, delta: Tensor) -> Tensor:
        def effects(parameters: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(
                self.module, dict(parameters), tuple(self.args), dict(self.kwargs)
            )
            return products(delta, output).reshape(len(delta), -1).sum(dim=1)

        return differential(effects, dict(self.module.named_parameters()), {name: v})[1]


def _of_sample(
    rule: Callable[[Tensor, Tensor], Tensor], x: Tensor, v: Tensor, delta: Tensor
) -> Tensor:
    """<delta, d/de f(theta + e v, x)> of one sample, over the positions that the loss depends on.

    Of padding, and in the head of what is not scored, delta is exactly zero.
    """
    if delta.device.type == "cpu":  # where it need not be waited for
        felt = delta.any(dim=-1)
        if not felt.all():
            x, delta = x[felt], delta[felt]
    return products(delta, rule(x, v)).sum()
