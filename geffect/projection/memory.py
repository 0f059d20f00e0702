"""What a rectifier remembers of the retain gradients that it has seen."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from geffect import distributed
from geffect.gradients import Vector, peak
from geffect.interrupts import Once, to_the_end

from .graphless import without_graph
from .kept import Change, Kept, Make, State
from .selection import Roots

SECOND_MOMENT_DECAY = 0.999

ROUNDING = 2.0**-23
"""How small a retain gradient may be beside the objective's: the machine epsilon of float32."""

NOISE = "rounding noise beside the objective's"


class RetainMemory:
    """The running averages of the retain gradients, and what else of them is wanted.

    average <- weight r + (1 - weight) average, one for each retain set, started at the first
    gradient, or `from_zero` (arXiv 2503.09117; its gamma weighs the new gradient, the opposite of
    momentum).
    v <- 0.999 v + 0.001 (sum of r^2 over the sets), one for all, started at zero. A parameter that
    no retain loss has reached yet has None.

    With a `history` of one retain set and weight 1, the gradients of that many earlier steps are
    kept as they are, and the oldest makes room for the newest: 1 + history vectors of the model's
    size in all.

    A gradient does not count if it is zero (float32 below its normal numbers is zero too), not
    finite, or rounding noise, as a distance to the model's own outputs leaves it at the start. It
    is noise if no coordinate reaches 2^-23 times the largest one of the objective gradient of the
    step that the averages began in, in any type of parameters.

    >>> memory = RetainMemory(["retain"], 0.25, second_moment=False, state=State())
    >>> for value in (1.0, 3.0):
    ...     memory.update({"retain": [torch.tensor([value])]})
    >>> memory.retain(0)
    [tensor([1.5000])]
    """

    def __init__(
        self,
        sets: Sequence[str],
        weight: float,
        *,
        second_moment: bool,
        state: State,
        from_zero: bool = False,
        history: int = 0,
    ) -> None:
        self.weight, self.state, self.from_zero = weight, state, from_zero
        self._earlier = [Kept(state) for _ in range(history)]  # the newest first
        self._averages = {name: Kept(state) for name in sets}
        self._squares = Kept(state) if second_moment else None
        self._count = 0
        self._floor = 0.0  # what a gradient has at least, once that is known
        self._smallest = 0.0  # of the sets, by the largest coordinate of the last gradient

    @property
    def ready(self) -> bool:
        """Whether there is an average yet."""
        return self._count > 0

    @property
    def compares(self) -> bool:
        """Whether `compare` is to be told of the objective gradient."""
        return self.ready and self._floor == 0.0

    def update(
        self,
        gradients: Mapping[str, Vector],
        *,
        agree: bool = True,
        peaks: Mapping[str, float] | None = None,
    ) -> str | None:
        """Take in a gradient of every set, or none of them and say why.

        What is zero or not finite on any process is left out on all. With agree=False they do not
        ask each other: left out is only what is not finite here, and only here. `peaks` are the
        largest coordinates, over all processes, of those that they are known of.
        """
        news = {name: gradients[name] for name in self._averages}
        known = peaks or {}
        peaks = {
            name: known[name] if name in known else _over_all(peak(new), agree=agree)
            for name, new in news.items()
        }
        for name, largest in peaks.items():
            problem = self._problem(largest, agree=agree)
            if problem is not None:
                return problem if len(news) == 1 else f"{problem} for `{name}`"
        weight = self.weight if self.ready or self.from_zero else 1.0
        counted, smallest, once = self._count + 1, min(peaks.values()), Once()
        averages, earlier = self._turned()
        changes: list[tuple[Kept, Sequence[Sequence[Tensor | None]], Change]] = [
            (average, [[tensor] for tensor in new], partial(_mix, weight=weight))
            for average, new in zip(averages.values(), news.values(), strict=True)
        ]
        if self._squares is not None:
            changes.append((self._squares, list(zip(*news.values(), strict=True)), _add_squares))
        # All the room there has to be, before anything is changed.
        rooms = [kept.room_for(new) for kept, new, _ in changes]

        def take_in() -> None:
            once.begin()
            self._count, self._smallest = counted, smallest
            self._averages, self._earlier = averages, earlier
            # Each tensor of each step is rounded by random numbers of its own, and by the same ones
            # on another process and in a run that was resumed. A new tensor changes two kept ones
            # at most.
            seeds = count(2 * counted * sum(map(len, news.values())))
            for (kept, new, by), room in zip(changes, rooms, strict=True):
                kept.change(new, by, seeds, room, once)

        without_graph(lambda: to_the_end(take_in))
        return None

    def compare(self, largest: float) -> str | None:
        """Leave out what was taken in just now, and say why, if it is noise and the only gradient.

        `largest` is the largest coordinate of the objective gradient of the step, which is often
        there only when the retain gradient has been let go.
        """
        floor = ROUNDING * largest
        if not floor < float("inf"):
            return None  # of a gradient that is none
        if self._count == 1 and 0.0 < self._smallest < floor:
            to_the_end(self._clear)
            return NOISE
        self._floor = floor
        return None

    def mark(self) -> Callable[[], None]:
        """What takes back the floor that `compare` finds."""
        floor = self._floor

        def put_back() -> None:
            self._floor = floor

        return put_back

    def retain(self, i: int) -> list[Tensor | None]:
        """The averages of parameter i, one a set, and behind them the earlier gradients.

        They are float32, on the parameter's device.
        """
        kept = [*self._averages.values(), *self._earlier]
        return [vector[i] if vector.tensors else None for vector in kept]

    def vector(self, name: str) -> Vector:
        """The average of one set, as it is whenever it is looked at; empty before the first."""
        return self._averages[name]

    def scale(self, i: int) -> Tensor | None:
        """The root mean square of parameter i, sqrt(v / (1 - 0.999^steps)), float32.

        None where no gradient has reached it, or squares are not remembered.
        """
        return self.roots(i)

    @property
    def roots(self) -> Roots:
        """The same of all parameters, which need not be taken whole."""
        kept = self._squares if self.ready else None
        return Roots(
            lambda i: None if kept is None else kept[i],
            share=1 - SECOND_MOMENT_DECAY**self._count,
        )

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """All that is remembered, by the names of the parameters: the tensors in use, not copies.

        That of a sharded parameter is a DTensor, and None that of one that no gradient has reached.
        """
        return {"count": self._count, "floor": self._floor} | {
            key: dict(zip(names, kept.tensors or [None] * len(names), strict=True))
            for key, kept in self._vectors().items()
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Go on as the memory that the state is of would have; the tensors are copied.

        Averages mean the same whatever weight and State they go on with, so both may be others.
        """
        vectors = self._vectors()
        if state.keys() != (wanted := {"count": 0, "floor": 0, **vectors}).keys():
            raise ValueError(
                f"`state` should hold {_listed(wanted)}. Found {_listed(state)}. "
                "Make the rectifier with the retain sets, `select`, `correction` and `history` "
                "that the saved one had."
            )
        for key in vectors:
            _check_saved(key, state[key], parameters)
        self._count, self._floor = int(state["count"]), float(state["floor"])
        for key, kept in vectors.items():
            kept.load([(state[key][name], like) for name, like in parameters.items()])

    def _problem(self, largest: float, *, agree: bool) -> str | None:
        """Why a gradient with this largest coordinate is not taken in."""
        if not largest < float("inf"):
            return "not finite"
        # What is left of it has no digits. Where others are not asked they may have more of it.
        if agree and largest < torch.finfo(torch.float32).tiny:
            return "zero"
        return NOISE if 0.0 < largest < self._floor else None

    def _turned(self) -> tuple[dict[str, Kept], list[Kept]]:
        """Where a gradient goes, and where the one before it then is: nothing is copied."""
        if not self._earlier:
            return self._averages, self._earlier
        ((name, newest),) = self._averages.items()
        *others, oldest = self._earlier
        return {name: oldest}, [newest, *others]

    def _clear(self) -> None:
        for kept in self._vectors().values():
            kept.clear()
        self._count = 0

    def _vectors(self) -> dict[str, Kept]:
        averages = {f"average.{name}": kept for name, kept in self._averages.items()}
        squares = {} if self._squares is None else {"second_moment": self._squares}
        earlier = {f"earlier.{age}": kept for age, kept in enumerate(self._earlier, 1)}
        return averages | squares | earlier


def _mix(average: Tensor, new: Sequence[Tensor | None], make: Make, weight: float) -> None:
    (tensor,) = new
    if tensor is None:
        make(partial(average.mul_, 1 - weight))
    else:
        make(partial(average.lerp_, tensor, weight))


def _add_squares(mean: Tensor, news: Sequence[Tensor | None], make: Make) -> None:
    make(partial(mean.mul_, SECOND_MOMENT_DECAY))
    for tensor in news:
        if tensor is not None:
            make(partial(mean.addcmul_, tensor, tensor, value=1 - SECOND_MOMENT_DECAY))


def _over_all(largest: float, *, agree: bool) -> float:
    return distributed.max_over_ranks(largest) if agree else largest


def _check_saved(
    key: str, saved: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]
) -> None:
    """Refuse what was saved of another model, or in other parts."""
    missing = [name for name in parameters if name not in saved]
    unknown = [name for name in saved if name not in parameters]
    if missing or unknown:
        raise ValueError(
            f"`state` should have the parameters of this model in `{key}`. Found others: missing "
            f"are {_listed(missing)}; unknown are {_listed(unknown)}. Load the state of a "
            "rectifier of the same model, with the same parameters trained."
        )
    for name, parameter in parameters.items():
        tensor = saved[name]
        if tensor is None:
            continue
        own, other = (tuple(distributed.local(t).shape) for t in (parameter, tensor))
        if own != other:
            raise ValueError(
                f"`state` should have the shapes of this model's parameters. Found {other} for "
                f"`{name}`, which has {own} here. Load the state of a rectifier of the same model; "
                "of a sharded one, as this process of as many saved it."
            )


def _listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    quoted = [f"`{name}`" for name in names]
    more = f" and {len(quoted) - 3} more" if len(quoted) > 4 else ""
    return ", ".join(quoted[:3] if more else quoted) + more or "none"
