"""Where two runs part: the first step, the layers, and what that says of the cause."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect.layers import Parameter, in_network_order
from geffect.numbers import counted
from geffect.scores import Score, tidy
from geffect.sources import UPDATE, is_reserved
from geffect.store import Run

from .base import Floats, check_run

SCORE = Score("difference of Gram matrices, over the lengths of the gradients")

TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 16 * 2**-10, "bfloat16": 16 * 2**-7}
"""What counts as rounding, by the type of the parameters: for short types 16 times its epsilon."""

ALIKE = 1e-3
"""How far a common factor of two updates may differ from layer to layer."""

AT_ONCE = 2**17
"""So many products are held against each other at a time: they stay in the processor's cache."""

Level = Literal["identical", "rounding", "diverged"]


@dataclass(frozen=True)
class Comparison:
    """Two runs, held against each other step by step.

    - `level`: "identical" bit for bit, equal but for "rounding", or "diverged".
    - `step`: the first one at which they differ by more than rounding, else None.
    - `layers`: where the difference begins, in network order; none where it is not of layers.
    - `sentence`: what was found, for people.
    - `table`: how far apart they are; columns step, parameter, layer, value, score, unit.
    """

    level: Level
    step: int | None
    layers: tuple[str, ...]
    sentence: str
    _steps: NDArray[np.int64] = field(repr=False, compare=False)
    _parameters: Sequence[Parameter] = field(repr=False, compare=False)
    _distance: Floats = field(repr=False, compare=False)

    @cached_property
    def table(self) -> pd.DataFrame:
        """How far apart they are; made where it is asked for."""
        names, layers = zip(*((p.name, p.layer) for p in self._parameters), strict=True)
        return tidy(
            self._distance,
            SCORE,
            steps=self._steps,
            blocks=names,
            by="parameter",
            layer=pd.Categorical(layers * len(self._steps), [*dict.fromkeys(layers)]),
        )


def compare(run: Run, other: Run) -> Comparison:
    """Whether two runs are the same, and where they part if they are not.

    At a step, and for a parameter, K and L are the Gram matrices of the two runs. Their difference
    is max_ij |K_ij - L_ij| / sqrt(m_i m_j), where m is the larger of the squared lengths K_ii and
    L_ii: 0 for the same gradients, and 2 for opposite ones. Up to 1e-5 it counts as rounding of
    float32; up to 16 epsilon where a run has parameters of a shorter type.

    The first step with a larger difference tells the cause, since every row has the losses, the
    gradients and the update of one step:

    - The update alone differs: the optimizer. In all layers by one factor: the learning rate.
    - Gradients differ, losses do not: the backward pass, from the last layer that differs on.
    - Losses differ: the data of those sources, or the model that ran forward.

    Steps and sources that both have are compared. Raises a ValueError for runs of other parameters,
    or with no step or source in common.

    >>> compare(example_run(), example_run()).sentence
    'The runs are identical: their one step is the same, bit for bit.'
    """
    check_run(run)
    check_run(other)
    pair = _Pair.of(run, other)
    distance = pair.distance(pair.sources)
    numbers = (pair.steps, run.layers, distance)
    apart = (distance > pair.tolerance).any(axis=1) | pair.losses_differ.any(axis=1)
    if not apart.any():
        level: Level = "identical" if pair.is_identical else "rounding"
        return Comparison(level, None, (), pair.told(_same(pair, distance)), *numbers)
    at = int(np.argmax(apart))
    layers, cause = _origin(pair, at)
    step = int(pair.steps[at])
    said = pair.told(f"The runs part at step {step}: {cause}.")
    return Comparison("diverged", step, layers, said, *numbers)


@dataclass(frozen=True)
class _Pair:
    """The steps and sources that two runs share: Gram matrices, losses, and what is rounding.

    - `gram`: of each run that of all its sources; `places` says where the shared ones stand there.
    """

    run: Run
    other: Run
    steps: NDArray[np.int64]
    sources: tuple[str, ...]
    gram: tuple[Floats, Floats]
    places: tuple[dict[str, int], dict[str, int]]
    losses: tuple[Floats, Floats]
    tolerance: float

    @classmethod
    def of(cls, run: Run, other: Run) -> "_Pair":
        _check_parameters(run, other)
        sources = tuple(name for name in run.sources if name in other.sources)
        keys = [[*zip(r.column("request"), r.steps, strict=True)] for r in (run, other)]
        places = [{key: at for at, key in enumerate(own)} for own in keys]
        shared = [key for key in keys[0] if key in places[1]]
        if not sources or not shared:
            raise ValueError(
                "Runs that are compared should have a step and a source in common. Found "
                f"{_listed(run.sources)} at {len(run.steps)} steps, and "
                f"{_listed(other.sources)} at {len(other.steps)}. Compare runs of one training."
            )
        gram, losses = [], []
        for one, place in zip((run, other), places, strict=True):
            at = [place[key] for key in shared]
            gram.append(one.gram() if at == [*range(len(one.steps))] else one.gram()[at])
            known = one.losses()
            nothing = np.full(len(one.steps), np.nan)
            losses.append(np.stack([known.get(name, nothing)[at] for name in sources], axis=1))
        types = {parameter.dtype for r in (run, other) for parameter in r.layers}
        return cls(
            run, other, np.array([step for _, step in shared]), sources,
            (gram[0], gram[1]), (_places(run, sources), _places(other, sources)),
            (losses[0], losses[1]),
            max(TOLERANCE.get(dtype, TOLERANCE["float32"]) for dtype in types),
        )  # fmt: skip

    @property
    def is_identical(self) -> bool:
        return (
            len(self.steps) == len(self.run.steps) == len(self.other.steps)
            and self.run.sources == self.other.sources
            and _are_the_same(*self.gram)
            and _are_the_same(*self.losses)
        )

    @property
    def losses_differ(self) -> NDArray[np.bool_]:
        """Bool[step, source], of the losses that are no sums of others: those may cancel out."""
        a, b = self.losses
        with np.errstate(invalid="ignore"):
            apart = np.abs(a - b) > self.tolerance / 10 * np.maximum(np.abs(a), np.abs(b))
        declared = self.run.manifest.get("losses", {})
        is_sum = [isinstance(declared.get(name), dict) for name in self.sources]
        # No difference of infinities is a number.
        odd = (a != b) & ~(np.isfinite(a) & np.isfinite(b)) & ~(np.isnan(a) & np.isnan(b))
        apart = (apart | odd) & ~np.array(is_sum)
        return np.asarray(apart, dtype=np.bool_)

    def distance(self, sources: Sequence[str]) -> Floats:
        """Float64[step, parameter] over these sources.

        What is not there in both is infinitely far, but for the update of the last step of a run,
        which that run does not know.
        """
        at_once = max(1, AT_ONCE // max(1, self.gram[0][0].size))
        begins = range(0, len(self.steps), at_once)
        parts = [self._distance(sources, slice(at, at + at_once)) for at in begins]
        return np.concatenate(parts)

    def distance_at(self, at: int, sources: Sequence[str], factor: float = 1.0) -> Floats:
        """Float64[parameter], that of one step; `factor` scales the update of the first run."""
        (found,) = self._distance(sources, slice(at, at + 1), factor)
        return np.asarray(found)

    def _distance(self, sources: Sequence[str], at: slice, factor: float = 1.0) -> Floats:
        K, L = (
            _chosen(one[at], [places[name] for name in sources])
            for one, places in zip(self.gram, self.places, strict=True)
        )
        if UPDATE in sources:
            u = sources.index(UPDATE)
            K[..., u, :] *= factor
            K[..., :, u] *= factor
            unknown = np.isnan(K[..., u, u]) | np.isnan(L[..., u, u])
            for one in (K, L):
                one[unknown, u, :] = one[unknown, :, u] = 0.0
        # What is estimated from disjoint batches may be a negative square.
        lengths = np.sqrt(np.maximum(*(np.abs(np.einsum("...ii->...i", one)) for one in (K, L))))
        with np.errstate(invalid="ignore", divide="ignore"):
            # One length after the other: the product of two tiny ones would underflow.
            apart = np.abs(K - L) / lengths[..., :, np.newaxis] / lengths[..., np.newaxis, :]
        np.copyto(apart, 0.0, where=(K == L) | (np.isnan(K) & np.isnan(L)))
        np.copyto(apart, np.inf, where=np.isnan(apart))
        return np.asarray(apart.max(axis=(-1, -2), initial=0.0), dtype=np.float64)

    def layers_where(self, apart: NDArray[np.bool_]) -> tuple[str, ...]:
        """The layers of the parameters, in network order."""
        own = [p for p, differs in zip(self.run.layers, apart, strict=True) if differs]
        return tuple(in_network_order(own, [parameter.layer for parameter in own]))

    def told(self, sentence: str) -> str:
        """The sentence, with what only one of the runs has."""
        remarks = []
        for one, rest in ((self.run, self.other), (self.other, self.run)):
            further = [name for name in one.sources if name not in self.sources]
            if further:
                remarks.append(f"Only `{one.name}` has {_listed(further)}.")
            more = len(one.steps) - len(self.steps)
            if more:
                remarks.append(
                    f"`{one.name}` has {counted(more, 'step')} that `{rest.name}` has not."
                )
        different = [
            word for key, word in _SAID.items() if _said(self.run, key) != _said(self.other, key)
        ]
        if different:
            remarks.append(f"Their files name another {_listed(different)}.")
        return " ".join([sentence, *remarks])


_SAID = {
    "objective": "objective",
    "losses": "declaration of losses",
    "optimizer": "optimizer",
    "rectifier": "rectifier",
}
"""What the manifest says of how a run was made, in words."""


def _said(run: Run, key: str) -> Any:
    return run.manifest.get(key)


def _are_the_same(a: Floats, b: Floats) -> bool:
    """Bit for bit, the sign of a zero too; of NaN there is one."""
    numbers = ~np.isnan(a)
    signs = np.array_equal(np.signbit(a) & numbers, np.signbit(b) & numbers)
    return signs and np.array_equal(a, b, equal_nan=True)


def _same(pair: _Pair, distance: Floats) -> str:
    count = len(pair.steps)
    if pair.is_identical:
        which = "their one step is" if count == 1 else f"all {count} steps are"
        return f"The runs are identical: {which} the same, bit for bit."
    if not distance.any():
        return (
            f"The runs are the same, bit for bit, in the {counted(count, 'step')} that both have."
        )
    at, which_one = np.unravel_index(distance.argmax(), distance.shape)
    types = sorted({p.dtype for run in (pair.run, pair.other) for p in run.layers})
    return (
        f"The runs agree to rounding: they are apart by {distance.max():.2g} at most, at step "
        f"{pair.steps[at]} in `{pair.run.layers[which_one].name}`; up to {pair.tolerance:.2g} "
        f"counts as rounding of {_listed(types)}."
    )


def _origin(pair: _Pair, at: int) -> tuple[tuple[str, ...], str]:
    """The layers where a difference begins, and the cause, in words."""
    for is_meant, told in _CAUSES:
        sources = [name for name in pair.sources if is_meant(name)]
        apart = pair.distance_at(at, sources) > pair.tolerance
        losses = [
            name
            for name, differs in zip(pair.sources, pair.losses_differ[at], strict=True)
            if differs and name in sources
        ]
        if apart.any() or losses:
            return told(pair, at, apart, losses)
    # The products of two kinds differ, and those of neither kind.
    everything = pair.distance_at(at, pair.sources) > pair.tolerance
    return pair.layers_where(everything), "directions of the update against the gradients"


def _of_gradients(
    pair: _Pair, at: int, apart: NDArray[np.bool_], losses: list[str]
) -> tuple[tuple[str, ...], str]:
    if losses:
        return (), _forward(pair, at, losses)
    layers = pair.layers_where(apart)
    before = f", unless {_unseen(pair, at)} differ a little" if _unseen(pair, at) else ""
    return layers[-1:], (
        f"backward. Losses are equal and gradients differ, in {_listed(layers)}; of these "
        f"{layers[-1]} is nearest to the loss, and the others inherit what it passes on{before}"
    )


def _forward(pair: _Pair, at: int, losses: list[str]) -> str:
    known = ~np.isnan(pair.losses[0][at]) & [not is_reserved(name) for name in pair.sources]
    declared = pair.run.manifest.get("losses", {})
    own = [
        name
        for name, there in zip(pair.sources, known, strict=True)
        if there and not isinstance(declared.get(name), dict)
    ]
    if len(losses) < len(own):
        one = len(losses) == 1
        return (
            f"forward, source{'' if one else 's'} {_listed(losses)}. The other losses are equal, "
            f"so the data of {'this one' if one else 'these'} differ"
        )
    before = f", or {_unseen(pair, at)}" if _unseen(pair, at) else ""
    return f"forward, all losses. The data of every source differ, or the model{before}"


def _unseen(pair: _Pair, at: int) -> str:
    """What came before a step and is in no row."""
    if at == 0:
        return "the parameters to begin with"
    if UPDATE not in pair.sources:
        return f"the parameters after step {pair.steps[at - 1]}, whose update is not recorded,"
    return ""


def _of_rectifier(
    pair: _Pair, at: int, apart: NDArray[np.bool_], losses: list[str]
) -> tuple[tuple[str, ...], str]:
    layers = pair.layers_where(apart)
    return layers, (
        "rectifier. Gradients of the losses are equal; its average or the gradient that it made "
        f"differs, in {_listed(layers)}"
    )


def _of_update(
    pair: _Pair, at: int, apart: NDArray[np.bool_], losses: list[str]
) -> tuple[tuple[str, ...], str]:
    layers, of_both = pair.layers_where(apart), [places[UPDATE] for places in pair.places]
    squares = [one[at, :, u, u] for one, u in zip(pair.gram, of_both, strict=True)]
    moved = (squares[0] > 0) | (squares[1] > 0)
    total = np.nansum(squares[0]), np.nansum(squares[1])
    if apart[moved].all() and all(total):
        factor = float(np.sqrt(total[1] / total[0]))
        if (pair.distance_at(at, pair.sources, factor) <= max(ALIKE, pair.tolerance)).all():
            return layers, (
                f"update, in all layers by a factor of {factor:.4g}. Gradients are equal, so the "
                "learning rate differs"
            )
    where = "all layers" if apart[moved].all() else _listed(layers)
    still = [
        f"`{run.name}` does not move {_listed(fixed)}"
        for run, square, against in zip((pair.run, pair.other), squares, squares[::-1], strict=True)
        if (fixed := pair.layers_where(apart & (square == 0) & (against > 0)))
    ]
    may = ["the optimizer", "what it may move"]
    if _said(pair.run, "rectifier") != _said(pair.other, "rectifier"):
        may.insert(0, "the rectifier")
    cause = f"update, in {where}. Gradients are equal, so {_listed(may, 'or')} differs"
    return layers, ". ".join([cause, *still])


def _is_gradient(source: str) -> bool:
    return not is_reserved(source)


def _is_made(source: str) -> bool:
    return is_reserved(source) and source != UPDATE


Told = Callable[[_Pair, int, NDArray[np.bool_], list[str]], tuple[tuple[str, ...], str]]

_CAUSES: tuple[tuple[Callable[[str], bool], Told], ...] = (
    (_is_gradient, _of_gradients),
    (_is_made, _of_rectifier),
    (lambda source: source == UPDATE, _of_update),
)
"""The kinds of sources in the order in which a step makes them, and what a difference tells."""


def _chosen(gram: Floats, of: Sequence[int]) -> Floats:
    """The products of these sources alone, as a copy."""
    at = np.array(of, dtype=np.intp)
    return gram[..., at[:, np.newaxis], at]


def _places(run: Run, sources: Sequence[str]) -> dict[str, int]:
    return {name: run.index(name) for name in sources}


def _listed(names: Sequence[str], joined: str = "and") -> str:
    *first, last = names
    return f"{', '.join(first)} {joined} {last}" if first else last


def _check_parameters(run: Run, other: Run) -> None:
    here, there = ([(p.name, p.shape) for p in one.layers] for one in (run, other))
    if here != there:
        differing = sorted({name for name, _ in {*here} ^ {*there}}) or ["their order"]
        shown = ", ".join(f"`{name}`" for name in differing[:3])
        raise ValueError(
            f"Runs that are compared should have the same parameters. Found {len(differing)} that "
            f"differ between `{run.name}` and `{other.name}`, among them {shown}. Compare runs of "
            "one model."
        )
