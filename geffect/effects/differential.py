"""The derivative of a function of parameters along one direction."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_log = logging.getLogger(__name__)

Parameters = Mapping[str, Tensor]


def differential(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    """The function at the parameters, and its derivative there: d/de f(theta + e v) at e = 0.

    What `along` does not name stands still, and so does, as in a backward pass, what the function
    computes without gradients. One evaluation in forward mode. Where an operation has no forward
    rule, as a fused kernel of one's own, each number of the function takes a backward pass, which
    is said once: the function should have few.

    >>> value, slope = differential(
    ...     lambda parameters: parameters["x"] ** 2, {"x": torch.tensor(3.0)},
    ...     {"x": torch.tensor(1.0)},
    ... )
    >>> value.item(), slope.item()
    (9.0, 6.0)
    """
    along = {name: tensor.detach().to(at[name].dtype) for name, tensor in along.items()}
    at = {name: tensor.detach() for name, tensor in at.items()}
    try:
        # Of the attention kernels of torch only the plain one has a forward rule.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _AsBackward():
            return _by_forward_mode(function, at, along)
    except NotImplementedError as missing:
        _say(str(missing).partition("\n")[0])
    return _by_backward_passes(function, at, along)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last dimension, in float32 at least, as float64 for their sums."""
    precise = torch.promote_types(a.dtype, torch.float32)
    a, b = (torch.atleast_1d(x).to(precise) for x in (a, b))
    inner: Tensor = torch.linalg.vecdot(a, b)
    return inner.double()


def _by_forward_mode(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(at[name], tensor) for name, tensor in along.items()}
        value, slope = forward_ad.unpack_dual(function({**at, **duals}))
    return value.detach(), torch.zeros_like(value) if slope is None else slope.detach()


def _by_backward_passes(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    leaves = {name: at[name].requires_grad_() for name in along}
    with torch.enable_grad():
        value = function({**at, **leaves})
        numbers = value.flatten().unbind()
    slopes = torch.zeros_like(value, dtype=torch.float64)
    if value.requires_grad:
        for i, number in enumerate(numbers):
            gradient = torch.autograd.grad(
                number, [*leaves.values()], retain_graph=True, allow_unused=True
            )
            slopes.view(-1)[i] = sum(
                products(g.flatten(), along[name].flatten())
                for name, g in zip(leaves, gradient, strict=True)
                if g is not None
            )
    return value.detach(), slopes


class _AsBackward(TorchFunctionMode):
    """Nothing has a slope that has no gradient: forward mode alone would go on there."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with forward_ad._set_fwd_grad_enabled(torch.is_grad_enabled()):
            return (_embedding if func is F.embedding else func)(*args, **(kwargs or {}))


def _embedding(
    tokens: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """An embedding, of which the row of the padding index takes no part in gradients."""
    if scale_grad_by_freq:
        raise NotImplementedError("no forward rule for embeddings with `scale_grad_by_freq`")
    rows = F.embedding(tokens, weight, padding_idx, max_norm, norm_type)
    if padding_idx is None:
        return rows
    padding = tokens.eq(padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, forward_ad.unpack_dual(rows).primal, rows)


@cache
def _say(why: str) -> None:
    """Said once of each reason."""
    _log.warning(
        "One backward pass for each token or sample takes the place of one for all: %s", why
    )
