"""Which layers to train: where an unlearning step forgets most for what it costs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geffect.gram import inner
from geffect.layers import Parameter
from geffect.numbers import is_number, is_whole, percent
from geffect.places import HEAD
from geffect.sources import FORGET, UPDATE
from geffect.store import Run

from .base import Floats, check_run, risks_of, summed_gram
from .intervals import ENOUGH_ROWS, share_below
from .learned_layers import learned_in

SHARE = 0.5
"""The share of the gain of all layers that is chosen where nothing else is asked for."""

ENOUGH = 1 - 1e-9
"""So much of the gain that is wanted is all of it but for rounding."""

LEVEL, REPLICATES = 0.95, 2000
"""Of the intervals: what share of them holds the value, and how often the steps are drawn."""


@dataclass(frozen=True)
class Recommendation:
    """The layers that were chosen, and what each of them would bring and cost.

    - `layers`: those that were chosen, best first.
    - `pattern`: a regular expression that finds the names of their parameters and no others; for
      `trainable_params_regex` of open-unlearning and the like, which match whole names.
    - `warnings`: what speaks against it, in sentences.
    - `table`: a row a layer in network order, with the columns layer, gain, low, high, harm, ratio,
      learned, parameters, fraction and chosen. `learned` is `learned_in` of a block, NaN elsewhere;
      `fraction` is what the target needs of a chosen layer.
    - `learned`: the blocks, the one first in which the facts were most likely learned.
    """

    layers: tuple[str, ...]
    pattern: str
    warnings: tuple[str, ...]
    learned: tuple[str, ...]
    table: pd.DataFrame = field(repr=False, compare=False)


def recommended_layers(
    run: Run, *, count: int | None = None, share: float | None = None, seed: int = 0
) -> Recommendation:
    """The layers in which a run forgets at the least cost to what should stay.

    - `count`: how many layers to choose, at most.
    - `share`: choose until so much of the gain of all layers is had; 0.5 if neither is given.
    - `seed`: that of the intervals.

    Of a layer l, summed over the steps t of the run, with the updates D as the optimizer made them:

        gain  a_l = sum_t <grad R_forget, D_t>_l
        harm  h_l = sum over all other risks S of max(0, sum_t <grad R_S, D_t>_l)

    By how much the forget risk rises there, and the others do, in nats to first order; layers add
    up to the model. The layers of the largest a_l / h_l come first, of two alike the smaller one:
    the optimum of a fractional knapsack. `low` and `high` are 95 % intervals of the gain, from a
    bootstrap over steps; a layer whose interval reaches down to 0 is never chosen. Neither are
    embedding, norm and head, which stand apart: a model whose head alone is trained hides what it
    should forget. Where more than half of the gain is in the head and the last layer, `warnings`
    says so.

    A gain says where this update forgets, not where a fact lies: gradients are larger in early
    blocks. Where the facts were most likely learned is `learned`, by `learned_in`.

    Raises a ValueError for a run without update, without `forget`, without another risk, or of
    fewer than 8 steps: the first steps of a model that has memorised its data say nothing.
    """
    check_run(run)
    _check_asked(count, share)
    harmed = [name for name in risks_of(run) if name != FORGET]
    if not harmed:
        raise ValueError(
            f"`run` should have a risk on data that should stay. Found {', '.join(run.sources)}. "
            "Record one beside `forget`, such as retain=..."
        )
    names, K = summed_gram(run, "layer")
    update = run.index(UPDATE)
    changes = {name: inner(K, run.index(name), update) for name in (FORGET, *harmed)}
    known = np.isfinite(np.stack([*changes.values()])).all(axis=(0, 2))
    if known.sum() < ENOUGH_ROWS:
        raise ValueError(
            f"`run` should have at least {ENOUGH_ROWS} steps with an update, for gains to be told "
            f"from noise. Found {known.sum()} in `{run.path}`. Record more steps."
        )
    steps = {name: change[known] for name, change in changes.items()}
    gain = steps[FORGET].sum(axis=0)
    harm = sum(np.maximum(0.0, steps[name].sum(axis=0)) for name in harmed)
    low, high = _interval(steps[FORGET], seed)
    size = _sizes(run, names)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gain > 0, gain / harm, 0.0)
    blocks = _blocks(run, names)
    certain = blocks & (low > 0)
    order = sorted(np.flatnonzero(certain), key=lambda i: (-ratio[i], size[i], i))
    fraction = np.zeros(len(names))
    wanted = np.inf if count is not None else (SHARE if share is None else share) * gain.sum()
    for place in order[:count]:
        if gain @ fraction >= wanted * ENOUGH:
            break
        fraction[place] = min(1.0, (wanted - gain @ fraction) / gain[place])
    chosen = [int(place) for place in order if fraction[place] > 0]
    likely = learned_in(run)
    learned = tuple(sorted(likely, key=lambda layer: -likely[layer]))
    table = pd.DataFrame(
        {
            "layer": pd.Categorical(names, categories=names, ordered=True),
            "gain": gain, "low": low, "high": high, "harm": harm, "ratio": ratio,
            "learned": [likely.get(name, np.nan) for name in names], "parameters": size,
            "fraction": fraction, "chosen": fraction > 0,
        }
    )  # fmt: skip
    layers = tuple(names[place] for place in chosen)
    warned = [
        *_short(gain, fraction, wanted, layers, count, int(blocks.sum())),
        *_late(run, names, blocks, {"run": gain, "layers that are chosen": gain * fraction}),
    ]
    return Recommendation(layers, _pattern(run.layers, layers), tuple(warned), learned, table)


def _check_asked(count: int | None, share: float | None) -> None:
    if count is not None and share is not None:
        raise ValueError(
            "`count` or `share` should say how many layers to choose. Found both. Leave one out."
        )
    if not (count is None or is_whole(count, 1)):
        raise ValueError(
            f"`count` should be a whole number of at least 1. Found `count = {count!r}`. Pass the "
            "number of layers to train."
        )
    if share is not None and not (is_number(share) and 0 < share <= 1):
        raise ValueError(
            f"`share` should be above 0 and at most 1. Found `share = {share!r}`. Pass 0.5 for "
            "half of the gain."
        )


def _interval(gains: Floats, seed: int) -> tuple[Floats, Floats]:
    """Percentiles of the sum over steps that are drawn anew, widened for their number."""
    count = len(gains)
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=REPLICATES)
    beyond = share_below(LEVEL, count)
    low, high = np.quantile(drawn @ gains, [beyond, 1 - beyond], axis=0)
    return low, high


def _sizes(run: Run, names: Sequence[str]) -> NDArray[np.int64]:
    return np.array([sum(p.numel for p in run.layers if p.layer == name) for name in names])


def _blocks(run: Run, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which layers are blocks of the network: neither embedding, nor norm, nor head."""
    inside = {p.layer for p in run.layers if p.index >= 0}
    return np.array([name in inside for name in names])


def _short(
    gain: Floats,
    fraction: Floats,
    wanted: float,
    layers: Sequence[str],
    count: int | None,
    blocks: int,
) -> list[str]:
    """That there is less to choose from than was asked for; `blocks` is how many layers can be."""
    if count is not None and len(layers) < count:
        found = (
            "of the others it is not certain that training them forgets"
            if len(layers) < blocks
            else "there are no others beside embedding, norm and head"
        )
        return [f"Layers that are chosen: {len(layers)}, and not {count}: {found}."]
    had = float(gain @ fraction)
    if count is None and wanted <= 0:
        return [
            f"The run does not forget: its gain is {gain.sum():.3g} nats, so that no layer is "
            "chosen."
        ]
    if count is None and had < wanted * ENOUGH:
        return [
            f"The layers of which it is certain that training them forgets have {had:.3g} of the "
            f"{wanted:.3g} nats that were asked for."
        ]
    return []


def _late(
    run: Run, names: Sequence[str], blocks: NDArray[np.bool_], gains: Mapping[str, Floats]
) -> list[str]:
    """That most of a gain is where forgetting hides."""
    heads = {p.layer for p in run.layers if HEAD in re.split(r"[+ ]", p.layer)}
    last = [name for name, block in zip(names, blocks, strict=True) if block][-1:]
    late = np.array([name in heads or name in last for name in names])
    where = " and ".join(name for name, is_late in zip(names, late, strict=True) if is_late)
    for whose, gain in gains.items():
        there, total = (np.maximum(0.0, own).sum() for own in (gain[late], gain))
        if there > 0.5 * total:
            return [
                f"{percent(there / total)} of the gain of the {whose} is in {where}. What is "
                "changed there alone is often hidden and not forgotten: see in an audit whether it "
                "comes back."
            ]
    return []


def _pattern(parameters: Sequence[Parameter], layers: Sequence[str]) -> str:
    """A regular expression of the names of the parameters of these layers, and of no others."""
    own = {p.name for p in parameters if p.layer in layers}
    numbers: dict[str, list[str]] = {}  # of the modules that hold a layer each, by their list
    for layer in dict.fromkeys(p.layer for p in parameters if p.layer in layers):
        names = [p.name.split(".") for p in parameters if p.layer == layer]
        shared = [words[0] for words in zip(*names, strict=False) if len({*words}) == 1]
        places = [i for i, word in enumerate(shared) if word.isdecimal()]
        if places:
            numbers.setdefault(".".join(shared[: places[0]]), []).append(shared[places[0]])
    lists = [rf"{re.escape(of)}\.({'|'.join(found)})\..*" for of, found in numbers.items()]
    pattern = f"^(?:{'|'.join(lists)})$"
    if lists and {p.name for p in parameters if re.fullmatch(pattern, p.name)} == own:
        return pattern if len(lists) > 1 else f"^{lists[0]}$"
    # Layers that are no module of a list, or share one with others.
    return f"^(?:{'|'.join(map(re.escape, sorted(own)))})$" if own else "(?!)"
