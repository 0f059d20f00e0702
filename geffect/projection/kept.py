"""A vector of the model's size that is kept from step to step, and how: type, device, rounding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from geffect import distributed
from geffect.interrupts import Once


@dataclass(frozen=True)
class State:
    """How averages are kept: in float32 or in half of that, with the parameters or on the CPU.

    bfloat16 is rounded up or down at random, with the odds that make it right in the mean: nearest
    rounding would lose what is too small for its eight bits, however often it comes. A coordinate
    is off by about a percent, as often upward as downward.

    >>> State(torch.bfloat16, device="cpu")
    State(dtype=torch.bfloat16, device='cpu')
    """

    dtype: torch.dtype = torch.float32
    device: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                "`dtype` of State should be torch.float32 or torch.bfloat16. Found "
                f"`{self.dtype}`. Choose one of those."
            )
        if self.device not in (None, "cpu"):
            raise ValueError(
                '`device` of State should be "cpu", or None for where the parameters are. Found '
                f"`{self.device!r}`. Choose one of those."
            )


Make = Callable[[Callable[[], object]], object]
"""Makes a change in place, unless it was made before an interrupt."""

Change = Callable[[Tensor, Sequence[Tensor | None], Make], None]
"""Takes the new tensors of a parameter into what is kept of it, in place."""

Room = Mapping[int, Tensor]
"""For what is kept of parameters that no gradient had reached, by their indices: zeros."""


class Kept(Sequence[Tensor | None]):
    """A vector of the model's size, kept as a State says; read, it is float32 and in its place."""

    def __init__(self, state: State) -> None:
        self.tensors: list[Tensor | None] = []
        self._devices: list[torch.device | None] = []
        self._state = state

    def __len__(self) -> int:
        return len(self.tensors)

    @overload
    def __getitem__(self, i: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor | None]: ...
    def __getitem__(self, i: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        if isinstance(i, slice):
            return [self[index] for index in range(*i.indices(len(self)))]
        kept = self.tensors[i]
        return None if kept is None else kept.to(self._devices[i], torch.float32)

    def room_for(self, news: Sequence[Sequence[Tensor | None]]) -> Room:
        """What there has to be for new tensors, beside what there is."""
        firsts = [next((tensor for tensor in new if tensor is not None), None) for new in news]
        return {
            i: self._like(first).zero_()
            for i, first in enumerate(firsts)
            if first is not None and (not self.tensors or self.tensors[i] is None)
        }

    def change(
        self,
        news: Sequence[Sequence[Tensor | None]],
        by: Change,
        seeds: Iterator[int],
        room: Room,
        once: Once,
    ) -> None:
        """Change what is kept of each parameter by its new tensors, one parameter at a time."""
        if not self.tensors:
            self.tensors, self._devices = [None] * len(news), [None] * len(news)
        for i, new in enumerate(news):
            seed = next(seeds)
            if i in room:
                device = next(tensor.device for tensor in new if tensor is not None)
                self.tensors[i], self._devices[i] = room[i], device
            whole = self.tensors[i]
            if whole is None:
                continue
            kept = distributed.local(whole)
            exact = kept.float()  # itself where it is kept in float32: then nothing is copied
            parts = [None if t is None else distributed.local(t).to(exact) for t in new]
            make = partial(once.make, (id(self), i), kept)
            if exact is kept:
                by(exact, parts, make)
            else:
                by(exact, parts, lambda change: change())
                make(partial(kept.copy_, _rounded(exact, seed)))

    def clear(self) -> None:
        """Keep nothing."""
        self.tensors, self._devices = [], []

    def load(self, saved: Sequence[tuple[Tensor | None, Tensor]]) -> None:
        """Keep copies of what was saved, each like the parameter that comes with it."""
        self._devices = [like.device for _, like in saved]
        self.tensors = [None if tensor is None else self._like(like) for tensor, like in saved]
        for kept, (tensor, _) in zip(self.tensors, saved, strict=True):
            if kept is not None and tensor is not None:
                distributed.local(kept).copy_(distributed.local(tensor))

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor.detach(), dtype=self._state.dtype, device=self._state.device)


def _rounded(exact: Tensor, seed: int) -> Tensor:
    """The float32 tensor with its low 16 bits rounded away, up as often as they are large."""
    generator = torch.Generator(exact.device).manual_seed(seed)
    # A bfloat16 is the upper half of a float32: noise below it carries over with the right odds.
    bits = torch.empty_like(exact, dtype=torch.int32).random_(2**16, generator=generator)
    return bits.add_(exact.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
