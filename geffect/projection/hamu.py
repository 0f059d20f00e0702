"""HAMU: a fixed gain of forgetting a step, at the least cost to the retain data."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from geffect.gram import inner, norm
from geffect.numbers import is_number

from .rules import PARALLEL, Promise, Rule


def hamu(gain: float, *, radius: float | None = None, learning_rate: float = 1.0) -> Rule:
    """HAMU-Q: the step within a radius that forgets by `gain` and costs the retain data least.

    - `gain`: by how much a step of gradient descent lowers the objective, to first order: nats. Of
      several blocks, as with scope="parameter", each has an equal share of it.
    - `radius`: the length that the step may have, in the unit of the parameters. Of n blocks each
      may have 1 / sqrt(n) of it, so that the whole step keeps it. None for the length of the step
      down the retain gradient, which is that of each block itself: `learning_rate` |r|.
    - `learning_rate`: that of the optimizer. With 1.0, `gain` and `radius` are those per unit of
      learning rate.

    With B the gain and R the radius, the step D = theta before minus theta after is, by cases,

        R r / |r|                                        where that gains B by itself
        B u / |u|^2 + sqrt(R^2 - B^2 / |u|^2) t / |t|    else, with t = r - <r, u> / |u|^2 u
        B u / |u|^2                                      where that is longer than R

    and the new gradient is D / learning_rate. In the last case the gain cannot be had within R,
    which is told: by a warning, and as `unmet` of the report and the run file. The public code of
    HAMU (ICML 2026) stops where B > `free_forgetting`: from there on a step raises the retain risk,
    which `inner_after` of the report says, negative.

    Only plain gradient descent takes the step that is meant. AdamW rescales each of its coordinates
    and takes neither gain nor radius. r is the gradient of the step, without an average:
    `Rectifier(model, hamu(gain=0.1), ema=1.0)`. It trains on the retain data too: let the objective
    be the forget part alone.

    Raises ValueError unless all are finite and above 0.

    >>> rule = hamu(gain=0.5, learning_rate=0.1)
    >>> rule
    hamu(gain=0.5, radius=None, learning_rate=0.1)
    >>> K = torch.tensor([[4.0, -3.0], [-3.0, 9.0]]).double()  # u is against the forget gradient
    >>> x = rule(K)
    >>> [round(value, 4) for value in (0.1 * (K @ x)).tolist()]  # falls of the objective and of r
    [0.5, 0.0558]
    """
    return _HAMU(gain, radius, learning_rate)


def free_forgetting(
    K: Tensor, *, radius: float | None = None, learning_rate: float = 1.0
) -> Tensor:
    """By how much a step of length `radius` lowers the objective if the retain risk stays as it is.

    R sqrt(K_uu - K_ur^2 / K_rr), to first order, `Float64[...]` in nats: R |u| times the sine of
    the angle between u and r. R is `learning_rate` |r| where it is None, as in `hamu`. More than
    this a step gains only at the cost of the retain data. NaN where a gradient is zero.

    >>> K = torch.tensor([[4.0, -3.0], [-3.0, 9.0]]).double()
    >>> round(free_forgetting(K, learning_rate=0.1).item(), 6)
    0.519615
    """
    R = learning_rate * norm(K, 1) if radius is None else radius
    cosine = inner(K, 0, 1) / norm(K, 0) / norm(K, 1)
    gained: Tensor = R * norm(K, 0) * _sine(cosine)
    return gained


class _HAMU(Rule):
    """The rule with its numbers."""

    def __init__(self, gain: float, radius: float | None, learning_rate: float) -> None:
        given: dict[str, Any] = {
            "gain": gain,
            "radius": radius,
            "learning_rate": learning_rate,
        }
        for name, value in given.items():
            if (name, value) != ("radius", None):
                _positive(name, value)
        self._given = given
        super().__init__(
            partial(_weights, **given),
            adds_retain=True,
            one_retain=True,
            sets_length=True,
            promise=Promise(
                partial(_infeasible, **given),
                "its gain takes a step that is longer than its radius, and that step is taken",
            ),
        )
        self.__doc__ = hamu.__doc__

    def __repr__(self) -> str:
        return f"hamu({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    def __reduce__(self) -> Any:
        return _HAMU, (*self._given.values(),)


def _weights(K: Tensor, gain: float, radius: float | None, learning_rate: float) -> Tensor:
    B, R = _shares(K, gain, radius, learning_rate)
    u, r = norm(K, 0), norm(K, 1)
    cosine = torch.where((u > 0) & (r > 0), inner(K, 0, 1) / u / r, 0.0)
    sine = _sine(cosine)
    # Along u / |u| and r / |r|, one length after the other: a product of tiny ones would underflow.
    least = B / u
    rest = torch.where(sine > PARALLEL, (R**2 - least**2).clamp(min=0.0) ** 0.5 / sine, 0.0)
    retain_alone = (R * u * cosine >= B) & (r > 0)
    along_u = torch.where(retain_alone, 0.0, least - rest * cosine)
    along_r = torch.where(retain_alone, R, rest)
    weights = torch.stack(
        [torch.where(u > 0, along_u / u, 1.0), torch.where(r > 0, along_r / r, 0.0)], dim=-1
    )
    # Of an objective gradient that is zero nothing is gained: it stays zero.
    still = torch.tensor([1.0, 0.0]).to(K)
    return torch.where((u > 0)[..., None], weights / learning_rate, still)


def _infeasible(
    K: Tensor, _: Tensor, gain: float, radius: float | None, learning_rate: float
) -> Tensor:
    B, R = _shares(K, gain, radius, learning_rate)
    # Equal ones are feasible, whichever way they are rounded.
    broken: Tensor = R * norm(K, 0) * (1 + PARALLEL**2) < B
    return broken


def _shares(
    K: Tensor, gain: float, radius: float | None, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """The gain and the radius of each block, of those in which the objective has a gradient."""
    gaining = inner(K, 0, 0) > 0
    count = int(gaining.sum())
    if count == 0:
        gaining, count = torch.ones_like(gaining), 1  # of nothing the gain cannot be had
    B = gaining.to(K) * (gain / count)
    R = learning_rate * norm(K, 1) if radius is None else torch.full_like(B, radius / count**0.5)
    return B, R


def _sine(cosine: Tensor) -> Tensor:
    square: Tensor = (1 - cosine**2).clamp(min=0.0)
    return square.sqrt()


def _positive(name: str, value: object) -> None:
    if not (is_number(value) and value > 0):
        raise ValueError(
            f"`{name}` of hamu should be a number above 0. Found `{name} = {value!r}`. Pass one "
            f"such as {name}=0.1."
        )
