"""Tensors that lie in tuples, lists and mappings."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among what a model takes or returns, or what a state holds, however deep.

    >>> import torch
    >>> deep = {"logits": torch.ones(1), "past": [(torch.ones(2), None)], "loss": 0.5}
    >>> [tensor.numel() for tensor in tensors_in(deep)]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)
