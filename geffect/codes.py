"""Codes: weights that are held in another form than as numbers, as in a quantised model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of weights that may be trained or rounded."""


def holds_codes(tensor: Tensor) -> bool:
    """Whether a tensor is packed by its class, whatever the type of what it is packed into.

    Those of bitsandbytes have a `quant_state`, and may lie in memory as bfloat16.

    >>> holds_codes(torch.ones(2))
    False
    """
    shards = hasattr(tensor, "placements")  # a DTensor, which holds numbers
    return hasattr(tensor, "quant_state") or (hasattr(tensor, "__tensor_flatten__") and not shards)


def keep_differentiable(model: nn.Module) -> None:
    """Let no forward pack codes for inference.

    In eval mode, on a CPU that multiplies in bfloat16 (AVX-512), bitsandbytes 0.50 packs a matrix
    of 4 bits anew where its input has no graph, and has no derivative of what it multiplies then.
    Each module says whether it may.
    """
    for module in model.modules():
        if hasattr(module, _MAY_PACK):
            setattr(module, _MAY_PACK, False)


def check_unpacked(model: nn.Module) -> None:
    """Refuse codes that are packed for inference, through which no gradient passes."""
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                "Matrices in 4 bits should not be packed for inference, where gradients are taken. "
                f"Found `{name}`, which a forward without gradients packed: bitsandbytes has no "
                f"derivative of it. Load the model anew, and set `{_MAY_PACK} = False` on its "
                "`Linear4bit` modules before they run."
            )


_MAY_PACK = "support_avx512bf16_for_cpu"


def coded(model: nn.Module) -> Iterator[str]:
    """The tensors of a model that hold weights as codes, in words.

    >>> [*coded(nn.Linear(2, 2, bias=False).to(torch.float8_e4m3fn))]
    ['`weight` of torch.float8_e4m3fn']
    """
    for name, parameter in model.named_parameters():
        if holds_codes(parameter):
            yield f"`{name}` of `{type(parameter).__name__}`"
        elif parameter.dtype not in FLOATS and (parameter.ndim > 0 or parameter.is_complex()):
            yield f"`{name}` of {parameter.dtype}"
    for name, module in model.named_modules():
        if hasattr(module, "_packed_params"):
            yield f"`{name}` of `{type(module).__module__}`"
    for name, buffer in model.named_buffers():
        last = name.rpartition(".")[2].lower()
        whole = not (buffer.is_floating_point() or buffer.dtype == torch.bool)
        if whole and buffer.ndim > 1 and ("weight" in last or last in ("w_q", "codes")):
            yield f"`{name}` of {buffer.dtype}"
