"""A direction as kernels get it, with the retain gradients beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launching import launch

MOST_RETAIN = 3
"""Retain gradients that a kernel reads which takes each coordinate by itself."""


@dataclass(frozen=True)
class Direction:
    """A direction u, which is to be changed, retain gradients, and a mask of what may move.

    u is what lies in `now`, or what `before` has that `now` has not. All tensors are contiguous.
    """

    now: Tensor
    before: Tensor | None
    retain: Sequence[Tensor]
    mask: Tensor | None

    def launch(self, kernel: Any, *further: Any, **constants: int) -> None:
        """Run a kernel over its coordinates, with further arguments behind those it consists of."""
        absent = self.now  # filled in, and not read
        launch(
            kernel,
            self.now.numel(),
            self.now,
            absent if self.before is None else self.before,
            *self.retain,
            *[absent] * (MOST_RETAIN - len(self.retain)),
            absent if self.mask is None else self.mask.view(torch.uint8),
            *further,
            R=len(self.retain),
            STEP=self.before is not None,
            MASKED=self.mask is not None,
            **constants,
        )
