"""Whose a row is: a check that row k of what a module returns reaches the loss of sample k alone.

An equal number of rows proves nothing: a table of as many positions as there are samples has it.
With r any cotangent of the model's output, whose rows are samples, and delta = J^T r at the output
of a module, weights w_s of the rows of r come out as w_s of the rows of delta, if and only if row s
of the module reaches row s of the model's output and no other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 32
"""Outputs whose gradients are in memory together."""

POWERS = 16
"""Weights are powers of two, which do not round; of as many samples as there are, one pass each."""

TOLERANCE = 2.0**-6
"""Of a row: far above rounding, and far below the factor of two between weights."""


class Aside:
    """Whether modules are run and differentiated that no hook should take for the loss's.

    One for all threads: on a GPU hooks are called in threads of autograd.
    """

    running = False


class NotOfSamples(ValueError):
    """A refusal: samples cannot be told apart by the rows of modules. `reason` is why, in short."""

    def __init__(self, should: str, found: str, *, reason: str) -> None:
        super().__init__(
            f"{should} Found {found}. Take geffect.effects.sample_effects or "
            "geffect.effects.token_effects, which need no rows."
        )
        self.reason = reason


@contextmanager
def aside() -> Iterator[None]:
    """A block of such runs and passes."""
    before, Aside.running = Aside.running, True
    try:
        yield
    finally:
        Aside.running = before


def strangers(outputs: Sequence[Tensor], of_model: Any, samples: int) -> list[int]:
    """The indices of the outputs whose rows are not those of the samples.

    Each output has a row for each sample, and a graph from it to what the model returned.

    >>> ours, shared = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    >>> strangers([ours, shared], ours * shared.sum(0), samples=3)
    [1]
    """
    returned = _rows_of(of_model, samples)
    if returned is None:
        return [*range(len(outputs))]
    draw = torch.Generator(returned.device).manual_seed(0)
    cotangent = torch.randn(
        returned.shape, generator=draw, device=returned.device, dtype=torch.float32
    ).to(returned.dtype)
    return [
        start + index
        for start in range(0, len(outputs), AT_ONCE)
        for index in _strangers(outputs[start : start + AT_ONCE], returned, cotangent, samples)
    ]


def _strangers(
    outputs: Sequence[Tensor], returned: Tensor, cotangent: Tensor, samples: int
) -> list[int]:
    plain = _deltas(outputs, returned, cotangent)
    found: set[int] = set()
    numbers = torch.arange(samples, device=returned.device)
    for digit in range(max(1, -(-(samples - 1).bit_length() // (POWERS.bit_length() - 1)))):
        codes = numbers // POWERS**digit % POWERS - POWERS // 2
        weighted = _deltas(outputs, returned, cotangent * _along(codes, returned))
        for index, (before, after) in enumerate(zip(plain, weighted, strict=True)):
            expected = before.double() * _along(codes, before).double()
            off = (after.double() - expected).flatten(1).norm(dim=1)
            if (off > TOLERANCE * expected.flatten(1).norm(dim=1)).any():
                found.add(index)
    return sorted(found)


def _along(codes: Tensor, rows: Tensor) -> Tensor:
    """A power of two for each row, to be multiplied with it."""
    return torch.exp2(codes.to(rows.dtype)).view(-1, *(1,) * (rows.ndim - 1)).to(rows.device)


def _deltas(outputs: Sequence[Tensor], returned: Tensor, cotangent: Tensor) -> list[Tensor]:
    with aside():
        try:
            found = torch.autograd.grad(
                returned, outputs, cotangent, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:  # a reentrant checkpoint takes no part in it
            raise NotOfSamples(
                "The model should let gradients of activations be taken by torch.autograd.grad.",
                f"that it raises: {error}",
                reason="whose the rows of modules are cannot be told by torch.autograd.grad",
            ) from error
    return [
        torch.zeros_like(output) if delta is None else delta
        for output, delta in zip(outputs, found, strict=True)
    ]


def _rows_of(of_model: Any, samples: int) -> Tensor | None:
    """The logits that a model returned, or whatever it has a graph and a row a sample of."""
    values: Sequence[Any] = [getattr(of_model, "logits", of_model)]
    if isinstance(of_model, Mapping):
        values = [*values, *of_model.values()]
    elif isinstance(of_model, tuple | list):
        values = of_model
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.shape[:1] == (samples,):
            return value
    return None
