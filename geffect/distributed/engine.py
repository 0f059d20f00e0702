"""What is done otherwise for parameters that a DeepSpeed engine trains."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .zero import EngineOptimizer, is_engine, optimizer_behind, piece_of, shards_in, shards_of

__all__ = [
    "backward",
    "begin_micro_batch",
    "beside_steps",
    "has_skipped",
    "is_in_engine",
    "micro_batch",
    "module_in",
    "norm_limit",
    "optimizer_behind",
    "passes_apart",
    "pieces",
    "share_of",
    "shares_forwards",
    "show_step",
    "take_over_step",
    "take_step",
]


def is_in_engine(tensor: Tensor) -> bool:
    """Whether an engine trains the parameter, or what stands for it.

    >>> import torch
    >>> is_in_engine(torch.ones(2))
    False
    """
    return shards_of(tensor) is not None


def backward(
    leaves: Sequence[Tensor],
    loss: Tensor,
    *,
    seed: Tensor | None = None,
    retain_graph: bool = False,
    name: str | None = None,
) -> None:
    """Add the gradient of the loss to `.grad` of the leaves, or of an engine's put it there.

    `name` is that of the loss in all micro-batches of a step: an engine may leave the gradient of
    them all at the last one. Without a name it is there at once.

    >>> import torch
    >>> x = torch.ones(1, requires_grad=True)
    >>> backward([x], 3 * x.sum())
    >>> x.grad
    tensor([3.])
    """
    shards = shards_of(leaves[0])
    if shards is None:
        loss.backward(gradient=seed, retain_graph=retain_graph)
    else:
        seeded = loss if seed is None else (loss * seed).sum()
        shards.backward(name, seeded, retain_graph=retain_graph)


def pieces(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """From where to where this process holds parameters in an engine; nothing of others.

    >>> import torch
    >>> pieces({"weight": torch.ones(2)})
    {}
    """
    found = {name: piece_of(tensor) for name, tensor in parameters.items()}
    return {name: (piece.begin, piece.end) for name, piece in found.items() if piece is not None}


def share_of(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """The loss as it counts in its step: an engine divides those of micro-batches by their number.

    >>> import torch
    >>> loss = torch.ones(())
    >>> share_of([torch.ones(1)], loss) is loss
    True
    """
    shards = shards_of(parameters[0])
    return loss if shards is None else shards.share(loss)


@contextmanager
def micro_batch(model: nn.Module, *, last: bool) -> Iterator[None]:
    """A block that takes the gradients of a micro-batch where accelerate lets an engine do it.

    Losses have been divided by the number of micro-batches, and the engine steps after the last.
    """
    shards = shards_in(model)
    if shards is None:
        yield
        return
    shards.engine.set_gradient_accumulation_boundary(last)
    with shards.undivided():
        yield
    if last:
        shards.engine.step()


def module_in(model: nn.Module) -> nn.Module:
    """The model inside of an engine; any other one itself.

    >>> module_in(nn.Linear(2, 1))
    Linear(in_features=2, out_features=1, bias=True)
    """
    inner: Any = model.module if is_engine(model) else model
    return inner  # type: ignore[no-any-return]


def shares_forwards(parameters: Iterable[Tensor]) -> bool:
    """Whether several losses may be differentiated that come from one forward of their model.

    >>> import torch
    >>> shares_forwards([torch.ones(2)])
    True
    """
    known = map(shards_of, parameters)
    return all(shards is None or shards.stage < 3 for shards in known)


@contextmanager
def beside_steps(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A block whose passes are no part of a step: an engine knows nothing of them afterwards."""
    shards = shards_of(parameters[0])
    if shards is None:
        yield
        return
    grads = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        shards.forget()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


@contextmanager
def passes_apart(model: nn.Module) -> Iterator[None]:
    """A block in which an engine's passes add to `.grad`, and accelerate cannot have it step.

    `take_over_step` and `take_step` are for after it.
    """
    shards = shards_in(model)
    if shards is None:
        yield
        return
    with shards.passes_apart():
        yield


def take_step(model: nn.Module) -> None:
    """Have an engine, if there is one, take the step that was taken over."""
    shards = shards_in(model)
    if shards is not None:
        shards.engine.step()


def take_over_step(parameters: Sequence[Tensor]) -> None:
    """Have an engine's next step be one with the gradients that lie in `.grad` then."""
    shards = shards_of(parameters[0])
    if shards is not None:
        shards.take_over_step()


def show_step(parameters: Sequence[Tensor]) -> None:
    """Have the gradients of an engine's next step lie in `.grad` while its optimizer steps."""
    shards = shards_of(parameters[0])
    if shards is not None:
        shards.show_step()


def has_skipped(optimizer: Any) -> bool:
    """Whether an engine did not take its last step, as a gradient was not finite.

    >>> has_skipped(None)
    False
    """
    return isinstance(optimizer, EngineOptimizer) and optimizer.skipped


def norm_limit(parameters: Sequence[Tensor], given: float | None) -> float | None:
    """To which norm gradients are clipped: what an engine was told, or else what is given.

    >>> import torch
    >>> norm_limit([torch.ones(1)], 0.5)
    0.5
    """
    shards = shards_of(parameters[0])
    return given if shards is None else float(shards.engine.gradient_clipping())


def begin_micro_batch(parameters: Sequence[Tensor], *, first: bool, accumulate: bool) -> None:
    """Refuse a micro-batch that is the last one of a step to an engine, and not here, or so."""
    shards = shards_of(parameters[0])
    if shards is None:
        return
    last = shards.engine.is_gradient_accumulation_boundary()
    if last == accumulate:
        raise ValueError(
            "`accumulate` should be what the engine expects of a micro-batch, `accumulate = "
            f"{not last}`. Found {accumulate}. Pass accumulate=not "
            "engine.is_gradient_accumulation_boundary(), and tell it of a partial window by "
            "engine.set_gradient_accumulation_boundary(True)."
        )
    if first:
        shards.waiting.clear()
