"""A model that an attack may change, and that gets every bit back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.codes import coded
from geffect.interrupts import to_the_end


@contextmanager
def kept(parameters: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """A block that may write to these parameters, which have every bit of before afterwards.

    Yields what gives them back meanwhile. What they were lies in the memory of the host. Whether
    they require a gradient is put back, too; their `.grad` is not looked at.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> before = model.weight.item()
    >>> with kept(model.parameters()), torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> model.weight.item() == before
    True
    """
    before = [(p, p.requires_grad, p.detach().to("cpu", copy=True)) for p in parameters]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, required, bits in before:
                parameter.requires_grad_(required)
                parameter.copy_(bits)

    try:
        yield put_back
    finally:
        to_the_end(put_back)


def check_weights(model: nn.Module, attack: str) -> None:
    """Refuse a model whose weights are not numbers that lie whole in this process.

    >>> check_weights(nn.Linear(2, 2).to(torch.float8_e4m3fn), "Rounding")
    Traceback (most recent call last):
    ValueError: Rounding should be of weights in float16, bfloat16, float32 or float64. Found ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{attack} should be of a model, a torch.nn.Module. Found `{type(model).__name__}`. "
            "Wrap what you have in a module whose parameters are its weights."
        )
    named = dict(model.named_parameters())
    if not named:
        raise ValueError(
            f"{attack} should be of a model that holds its weights as parameters. Found none in "
            f"`{type(model).__name__}`. Register them, or pass the model that it calls."
        )
    if distributed.is_of_several(named.values()):
        raise ValueError(
            f"{attack} should be in one process that holds the whole model. Found several "
            "processes, or parameters in shards. Save the model, and load it in one."
        )
    for name, parameter in named.items():
        if parameter.is_meta:
            raise ValueError(
                f"{attack} should be of weights that are in memory. Found that `{name}` was "
                "offloaded. Load the model without a device map, or on a larger device."
            )
        if parameter.is_inference():
            raise ValueError(
                f"{attack} should be of weights that may be written to. Found that `{name}` was "
                "made under torch.inference_mode(). Load the model outside of it."
            )
    packed = next(coded(model), None)
    if packed is not None:
        raise ValueError(
            f"{attack} should be of weights in float16, bfloat16, float32 or float64. Found "
            f"{packed}, as in a model that is quantised already: its codes are no weights. Load "
            "the model in floating point, or call its dequantize()."
        )
