"""The derivative of a function of parameters along one direction."""

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

_log = logging.getLogger(__name__)

Parameters = Mapping[str, Tensor]


def differential(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    """The function at the parameters, and its derivative there: d/de f(theta + e v) at e = 0.

    One evaluation in forward mode. Where an operation has no forward rule, as a fused kernel of
    one's own, a central difference of two more evaluations takes its place and is warned of; its
    error is about the cube root of the squared precision of the parameters.

    >>> value, slope = differential(
    ...     lambda parameters: parameters["x"] ** 2, {"x": torch.tensor(3.0)},
    ...     {"x": torch.tensor(1.0)},
    ... )
    >>> value.item(), slope.item()
    (9.0, 6.0)
    """
    along = {name: tensor.detach().to(at[name].dtype) for name, tensor in along.items()}
    at = {name: tensor.detach() for name, tensor in at.items()}
    # Of the attention kernels of torch only the plain one has a forward rule.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            return _by_forward_mode(function, at, along)
        except NotImplementedError as missing:
            _log.warning(
                "Falling back on a finite difference, which is less accurate: %s",
                str(missing).partition("\n")[0],
            )
            return _by_difference(function, at, along)


def _by_forward_mode(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(tensor, along[name]) for name, tensor in at.items()}
        value, slope = forward_ad.unpack_dual(function(duals))
    return value, torch.zeros_like(value) if slope is None else slope


def _by_difference(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> tuple[Tensor, Tensor]:
    value = function(at)
    length = _norm(along)
    if length == 0:
        return value, torch.zeros_like(value)
    precision = max(torch.finfo(tensor.dtype).eps for tensor in at.values())
    # Where the error of a central difference, step^2, meets that of rounding, precision / step.
    step = precision ** (1 / 3) * (_norm(at) or 1.0) / length
    ahead, behind = (
        function({name: tensor + side * along[name] for name, tensor in at.items()})
        for side in (step, -step)
    )
    return value, (ahead - behind) / (2 * step)


def _norm(tensors: Parameters) -> float:
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors.values()))
