"""The gradients of one step, each by itself: one backward pass a loss."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.losses import Elsewhere, Loss, Passes, plan

from .of_step import Gradients
from .peaks import largest
from .running import Running


def differentiate(
    parameters: Sequence[Tensor],
    losses: Mapping[str, Loss],
    *,
    elsewhere: Elsewhere | None = None,
) -> Gradients:
    """The gradients of the losses, one backward pass for each scalar and none for a combination.

    What stood in `.grad` stands there again afterwards. Losses may share a forward: the graph is
    kept for as long as a later loss needs it. One that is a function is asked right before its
    pass. With `elsewhere` that of the objective is made there.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> step = differentiate([x], {"forget": x**2, "objective": {"forget": -1.0}})
    >>> step.of("objective"), x.grad
    ([tensor(-6.)], None)
    """
    return separate(parameters, plan(parameters, losses, elsewhere=elsewhere))


def separate(parameters: Sequence[Tensor], passes: Passes) -> Gradients:
    """The gradients that the passes leave, each by itself, and `.grad` as it was."""
    return _read(passes, _left_by(passes), ())


def reduced(
    model: nn.Module,
    parameters: Sequence[Tensor],
    passes: Passes,
    *,
    peaks_of: Collection[str] = (),
    exchange: distributed.Exchange | None = None,
) -> Gradients:
    """The same on several processes: each gradient by itself, of all of their data.

    Under DDP the forwards were made inside of `no_sync()`, and the gradients are averaged here.
    With an `exchange`, which comes before that, losses and `peaks_of` are those of all processes.
    """
    with distributed.gradient_sync(model):
        left = _left_by(passes)
    distributed.take_over_step(parameters)
    averages = distributed.averages(model)
    if exchange is None:
        gradients, present = _read(passes, left, ()), None
    else:
        # What is averaged has the same largest coordinates everywhere, once it is.
        looked = () if averages else peaks_of
        gradients, present = of_all_ranks(lambda: _read(passes, left, looked), exchange)
    if averages:
        averaged = distributed.average(parameters, gradients.vectors, present)
        gradients.vectors.update(averaged)
    return gradients


def of_all_ranks(
    read: Callable[[], Gradients], exchange: distributed.Exchange
) -> tuple[Gradients, Tensor]:
    """The gradients with what all processes know of them, and on how many each tensor is there."""
    told: list[tuple[Gradients, list[Tensor]]] = []

    def part() -> Tensor:
        gradients = read()
        tables = [
            distributed.presence(gradients.parameters, gradients.vectors),
            torch.tensor([*gradients.losses.values()], dtype=torch.float64),
            distributed.in_own_row([*gradients.peaks.values()]),
        ]
        told.append((gradients, tables))
        return distributed.packed(tables)

    total = exchange(part)
    ((gradients, tables),) = told
    present, losses, peaks = distributed.unpacked(total, tables)
    means, largest = losses / distributed.world_size(), peaks.amax(dim=0)
    everywhere = replace(
        gradients,
        losses=dict(zip(gradients.losses, means.tolist(), strict=True)),
        peaks=dict(zip(gradients.peaks, largest.tolist(), strict=True)),
    )
    return everywhere, present


def _left_by(passes: Passes) -> dict[str, list[Tensor | None]]:
    """What each pass leaves in the `.grad` of the leaves."""
    taken: dict[str, list[Tensor | None]] = {}
    running = Running(passes)

    def take(name: str) -> None:
        taken[name] = running.left_by(name)

    running.each(take)
    # Leaves that a later loss has brought have nothing of the earlier ones.
    width, names = len(passes.leaves), passes.order.names
    return {name: [*taken[name], *[None] * (width - len(taken[name]))] for name in names}


def _read(
    passes: Passes, vectors: dict[str, list[Tensor | None]], peaks_of: Collection[str]
) -> Gradients:
    """The gradients with what is read of them, of all at once."""
    count, weights = len(passes.parameters), passes.order.weights
    # Of what is a vector as it is: no sum is made for it.
    ends = {
        name: largest(vectors[name][:count]) for name in peaks_of if weights[name] == {name: 1.0}
    }
    peaks = dict(zip(ends, passes.values.read(*ends.values()), strict=True))
    return Gradients(
        passes.parameters,
        passes.leaves[count:],
        vectors,
        weights,
        passes.losses,
        passes.order.scale,
        peaks,
    )
