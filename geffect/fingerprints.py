"""Whether values have changed, told by their bits without a copy of them."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from geffect import distributed

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as long as others, by their bytes."""

_PART = 2**18
"""Numbers whose bits are looked at together on a CPU, in whose cache they are."""

_PART_ELSEWHERE = 2**22
"""On another device, where they only have to fit the memory."""

_MULTIPLIER = 6364136223846793005
"""Knuth's, of the next part of a fingerprint."""


class Standstill:
    """Tells whether parameters have moved since it was made, by an optimizer or otherwise.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> still = Standstill([weight])
    >>> _ = weight.data.sub_(0.5)
    >>> still.over
    True
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters, self._prints = parameters, fingerprints(parameters)
        self._versions = [parameter._version for parameter in parameters]

    @property
    def likely_over(self) -> bool:
        """Whether something may have moved; what goes around autograd is not noticed."""
        versions = [parameter._version for parameter in self._parameters]
        return versions != self._versions and self.over

    @property
    def over(self) -> bool:
        """Whether a value is another one."""
        return not torch.equal(self._prints, fingerprints(self._parameters))


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """Int64[tensor], a fingerprint of what this process holds: another where one has changed."""
    prints = torch.empty(len(tensors), dtype=torch.int64)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for indices in by_device.values():  # each device is waited for once
        prints[indices] = torch.stack([_fingerprint(tensors[i]) for i in indices]).cpu()
    return prints


def bits(tensor: Tensor) -> Tensor:
    """What this process holds, as whole numbers: NaN equals itself there, and 0 is not -0."""
    values = distributed.local(tensor.detach())
    whole = torch.view_as_real(values) if values.is_complex() else values
    return whole.reshape(-1).view(_WORDS[whole.element_size()])


def _fingerprint(tensor: Tensor) -> Tensor:
    words = bits(tensor)
    size = words.element_size()
    if words.numel() * size % 8 == 0 and words.storage_offset() * size % 8 == 0:
        words = words.view(torch.int64)  # several numbers at once
    # Each place has a factor of its own, so that changes do not cancel: a plain sum would miss a
    # bit up here and one down there, and numbers that change places.
    factors = _factors(words.device)
    first, *others = words.split(len(factors))
    mixed: Tensor = (first * factors[: len(first)]).sum()
    for part in others:
        mixed = mixed * _MULTIPLIER + (part * factors[: len(part)]).sum()
    return mixed


@cache
def _factors(device: torch.device) -> Tensor:
    """Int64[part], odd and at random, as many as there are numbers in a part."""
    generator = torch.Generator().manual_seed(0)
    part = _PART if device.type == "cpu" else _PART_ELSEWHERE
    return (torch.randint(2**62, (part,), generator=generator, device="cpu") * 2 + 1).to(device)


def differ(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether two tensors of a pair have different values; other devices are waited for once."""
    differs = [
        not torch.equal(*pair) if pair[0].device.type == "cpu" else (pair[0] != pair[1]).any()
        for pair in pairs
    ]
    asked = [flag for flag in differs if isinstance(flag, Tensor)]
    if asked:
        told = iter(torch.stack([flag.to(asked[0].device) for flag in asked]).tolist())
        return [next(told) if isinstance(flag, Tensor) else flag for flag in differs]
    return [bool(flag) for flag in differs]
