"""A block inside of which a model has relearned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed
from geffect.forwards import AT_COPY, check_no_loss_asked
from geffect.hooks import BEFORE_STEPS, Hooks
from geffect.interrupts import to_the_end
from geffect.layers import trainable
from geffect.losses import check_function, check_no_step_inside
from geffect.nested import tensors_in

from .descent import relearn
from .place import Place
from .way import Unit, Way


@dataclass(frozen=True)
class Copy:
    """What became of parameters that relearned.

    - `losses`: the loss before each step that was taken; over all processes.
    - `length`: how far they are from where they were, in units of the parameters. Steps that turn
      lead less far than they are long.
    """

    losses: tuple[float, ...]
    length: float


@contextmanager
def relearned(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    radius: float,
    steps: int = 5,
    unit: Unit = "theta",
    scaler: GradScaler | None = None,
    device: str | torch.device | None = None,
) -> Iterator[Copy]:
    """A block inside of which the model has relearned, by normalised steps down a loss.

    theta' = theta - sum_i s_i g_i / |g_i|, g_i the gradient of the loss after i steps, and the s_i
    alike and `radius` together, but by effect. Inside, compute the objective's loss at theta' and
    take its gradient. Afterwards, whatever was raised, all parameters have every bit of before.

    - `loss`: a function that returns the loss at the present parameters, as of the facts to forget.
      It is called `steps` times.
    - `radius`, `steps`, `unit`, `device`: see `Relearned`.
    - `scaler`: multiplies the loss on its way back, so that float16 keeps small gradients; return
      the loss as it is.

    Yields a `Copy`. All parameters that require a gradient move, each once: of a model with
    adapters these alone. Passes of the loss leave `.grad`, buffers, modes and random numbers alone;
    those of the block are its own. Parameters in half precision move in float32 and are rounded
    where they stand; a warning tells where rounding takes the way. Memory: a copy of the trained
    parameters, and one gradient; steps cannot be taken back by adding them again, which rounds.

    Raises RuntimeError where an optimizer steps inside of the block, a recorder or rectifier is
    called there, or a gradient is taken behind it of what the model returned inside. Losses that
    were computed before are differentiated before: torch refuses the others, but where activations
    are checkpointed. Parameters in a DeepSpeed engine are refused.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> def loss(): return model(torch.tensor([3.0, 4.0])).square().mean()
    >>> with relearned(model, loss, radius=0.5, steps=1, unit="length"):
    ...     (-loss()).backward()
    ...     model.weight.tolist()
    [[0.699999988079071, 0.6000000238418579]]
    >>> model.weight.tolist(), model.weight.grad
    ([[1.0, 1.0]], tensor([[-27., -36.]]))
    """
    way = Way(radius=radius, steps=steps, unit=unit, device=device)
    parameters = _checked(model, loss)
    if not (way.steps and way.radius):
        yield Copy((), 0.0)
        return
    distributed.reshard(model)
    place, hooks, is_inside, before = Place(parameters, device), Hooks(), [True], AT_COPY.get()

    def put_back() -> None:
        is_inside.clear()
        hooks.remove()
        AT_COPY.set(before)
        distributed.reshard(model)
        place.put_back()

    def refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if not stepped.isdisjoint(map(id, parameters)):
            check_no_loss_asked()

    def watch(_: nn.Module, __: object, output: object) -> None:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda gradient: _check_inside(is_inside))

    try:
        try:
            losses = relearn(model, loss, way, place, scaler)
            length = place.measured() if losses else 0.0
            hooks.add(BEFORE_STEPS.register, refuse_step)
            hooks.add(model.register_forward_hook, watch)
            AT_COPY.set(object())
            yield Copy(losses, length)
        finally:
            put_back()
    except BaseException:
        to_the_end(put_back)  # an interrupt may come at any line, those of put_back too
        raise


def _checked(model: nn.Module, loss: object) -> list[Tensor]:
    """The trained parameters of a model that can relearn by the loss."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` should be a torch.nn.Module. Found `{type(model).__name__}`. Pass the model "
            "that is trained."
        )
    if not callable(loss):
        raise TypeError(
            "`loss` should be a function that returns the loss at the present parameters. Found "
            f"`{type(loss).__name__}`. Pass lambda: ... with the forward inside."
        )
    check_function("`loss`", loss)
    check_no_loss_asked()
    return check_can_relearn(model)


def check_can_relearn(model: nn.Module) -> list[Tensor]:
    """The trained parameters of a model; refuses those that cannot be moved and put back."""
    distributed.check_layout(model)
    named = trainable(model)
    if any(map(distributed.is_in_engine, named.values())):
        raise ValueError(
            "Parameters that relearn should be in no DeepSpeed engine, which keeps copies of them "
            "that would not move. Found some that an engine trains. Use DDP or FSDP2."
        )
    for name, parameter in named.items():
        if parameter.is_meta:
            raise ValueError(
                f"Parameters that relearn should be in memory. Found that `{name}` was offloaded. "
                "Load the model without a device map."
            )
    check_no_step_inside(named.values())
    return [*named.values()]


def _check_inside(is_inside: list[bool]) -> None:
    if not is_inside:
        raise RuntimeError(
            "The gradient at a relearned copy should be taken inside of the block. Found a "
            "backward pass behind it, when the parameters are those of before. Call `backward` or "
            "`autograd.grad` before the block ends."
        )
