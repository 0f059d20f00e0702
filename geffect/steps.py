"""What a step moved, whoever took it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from geffect import distributed
from geffect.fingerprints import bits, differ, fingerprints
from geffect.optimizers import at_rest_in, described, moved_by, rate_of, tensors_of


def check_shapes(parameters: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    """Refuse parameters that grew or shrank in place: no difference tells what that moved.

    >>> check_shapes([torch.ones(3)], [torch.Size([2])])
    Traceback (most recent call last):
    ValueError: The parameters should keep their shapes. Found one of (2,) that is (3,) now, ...
    """
    for parameter, shape in zip(parameters, shapes, strict=True):
        if parameter.shape != shape:
            raise ValueError(
                f"The parameters should keep their shapes. Found one of {tuple(shape)} that is "
                f"{tuple(parameter.shape)} now, as where a vocabulary was resized. Record what "
                "follows into another file, with a new Recorder."
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


@dataclass(frozen=True)
class Move:
    """What has moved the parameters since a gradient.

    - `stepped`: Bool[parameter], whether an optimizer stepped it or its values changed; None where
      nothing was seen to move. An optimizer does not step what has no gradient.
    - `update`: theta now minus theta at the gradient, to be read before anything else moves; None
      where it is not followed, or where training ended before anything moved.
    - `lr`, `optimizer`: the learning rate of the optimizer that steps the first of the parameters
      which any did, and the description of those that stepped what none did before.
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
            resting=set(),
            before=[p.detach().clone() for p in parameters] if self._updates else None,
            shapes=[p.shape for p in parameters],
            versions=[p._version for p in parameters],
            printed=printed,
            prints=fingerprints([parameters[i] for i in printed]),
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
            self._known = frozenset(self._step.stepped & self._own) - self._step.resting
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
    driven: set[int]  # of these, what had a gradient then and a learning rate
    resting: set[int]  # of these, what had no learning rate
    before: Sequence[Tensor] | None  # copies, where the update is followed
    shapes: Sequence[torch.Size]
    versions: Sequence[int]
    printed: Sequence[int]  # indices of those whose bits are looked at, without copies
    prints: Tensor
    known: set[int] = field(default_factory=set)  # held by these optimizers
    # The first parameter that an optimizer holds, its learning rate, and what it is.
    optimizers: list[tuple[int, float, Mapping[str, Any]]] = field(default_factory=list)
    # Of the last news: what was stepped, and prints of all parameters where the update is followed.
    told: tuple[Tensor, tuple[bool, ...]] | None = None

    def take(self, optimizer: torch.optim.Optimizer, driven: frozenset[int]) -> None:
        """Count a step of the optimizer, which moves what is `driven`."""
        held = frozenset(map(id, tensors_of(optimizer)))
        if not held <= self.known:  # one that stands around another one adds nothing
            first = next(i for i, p in enumerate(self.parameters) if id(p) in held)
            self.optimizers.append((first, rate_of(optimizer), described(optimizer)))
        self.known |= held
        self.stepped |= held
        resting = frozenset(map(id, at_rest_in(optimizer)))
        self.resting |= resting
        self.driven.update(driven - resting)

    def news(self, *, at_gradient: bool) -> Move | None:
        """What has moved, if that is something else than was told."""
        check_shapes(self.parameters, self.shapes)
        stepped = self._moved()
        now = fingerprints(self.parameters if self.before is not None else [])
        if self.told is not None:
            prints, flags = self.told
            if not any(self._anywhere([not torch.equal(prints, now)])) and flags == stepped:
                return None
        self.told = now, stepped
        seen = any(stepped)
        update = None
        if self.before is not None and (seen or at_gradient):
            update = Differences(self.before, self.parameters, stepped)
        return Move(stepped if seen else None, update, *self._told_of_optimizers())

    def _told_of_optimizers(self) -> tuple[float, Mapping[str, Any] | None]:
        """The first learning rate, and all optimizers as if they were one; none where none stepped.

        In the order of the parameters that they hold, whichever stepped before the others.
        """
        if not self.optimizers:
            return float("nan"), None
        _, rates, told = zip(*sorted(self.optimizers, key=itemgetter(0)), strict=True)
        groups = [group for optimizer in told for group in optimizer["groups"]]
        return rates[0], {"class": " and ".join(each["class"] for each in told), "groups": groups}

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
            return differ([(bits(parameter), bits(before)) for parameter, before in pairs])
        versions = zip(self.parameters, self.versions, strict=True)
        changed = [parameter._version != version for parameter, version in versions]
        now = fingerprints([self.parameters[index] for index in self.printed])
        for index, same in zip(self.printed, (now == self.prints).tolist(), strict=True):
            changed[index] = not same
        return changed

    def _anywhere(self, flags: Sequence[bool]) -> Sequence[bool]:
        """Whether it is so in the part of any process, where parameters are sharded."""
        if not any(map(distributed.is_sharded, self.parameters)):
            return flags
        return [share > 0 for share in distributed.mean([*map(float, flags)])]
