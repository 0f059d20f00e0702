"""Who steps what, and what a step moved."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from geffect import distributed
from geffect.hooks import BEFORE_STEPS, Hooks, weakly

__all__ = [
    "Differences",
    "DirectionWatch",
    "Move",
    "Standstill",
    "StepFollower",
    "check_descends",
    "check_owned",
    "described",
    "moved_by",
    "tensors_of",
    "unwrapped",
]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as long as others, by their bytes."""

_PART = 2**18
"""Numbers whose bits are looked at together on a CPU, in whose cache they are."""

_PART_ELSEWHERE = 2**22
"""On another device, where they only have to fit the memory."""

_MULTIPLIER = 6364136223846793005
"""Knuth's, of the next part of a fingerprint."""


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer steps.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> tensors_of(torch.optim.SGD([weight], lr=0.1))[0] is weight
    True
    """
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def moved_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer's next step moves: its own, where they have a gradient."""
    return [tensor for tensor in tensors_of(optimizer) if tensor.grad is not None]


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without what accelerate put around it, which has no hooks to call.

    That of a DeepSpeed engine is what stands for it. Raises a `ValueError` for DeepSpeed's of an
    engine that nobody looks at, and for what is no optimizer of torch.
    """
    foreign = False
    while (behind := distributed.optimizer_behind(optimizer)) is None:
        if not hasattr(optimizer, "optimizer"):
            break
        foreign = foreign or "DeepSpeed" in type(optimizer).__name__
        optimizer = optimizer.optimizer
    if behind is not None:
        return behind
    if foreign:
        raise ValueError(
            "`optimizer` should be that of the engine which is the model. Found DeepSpeed's, and a "
            "model outside of an engine. Pass what `deepspeed.initialize` gave: the engine as "
            "the model, and `optimizer=engine.optimizer`."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"`optimizer` should be a torch optimizer. Found `{type(optimizer).__name__}`. "
            "Pass optimizer=optimizer, the one that steps the model."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            "`optimizer` should be made by `torch.optim.Optimizer.__init__`, so that its steps can "
            f"be followed. Found `{type(optimizer).__name__}`, which leaves that out. Pass the "
            "optimizer inside of it, or let its `__init__` call `super().__init__`."
        )
    return optimizer


def described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer and the options of its parameter groups."""
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {key: v for key, v in group.items() if isinstance(v, int | float | tuple)}
            for group in optimizer.param_groups
        ],
    }


ROUNDING = 1e-6
"""Of a learning rate, in terms of the one that its schedule starts from."""


def check_descends(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that climbs: G-effects and rectifiers take a step to go down.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> check_descends(torch.optim.SGD([weight], lr=0.1, maximize=True))
    Traceback (most recent call last):
    ValueError: `maximize` of SGD should be False: ... Negate the loss instead.
    """
    if any(group.get("maximize", False) for group in optimizer.param_groups):
        raise ValueError(
            f"`maximize` of {type(optimizer).__name__} should be False: a gradient is taken for "
            "what the step goes down. Found `maximize = True`, with which every sign would be "
            "wrong. Negate the loss instead."
        )
    for group in optimizer.param_groups:
        rate = group.get("lr")
        # A schedule that ends at zero may pass it by a rounding.
        if rate is not None and rate < -ROUNDING * abs(group.get("initial_lr", rate)):
            raise ValueError(
                f"The learning rate of {type(optimizer).__name__} should not be negative: a "
                f"gradient is taken for what the step goes down. Found {float(rate)}, with which "
                "every sign would be wrong. Negate the loss instead."
            )


class DirectionWatch:
    """Refuses an optimizer that climbs at the step that it takes with an expected gradient.

    For those who leave a gradient and do not know the optimizer that steps it. It looks at the
    steps of all optimizers for as long as it lives.
    """

    def __init__(self, parameters: Collection[Tensor]) -> None:
        self.expects = False  # whether a gradient lies there that no optimizer has stepped yet
        self._own = set(map(id, parameters))
        hooks = Hooks()
        finalize(self, hooks.remove)
        hooks.add(BEFORE_STEPS.register, weakly(self._look))

    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.expects and not self._own.isdisjoint(map(id, tensors_of(optimizer))):
            check_descends(optimizer)
            self.expects = False


def check_owned(optimizer: torch.optim.Optimizer, parameters: Collection[Tensor]) -> None:
    """Refuse an optimizer that steps other tensors than the model's parameters."""
    own = set(map(id, parameters))
    tensors = tensors_of(optimizer)
    if not own.intersection(map(id, tensors)):
        raise ValueError(
            "`optimizer` should step the parameters of `model`. Found one that has none of "
            "them. Make it from model.parameters()."
        )
    foreign = [
        tensor
        for tensor in tensors
        if id(tensor) not in own and (tensor.requires_grad or tensor.grad is not None)
    ]
    if foreign:
        raise ValueError(
            "`optimizer` should step the parameters of `model` and no others, which nothing "
            f"here could rectify. Found others, {len(foreign)} in number, that are not the model's "
            "or were unfrozen since the rectifier was made. Give those an optimizer of their own, "
            "or make the rectifier after choosing the parameters to train."
        )


class Differences(Sequence[Tensor | None]):
    """Theta as it is now minus theta as it was, a tensor at a time; None for what is not moved.

    Each is computed when it is asked for, so that there is no further copy of the parameters.
    """

    def __init__(
        self, before: Sequence[Tensor], parameters: Sequence[Tensor], moved: Sequence[bool]
    ) -> None:
        self._before, self._parameters, self._moved = before, parameters, moved

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not self._moved[index]:
            return None
        now, before = self._parameters[index].detach(), self._before[index]
        # In half precision the difference of two numbers has more digits than either.
        return now - before if now.itemsize > 2 else now.float() - before.float()


class Standstill:
    """Tells whether parameters have moved since it was made, by an optimizer or otherwise.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> still = Standstill([weight])
    >>> _ = weight.data.sub_(0.5)
    >>> still.over
    True
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters, self._prints = parameters, _prints(parameters)
        self._versions = [parameter._version for parameter in parameters]

    @property
    def likely_over(self) -> bool:
        """Whether something may have moved; what goes around autograd is not noticed."""
        versions = [parameter._version for parameter in self._parameters]
        return versions != self._versions and self.over

    @property
    def over(self) -> bool:
        """Whether a value is another one."""
        return not torch.equal(self._prints, _prints(self._parameters))


@dataclass(frozen=True)
class Move:
    """What has moved the parameters since a gradient.

    - `stepped`: Bool[parameter], whether an optimizer stepped it or its values changed; None where
      nothing was seen to move. An optimizer does not step what has no gradient.
    - `update`: theta now minus theta at the gradient, to be read before anything else moves; None
      where it is not followed, or where training ended before anything moved.
    - `lr`, `optimizer`: the learning rate and the description of the first optimizer that stepped.
    """

    stepped: tuple[bool, ...] | None
    update: Differences | None
    lr: float
    optimizer: Mapping[str, Any] | None


class StepFollower:
    """Follows what moves parameters from one gradient to the next: an optimizer, or a loop.

    A step is what lies between two gradients, and its update is the difference of the parameters
    between the two. So a closure, a second optimizer, a wrapper, a step by hand and an average that
    is swapped in count like any optimizer. `begin` says that a gradient has been taken, `news`
    tells what has moved since, and `end` forgets it. `enter` and `leave` stand around the step of
    an optimizer, and one may step inside of another. They tell what is stepped, also where a
    learning rate of zero moves nothing, and when to ask: `ready`.

    With `updates`, a copy of the parameters is kept from `begin` to `end`.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> follower = StepFollower([weight], updates=True)
    >>> follower.begin()
    >>> _ = weight.data.sub_(0.5)
    >>> [*follower.news(at_gradient=True).update]
    [tensor([-0.5000, -0.5000])]
    """

    def __init__(self, parameters: Sequence[Tensor], *, updates: bool) -> None:
        self.parameters, self._updates = parameters, updates
        self._own = frozenset(map(id, parameters))
        self._step: _FollowedStep | None = None
        # The last one is the innermost; each with what had a gradient when it began.
        self._inside: dict[torch.optim.Optimizer, frozenset[int]] = {}
        self._known: frozenset[int] = frozenset()  # what optimizers stepped the time before

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer steps any of the parameters."""
        return not self._own.isdisjoint(map(id, tensors_of(optimizer)))

    def begin(self) -> None:
        """A gradient has been taken and lies in `.grad`."""
        # The optimizer whose closure this is steps what is its own.
        within = {id(tensor) for optimizer in self._inside for tensor in tensors_of(optimizer)}
        parameters = self.parameters
        # With copies nothing has to be printed yet. What an optimizer stepped the time before is
        # expected to be stepped by one again.
        printed = [
            i for i, p in enumerate(parameters) if not self._updates and id(p) not in self._known
        ]
        self._step = _FollowedStep(
            parameters=parameters,
            reached=frozenset(id(p) for p in parameters if p.grad is not None),
            stepped=within & self._own,
            driven=within & self._own,
            before=[p.detach().clone() for p in parameters] if self._updates else None,
            versions=[p._version for p in parameters],
            printed=printed,
            prints=_prints([parameters[i] for i in printed]),
        )

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """The step of an optimizer begins."""
        self._forget(optimizer)  # if its last step raised
        self._inside[optimizer] = frozenset(map(id, moved_by(optimizer)))

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """The step of an optimizer has ended."""
        # Gradients may be taken away when a step ends, and come during a step with a closure.
        driven = self._inside.get(optimizer, frozenset()).union(map(id, moved_by(optimizer)))
        self._forget(optimizer)
        if self._step is not None and self.owns(optimizer):
            self._step.take(optimizer, driven)

    @property
    def inside(self) -> bool:
        """Whether an optimizer is inside of its step, or raised there."""
        return bool(self._inside)

    @property
    def ready(self) -> bool:
        """Whether optimizers have stepped all that has a gradient, or what they did last time."""
        step = self._step
        if step is None or self._inside:
            return False
        return self._complete or (bool(self._known) and self._known <= step.stepped)

    @property
    def final(self) -> bool:
        """Whether nothing that moves from now on, before the next gradient, could be news."""
        return self._step is not None and self._complete and not self._updates

    def news(self, *, at_gradient: bool) -> Move | None:
        """What has moved since `begin`; None where that is what the last call told.

        To be asked on all processes. `at_gradient`: the next gradient is about to be taken.
        """
        assert self._step is not None
        return self._step.news(at_gradient=at_gradient)

    def end(self) -> None:
        """Forget the step."""
        if self._step is not None:
            self._known = frozenset(self._step.stepped & self._own)
        self._step = None

    @property
    def _complete(self) -> bool:
        return self._step is not None and self._step.reached <= self._step.stepped

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in self._inside:
            while self._inside.popitem()[0] is not optimizer:
                pass


@dataclass
class _FollowedStep:
    """What is known of the parameters at one gradient, and what has stepped them since."""

    parameters: Sequence[Tensor]
    reached: frozenset[int]  # what has a gradient
    stepped: set[int]  # held by optimizers that stepped
    driven: set[int]  # of these, what had a gradient then
    before: Sequence[Tensor] | None  # copies, where the update is followed
    versions: Sequence[int]
    printed: Sequence[int]  # indices of those whose bits are looked at, without copies
    prints: Tensor
    lr: float = float("nan")
    optimizer: Mapping[str, Any] | None = None
    # Of the last news: what was stepped, and prints of all parameters where the update is followed.
    told: tuple[Tensor, tuple[bool, ...]] | None = None

    def take(self, optimizer: torch.optim.Optimizer, driven: Collection[int]) -> None:
        """Count a step of the optimizer, which moves what is `driven`."""
        if self.optimizer is None:
            self.lr = float(optimizer.param_groups[0]["lr"])
            self.optimizer = described(optimizer)
        self.stepped.update(map(id, tensors_of(optimizer)))
        self.driven.update(driven)

    def news(self, *, at_gradient: bool) -> Move | None:
        """What has moved, if that is something else than was told."""
        stepped = self._moved()
        now = _prints(self.parameters if self.before is not None else [])
        if self.told is not None:
            prints, flags = self.told
            if not any(self._anywhere([not torch.equal(prints, now)])) and flags == stepped:
                return None
        self.told = now, stepped
        seen = any(stepped)
        update = None
        if self.before is not None and (seen or at_gradient):
            update = Differences(self.before, self.parameters, stepped)
        return Move(stepped if seen else None, update, self.lr, self.optimizer)

    def _moved(self) -> tuple[bool, ...]:
        """Whether an optimizer stepped it, or its values changed, on any process."""
        flags = [id(parameter) in self.driven for parameter in self.parameters]
        if all(flags):
            return tuple(flags)
        changed = self._changed()
        return tuple(a or b for a, b in zip(flags, self._anywhere(changed), strict=True))

    def _changed(self) -> Sequence[bool]:
        """Whether the values that this process holds are others, by index."""
        if self.before is not None:
            pairs = zip(self.parameters, self.before, strict=True)
            return _differ([(_bits(parameter), _bits(before)) for parameter, before in pairs])
        versions = zip(self.parameters, self.versions, strict=True)
        changed = [parameter._version != version for parameter, version in versions]
        now = _prints([self.parameters[index] for index in self.printed])
        for index, same in zip(self.printed, (now == self.prints).tolist(), strict=True):
            changed[index] = not same
        return changed

    def _anywhere(self, flags: Sequence[bool]) -> Sequence[bool]:
        """Whether it is so in the part of any process, where parameters are sharded."""
        if not any(map(distributed.is_sharded, self.parameters)):
            return flags
        return [share > 0 for share in distributed.mean([*map(float, flags)])]


def _prints(tensors: Sequence[Tensor]) -> Tensor:
    """Int64[tensor], a fingerprint of what this process holds: another where one has changed."""
    prints = torch.empty(len(tensors), dtype=torch.int64)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for indices in by_device.values():  # each device is waited for once
        prints[indices] = torch.stack([_print(tensors[i]) for i in indices]).cpu()
    return prints


def _bits(tensor: Tensor) -> Tensor:
    """What this process holds, as whole numbers: NaN equals itself there, and 0 is not -0."""
    values = distributed.local(tensor.detach())
    whole = torch.view_as_real(values) if values.is_complex() else values
    return whole.reshape(-1).view(_WORDS[whole.element_size()])


def _print(tensor: Tensor) -> Tensor:
    bits = _bits(tensor)
    size = bits.element_size()
    if bits.numel() * size % 8 == 0 and bits.storage_offset() * size % 8 == 0:
        bits = bits.view(torch.int64)  # several numbers at once
    # Each place has a factor of its own, so that changes do not cancel: a plain sum would miss a
    # bit up here and one down there, and numbers that change places.
    factors = _factors(bits.device)
    first, *others = bits.split(len(factors))
    mixed: Tensor = (first * factors[: len(first)]).sum()
    for part in others:
        mixed = mixed * _MULTIPLIER + (part * factors[: len(part)]).sum()
    return mixed


@cache
def _factors(device: torch.device) -> Tensor:
    """Int64[part], odd and at random, as many as there are numbers in a part."""
    generator = torch.Generator().manual_seed(0)
    part = _PART if device.type == "cpu" else _PART_ELSEWHERE
    return (torch.randint(2**62, (part,), generator=generator, device="cpu") * 2 + 1).to(device)


def _differ(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether two tensors of a pair have different values; other devices are waited for once."""
    differs = [
        not torch.equal(*pair) if pair[0].device.type == "cpu" else (pair[0] != pair[1]).any()
        for pair in pairs
    ]
    asked = [flag for flag in differs if isinstance(flag, Tensor)]
    if asked:
        told = iter(torch.stack([flag.to(asked[0].device) for flag in asked]).tolist())
        return [next(told) if isinstance(flag, Tensor) else flag for flag in differs]
    return [bool(flag) for flag in differs]
