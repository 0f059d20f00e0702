"""Rules that look at every coordinate by itself and are therefore no function of a Gram matrix.

Under sharding a process needs its own part alone, and no collective.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from .rules import check_one_retain


class Elementwise(ABC):
    """A rule on the coordinates of one parameter at a time.

    It declares the same of itself as a `Rule`.
    """

    adds_retain: ClassVar[bool] = False
    """Whether it adds the retain gradient as it is."""

    one_retain: ClassVar[bool] = False
    """Whether it takes one retain gradient and no more."""

    @property
    def form(self) -> tuple[str, float] | None:
        """The form of it that kernels have, `HALT`, `SAGO` or `SAGO_SUM`, with its alpha."""
        return None

    @abstractmethod
    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        """The new gradient, from the objective gradient and the retain gradients of a parameter.

        A parameter that no retain loss reaches has an empty sequence. Nothing is changed in place.
        """


@dataclass(frozen=True)
class Halt(Elementwise):
    """Coordinates that would harm the retain data stay where they are.

    x_i = 0 where u_i r_i < 0 for any retain gradient r, else u_i: the nearest point to u with
    x_i r_i >= 0 at every coordinate, which is `gru` and `nearest` asked of each by itself.

    >>> Halt()(torch.tensor([1.0, 1.0, 0.5]), [torch.tensor([2.0, -2.0, -1.0])])
    tensor([1., 0., 0.])
    """

    @property
    def form(self) -> tuple[str, float] | None:
        # Not of a class made from it, which may take something else.
        return ("HALT", 0.0) if type(self) is Halt else None

    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        x = u
        for r in retain:
            # Not a Bool mask, which takes ten times as long on a CPU. And not by the sign of the
            # product: that of two tiny numbers would underflow to no conflict.
            along = r.sign().to(u.dtype).mul_(u)
            x = torch.ge(along, 0, out=along).mul_(x)
        return x


@dataclass(frozen=True)
class SAGO(Elementwise):
    """SAGO: where a coordinate of the objective gradient harms the retain data, theirs instead.

    x_i = alpha r_i where u_i r_i < 0, else u_i; with `prefer_retain` else u_i + alpha r_i (arXiv
    2604.14808). So <x, r> >= 0 coordinate by coordinate. It adds the retain term, alpha r, by
    itself: let the objective be the forget part alone. r is the gradient of the step, without an
    average: `Rectifier(model, SAGO(), ema=1.0)`.

    >>> u, r = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 2.0, 3.0])
    >>> SAGO(alpha=0.5)(u, [r])
    tensor([1., 1., 0.])
    >>> SAGO(alpha=0.5, prefer_retain=True)(u, [r])
    tensor([2.0000, 1.0000, 1.5000])
    """

    alpha: float = 1.0
    prefer_retain: bool = False

    adds_retain: ClassVar[bool] = True
    one_retain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(
                "`alpha` of SAGO should be the weight of the retain loss, 0 or more. Found "
                f"`alpha = {self.alpha!r}`. Pass one such as 1.0."
            )

    @property
    def form(self) -> tuple[str, float] | None:
        name = "SAGO_SUM" if self.prefer_retain else "SAGO"
        return (name, self.alpha) if type(self) is SAGO else None

    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        if not retain:
            return u
        check_one_retain("SAGO", len(retain))
        r = self.alpha * retain[0]
        return torch.where(opposed(u, retain), r, u + r if self.prefer_retain else u)


def opposed(u: Tensor, retain: Sequence[Tensor]) -> Tensor:
    """Where u harms one of the retain gradients: u_i r_i < 0, `Bool` of the shape of u.

    >>> opposed(torch.tensor([1.0, -1.0, 0.0]), [torch.tensor([2.0, 2.0, -1.0])])
    tensor([False,  True, False])
    """
    harmed = torch.zeros_like(u, dtype=torch.bool)
    for r in retain:
        # Signs, not the product: that of two tiny numbers would underflow to no conflict.
        harmed |= u.sign() * r.sign() < 0
    return harmed
