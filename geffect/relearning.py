"""Parameters that have relearned for a moment: where an objective's gradient may be taken.

A gradient at theta pushes down what the model says there, and may hide facts that a few steps of
training bring back. One that is taken a little way down the loss of these facts pushes down what
would come back. Everything else of a step stays at theta.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from geffect import distributed, dots
from geffect.beside import beside
from geffect.devices import there
from geffect.forwards import AT_COPY, check_no_loss_asked
from geffect.gradients import Vector, reduced
from geffect.hooks import BEFORE_STEPS, Hooks
from geffect.interrupts import to_the_end
from geffect.layers import trainable
from geffect.losses import (
    Elsewhere,
    Loss,
    check_function,
    check_no_step_inside,
    loss_scale,
    plan,
)
from geffect.numbers import is_number
from geffect.sources import FORGET, OBJECTIVE, RETAIN

Unit = Literal["theta", "length", "loss"]
"""What a radius is measured in."""

LOSS = "relearning"
"""The name of the loss in messages."""

LOST = 0.5
"""The share of a copy's way that rounding may change before it is told."""

MOST = 2.0**24
"""The largest scale of a loss on its way back: with a larger one float16 keeps no more."""

UNBOUNDED = (
    "An objective that is taken at a relearned copy should saturate where a token is forgotten. "
    "Found {found}, of which single tokens carry the mean. On the embedded model, with selective "
    "steps and one step of relearning, recognition after the attack was .81 and extraction "
    "strength .33 with GA, .85 and .29 with NPO, which left a loss of .230 on world facts (.045 "
    "with WGA). Choose, say, WGA or TNPO."
)
"""What is told of an objective without a bound."""

TURNED = 0.1
"""The share of the length of all steps that a copy is away at least, or it is told."""


@dataclass(frozen=True, kw_only=True)
class Relearned:
    """How far parameters relearn: `steps` steps of gradient descent, each of a chosen length.

    - `radius`: the length of all steps together, in units of `unit`. 0 is no step.
    - `steps`: how many; each is a forward and a backward pass. 0 is none.
    - `unit`: "theta", the Euclidean norm of all trained parameters together; "length", 1; or
      "loss", by effect: the share of the loss that should be gone, 0.5 for half. Each step then
      has the length at which the loss, to first order, falls by its part of that, and no more than
      1/steps of the norm of theta.

    As an argument of `UnlearningTrainer`, `rectify` and `backward` of a recorder or rectifier, it
    says where the gradient of the objective is taken in each step, and also:

    - `loss`: a function that returns what is relearned, as the loss of all facts to forget; if left
      out, the loss that is named `forget` of the step, or the risk on its forget batch.
    - `stays`: of an objective that is a sum, the terms that are taken at theta, by the names of
      their losses. A trainer adds the parts of its objective that are not of forget data.
    - `device`: where the copy of the trained parameters lies meanwhile, such as "cpu"; beside them
      if left out.

    No radius is right for all models: see the page on rectifying.

    >>> Relearned(radius=0.006)
    Relearned(radius=0.006, steps=5, unit='theta')
    """

    radius: float
    steps: int = 5
    unit: Unit = "theta"
    loss: Callable[[], Tensor] | None = field(default=None, repr=False)
    stays: tuple[str, ...] = field(default=(RETAIN,), repr=False)
    device: str | torch.device | None = field(default=None, repr=False)

    @property
    def options(self) -> Mapping[str, object]:
        """What a run file says of it."""
        return {
            "source": OBJECTIVE,
            "radius": self.radius,
            "unit": self.unit,
            "steps": self.steps,
            "relearns": FORGET if self.loss is None else "a loss of its own",
            "stays": list(self.stays),
        }

    def keeping(self, names: Iterable[str]) -> "Relearned":
        """The same, where the losses of these names stay at theta too."""
        return replace(self, stays=tuple(dict.fromkeys((*self.stays, *names))))

    def elsewhere(
        self, model: nn.Module, losses: Mapping[str, Loss], scaler: GradScaler | None
    ) -> Elsewhere:
        """The place where a step of these losses takes the gradient of its objective."""
        loss = losses.get(FORGET) if self.loss is None else self.loss
        if loss is None or isinstance(loss, Mapping):
            raise ValueError(
                "`relearned` should know what is relearned. Found no loss named `forget` that is a "
                "function. Pass forget=lambda: ..., or Relearned(loss=lambda: ...)."
            )
        if isinstance(loss, Tensor):
            raise ValueError(
                "What is relearned should be a function, which each step of relearning asks. "
                "Found a tensor as the loss `forget`. Pass lambda: ... with the forward inside."
            )
        objective = losses.get(OBJECTIVE)
        if isinstance(objective, Mapping):
            rising = [n for n, w in objective.items() if w < 0 and n not in self.stays]
            if rising:
                tell_unbounded(f"ascent on `{rising[0]}`")
        return Elsewhere(lambda: self.block(model, loss, scaler), self.stays)

    def block(
        self, model: nn.Module, loss: Callable[[], Tensor], scaler: GradScaler | None = None
    ) -> AbstractContextManager["Copy"]:
        """A block inside of which the model has relearned so far by the loss."""
        return relearned(
            model,
            loss,
            radius=self.radius,
            steps=self.steps,
            unit=self.unit,
            scaler=scaler,
            device=self.device,
        )

    def __post_init__(self) -> None:
        if self.loss is not None:
            check_function("`loss`", self.loss)
        if type(self.steps) is not int or self.steps < 0:
            raise ValueError(
                f"`steps` should be a whole number from 0. Found {self.steps!r}. Pass, say, 5."
            )
        if self.unit not in get_args(Unit):
            raise ValueError(
                f"`unit` should be one of {', '.join(get_args(Unit))}. Found {self.unit!r}. Pass "
                "what the radius is measured in."
            )
        if self.device is not None:
            there(self.device)
        most = 1.0 if self.unit == "loss" else math.inf
        if not (is_number(self.radius) and 0 <= self.radius <= most):
            raise ValueError(
                f"`radius` should be a number from 0{' to 1' if most == 1 else ''}, in units of "
                f"`{self.unit}`. Found {self.radius!r}. Pass "
                f"{'0.5 for half of the loss' if most == 1 else 'how far to go in all'}."
            )


@dataclass(frozen=True)
class Copy:
    """What became of parameters that relearned.

    - `losses`: the loss before each step that was taken; over all processes.
    - `length`: how far they are from where they were, in units of the parameters. Steps that turn
      lead less far than they are long.
    """

    losses: tuple[float, ...]
    length: float


def check_relearned(relearned: object) -> None:
    """Refuse what says of no copy where it is."""
    if not isinstance(relearned, Relearned | None):
        raise TypeError(
            f"`relearned` should be a geffect.Relearned. Found `{type(relearned).__name__}`. Pass, "
            "say, Relearned(radius=0.006)."
        )


def tell_unbounded(found: str) -> None:
    """Warn of an objective without a bound, once at each place that asks for it."""
    warnings.warn(UNBOUNDED.format(found=found), stacklevel=4)


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
    way = Relearned(radius=radius, steps=steps, unit=unit, device=device)
    parameters = _checked(model, loss)
    if not (way.steps and way.radius):
        yield Copy((), 0.0)
        return
    distributed.reshard(model)
    place, hooks, is_inside, before = _Place(parameters, device), Hooks(), [True], AT_COPY.get()

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
        for tensor in _tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda gradient: _check_inside(is_inside))

    try:
        try:
            losses = _relearn(model, loss, way, place, scaler)
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


class _Place:
    """Where parameters stand, and where they were. Those in half precision move in float32."""

    def __init__(
        self, parameters: Sequence[Tensor], device: str | torch.device | None = None
    ) -> None:
        self.parameters, self.path = parameters, 0.0
        self._held = [distributed.local(parameter.detach()) for parameter in parameters]
        self._before = [tensor.to(device or tensor.device, copy=True) for tensor in self._held]
        self._at = [t.float() if t.itemsize < 4 else t for t in self._held]
        torch.clear_autocast_cache()  # what it has cast belongs to a graph of training

    @torch.no_grad()
    def move(self, gradient: Vector, norm: float, length: float) -> None:
        """A step of this length down a gradient of this norm."""
        for held, at, tensor in zip(self._held, self._at, gradient, strict=True):
            if tensor is not None:
                own = dots.dense(distributed.local(tensor.detach()))
                at.add_(own.to(device=at.device, dtype=at.dtype), alpha=-length / norm)
                if at is not held:
                    held.copy_(at)
        self.path += length
        torch.clear_autocast_cache()

    @torch.no_grad()
    def measured(self) -> float:
        """How far the steps have led, which are all taken; a warning where rounding made that."""
        products = [
            dots.gram([held.to(at.dtype) - own, at - own])
            for held, at, before in zip(self._held, self._at, self._before, strict=True)
            for own in (before.to(at),)
        ]
        self._at = self._held  # what moved in float32 is there
        over = [distributed.holders(parameter) for parameter in self.parameters]
        (moved, both), (_, meant) = dots.gathered(products, over).sum(0).tolist()
        rounded = moved + meant - 2 * both > LOST**2 * meant
        if rounded or math.sqrt(moved) < TURNED * self.path:
            warnings.warn(
                f"Steps of relearning, {self.path:.3g} long together, should lead away. Found a "
                f"copy {math.sqrt(moved):.3g} away where {math.sqrt(meant):.3g} was meant: "
                "rounding takes most of the way, or steps turn back. Where weights are coarse "
                "choose a larger `radius` or train in a finer type, else a smaller one.",
                stacklevel=5,
            )
        return math.sqrt(moved)

    @torch.no_grad()
    def put_back(self) -> None:
        """Every bit is that of before."""
        for held, before in zip(self._held, self._before, strict=True):
            held.copy_(before)
        torch.clear_autocast_cache()


def _relearn(
    model: nn.Module,
    loss: Callable[[], Tensor],
    way: Relearned,
    place: _Place,
    scaler: GradScaler | None,
) -> tuple[float, ...]:
    """Take the steps; the loss before each of them."""
    theta = 1.0 if way.unit == "length" else _norm([p.detach() for p in place.parameters])
    if theta == 0:
        raise ValueError(
            f"The parameters should not all be 0 where `unit` is {way.unit!r}. Found that their "
            'norm is 0. Pass a radius with unit="length".'
        )
    losses: list[float] = []
    for step in range(1, way.steps + 1):
        value, gradient, scale = _taken(model, loss, place.parameters, scaler)
        norm = _norm(gradient)
        if norm == 0:
            warnings.warn(
                "The gradient of the relearning loss should not be 0. Found that it is, after "
                f"{step - 1} of {way.steps} steps, at a loss of {value:.3g}. No further step was "
                "taken; pass a loss that can fall.",
                stacklevel=4,
            )
            break
        losses.append(value)
        length = way.radius * theta / way.steps
        if way.unit == "loss":
            if losses[0] <= 0:
                raise ValueError(
                    'The loss should be above 0 where `unit` is "loss". Found '
                    f'{losses[0]:.3g}. Pass a radius in units of "theta" or "length".'
                )
            wanted = losses[0] * (1 - way.radius * step / way.steps)
            length = min(max(value - wanted, 0.0) * scale / norm, theta / way.steps)
        place.move(gradient, norm, length)
        del gradient  # before the next is there
    return tuple(losses)


def _taken(
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    scaler: GradScaler | None,
) -> tuple[float, Vector, float]:
    """The loss, and its gradient times a scale, over all processes.

    The scale is lowered until the gradient has room; half precision could not have it divided.
    """
    scale = min(loss_scale(scaler, parameters[0].device), MOST)
    while True:
        with beside(model), torch.enable_grad():
            passes = plan(parameters, {LOSS: loss}, scale=scale, model=model)
            gradients = reduced(model, parameters, passes)
        gradient = gradients.vectors[LOSS][: len(parameters)]
        if math.isfinite(_norm(gradient)):
            return distributed.mean([gradients.losses[LOSS]])[0], gradient, scale
        if scale <= 1:
            raise ValueError(
                "The gradient of the relearning loss should be finite. Found one that is not, at a "
                f"loss of {gradients.losses[LOSS]:.3g}. Choose a smaller `radius`, or bound the "
                "loss."
            )
        scale = max(scale / 16, 1.0)


def _norm(vector: Vector) -> float:
    """The Euclidean norm over all tensors, whole where they are sharded."""
    return math.sqrt(dots.grams([tensor] for tensor in vector).sum().item())


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


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors that a model has returned, in tuples, lists and mappings too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors_in([*output.values()])
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors_in(part)
