"""What somebody would use instead: models of what other code does with the same gradients."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geffect.gradients import Gradients

from .workload import Workload


class PublicGRU:
    """The procedure published with GRU (arXiv 2503.09117): a model of what it does, not its code.

    All gradients of the model go into one flat vector of a type, with a running average of those to
    retain; what opposes it is projected out, and copied back tensor by tensor. As in the bench of
    ours, the projection is always made.
    """

    def __init__(self, dtype: torch.dtype, gamma: float = 0.8) -> None:
        self._dtype, self._gamma = dtype, gamma
        self._average: Tensor | None = None

    def rectify(self, gradients: Gradients) -> None:
        """Leave the rectified gradient in `.grad`."""
        u, r = (self._flat(gradients.of(name)) for name in ("objective", "retain"))
        old = self._average
        self._average = r if old is None else self._gamma * r + (1 - self._gamma) * old
        r = self._average
        x = u - (torch.dot(u, r) / torch.dot(r, r)).item() * r
        start = 0
        for parameter in gradients.parameters:
            part = x[start : start + parameter.numel()]
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
            start += parameter.numel()

    def _flat(self, vector: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([t.reshape(-1).to(self._dtype) for t in vector if t is not None])


class AutogradLoop:
    """A loop of `torch.autograd.grad` over losses, and of `torch.dot` over tensors and pairs."""

    def __init__(
        self, parameters: Sequence[Tensor], losses: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self._parameters, self._losses = parameters, losses
        self.products: list[list[float]] = []

    def backward(self) -> None:
        """Take the products of a step, and leave gradient ascent on the first loss in `.grad`."""
        vectors = [torch.autograd.grad(loss(), self._parameters) for loss in self._losses.values()]
        table = [
            torch.stack(
                [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(*pair, strict=True)]
            )
            for pair in combinations_with_replacement(vectors, 2)
        ]
        self.products = torch.stack(table).tolist()
        for parameter, gradient in zip(self._parameters, vectors[0], strict=True):
            parameter.grad = -gradient


def gramian_of_torchjd(workload: Workload) -> Callable[[], Tensor]:
    """What takes the Gram matrix of the losses of both sides, in one forward, by torchjd's engine.

    On a copy of the model: its hooks stay there, and take part in every forward.
    """
    from torchjd.autogram import Engine

    model = copy.deepcopy(workload.model)
    engine = Engine(model, batch_dim=None)
    sides = list(workload.pair.values())
    ids, mask = (torch.cat([s[name] for s in sides]) for name in ("input_ids", "attention_mask"))

    def run() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits.chunk(len(sides))
        losses = [
            cross_entropy(of_side[:, :-1].flatten(0, 1).float(), side["labels"][:, 1:].flatten())
            for of_side, side in zip(logits, sides, strict=True)
        ]
        return engine.compute_gramian(torch.stack(losses))

    return run
