"""Whether logits depend on other tokens, found out by running a model twice."""

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress, product
from typing import Any

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.batch import masks_in
from geffect.codes import FLOATS, coded
from geffect.hooks import without_forward_hooks

from .undisturbed import undisturbed

FINE = 64 * torch.finfo(torch.float32).eps
"""What the places of a row may do to each other by rounding, as a share of the largest logit.

Where a place has no part in the sums of another, their logits are the same bit for bit, in any
type. A part that is taken back again, as by a convolution in frequencies, is rounded in float32.
"""

LATE = -1.0
"""In the place of the share of a change: it comes too late."""


@dataclass(frozen=True)
class Look:
    """What a model is looked at with: other tokens, which some of its logits should not tell.

    - `at`: `Bool[sample, position]`, where logits are looked at.
    - `refusal`: what is said of a model whose logits change, by so much.
    - `other`: the tokens under their name; nothing where this process has no need of a look.
    - `passed`: called where the model was seen not to tell.
    - `late`: whether they tell them at once, where they may.
    """

    at: Tensor
    refusal: Callable[[str], str]
    other: Mapping[str, Tensor] = field(default_factory=dict)
    passed: Callable[[], object] = lambda: None
    late: "LateLook | None" = None


@dataclass(frozen=True)
class LateLook:
    """Whether logits tell a token at its own place, as far as they tell it at all.

    - `told`: `Bool[sample, position]`, where they may tell those of the look, from the first on.
    - `first`: `Bool[sample, position]`, the first token of a text, whose logits tell no other one.
    - `other`: the tokens with another one there, under their name.
    - `refusal`: what is said of a model that tells no token at its own place.
    """

    told: Tensor
    first: Tensor
    other: Mapping[str, Tensor]
    refusal: str


def kind_of(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[object, ...]:
    """What decides what a model sees: its inputs, whether a mask is one of pairs, the kernel."""
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    masks = tuple(mask.ndim for mask in masks_in(inputs))
    return frozenset((n, getattr(x, "ndim", None)) for n, x in inputs.items()), masks, kernel


def is_in_parts(model: nn.Module) -> bool:
    """Whether all processes run a forward together, which hooks gather the parameters for."""
    if distributed.world_size() == 1:
        return False
    is_dtensor = any(hasattr(p, "placements") for p in model.parameters())
    return is_dtensor or not distributed.shares_forwards(model.parameters())


def without_cache(model: Any) -> dict[str, bool]:
    """What tells a model to keep nothing for tokens to come, where it would and takes that.

    >>> without_cache(nn.Identity())
    {}
    """
    if not getattr(getattr(model, "config", None), "use_cache", False):
        return {}
    takes = inspect.signature(model.forward).parameters
    is_taken = "use_cache" in takes or any(x.kind is x.VAR_KEYWORD for x in takes.values())
    return {"use_cache": False} if is_taken else {}


def look_at(model: Any, inputs: Mapping[str, Any], *looks: Callable[..., Look]) -> None:
    """Take the looks at a model that there is need of; a ValueError if its logits change.

    It is left as it was, and hooks on forwards are told nothing, whose state is not known: they
    count and record for others. Where logits change without hooks, or no forward is possible,
    hooks may be what makes the model right: these are then run.

    Processes that run their forwards together take a look where one of them needs it.

    - `looks`: each gives a look, for the model and inputs.
    """
    if not isinstance(model, nn.Module):
        return
    made = [look(model, inputs) for look in looks]
    needed, together = [bool(look.other) for look in made], is_in_parts(model)
    if together:
        votes = torch.tensor(needed, dtype=torch.float64)
        needed = distributed.exchange(lambda: votes).bool().tolist()
    for look in compress(made, needed):
        if together:
            found = _change(model, inputs, look, distributed.max_over_ranks)
        else:
            found = _change_alone(model, inputs, look)
        if found:
            late = look.late.refusal if look.late is not None else "in another process"
            told = look.refusal(f"{found:.2g} of the largest")
            raise ValueError(late if found == LATE else told)
        if found is not None:
            look.passed()


def _change_alone(model: nn.Module, inputs: Mapping[str, Any], look: Look) -> float | None:
    # What a model says of its own tokens, it says in the forward that was asked for.
    with suppress(Exception), without_forward_hooks(model):
        found = _change(model, inputs, look)
        if not found:  # a head of zeros shows nothing with hooks either
            return found
    with suppress(Exception):
        return _change(model, inputs, look)
    return None


def _change(
    model: nn.Module,
    inputs: Mapping[str, Any],
    look: Look,
    largest: Callable[[float], float] = float,
) -> float | None:
    """By what share of the largest logits change, 0 if that is rounding; None if none tell.

    It is `LATE` where they change as they may, and too late.

    - `largest`: of a number of each process that looks.
    """
    none = torch.zeros_like(look.at)
    told = none if look.late is None else look.late.told
    at = look.at | told
    before, after = _logits(model, inputs, at), _logits(model, {**inputs, **look.other}, at)
    own = _compared(model, _among(before, look.at[at]), _among(after, look.at[at]))
    found, coarse = map(largest, own or (0.0, 0.0))
    if found <= min(FINE, coarse):
        late = _is_late(_among(before, told[at]), _among(after, told[at]))
        if largest(late) and not largest(_tells_at_once(model, inputs, look.late, none)):
            return LATE
        return None if own is None else 0.0
    is_rounding = found <= coarse and _rounds_by_rows(model, inputs, look, largest)
    return 0.0 if is_rounding else found


def _among(logits: Tensor | None, chosen: Tensor) -> Tensor | None:
    return None if logits is None else logits[chosen.to(logits.device)]


def _is_late(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether logits change, and those at the first place are still the same."""
    if before is None or after is None:
        return False
    changes = (before != after).any(dim=-1).tolist()
    return any(changes) and not changes[0]


def _tells_at_once(
    model: nn.Module, inputs: Mapping[str, Any], late: LateLook | None, none: Tensor
) -> bool:
    """Whether the logits at the first token of a text change with it, or cannot be had."""
    at, other = (none, {}) if late is None else (late.first, late.other)
    before, after = _logits(model, inputs, at), _logits(model, {**inputs, **other}, at)
    return late is not None and (before is None or after is None or not before.equal(after))


def _logits(model: nn.Module, inputs: Mapping[str, Any], at: Tensor) -> Tensor | None:
    """The logits at some places, from the same random numbers each time; None if there are none."""
    with undisturbed(model, recompute=False), torch.no_grad():
        logits = getattr(model(**{**without_cache(model), **inputs}), "logits", None)
    if logits is None or logits[:, : at.shape[1]].shape[:-1] != at.shape:
        return None
    own: Tensor = logits[:, : at.shape[1]][at.to(logits.device)]
    return own


def _compared(
    model: nn.Module, before: Tensor | None, after: Tensor | None
) -> tuple[float, float] | None:
    """By what share of the largest logits change, and what rounding in a row's sums may change."""
    if before is None or after is None or not before.any():
        return None  # a head of zeros, which has learned nothing yet, shows nothing
    # -inf less itself, of tokens that are never said, is not a number.
    found = (before - after).abs().nan_to_num(nan=0.0, posinf=torch.inf).max().double()
    # Tokens that are never said have -inf, or what stands for it.
    sizes = torch.stack([before.max(), before.median()]).double().nan_to_num(0.0, 0.0, 0.0)
    share = (found / sizes.abs().max()).nan_to_num(nan=0.0, posinf=torch.inf)
    return float(share), math.sqrt(_coarsest(model, before))


def _coarsest(model: nn.Module, logits: Tensor) -> float:
    """The precision of the coarsest numbers that a model computes with.

    Logits tell of an autocast inside.
    """
    kinds = {kind for kind in FLOATS if torch.equal(logits.to(kind).to(logits.dtype), logits)}
    kinds.update({logits.dtype}, (p.dtype for p in model.parameters() if p.dtype in FLOATS))
    if next(coded(model), None) is not None:
        kinds.add(torch.bfloat16)  # whose eight bits are as fine as codes
    return max(torch.finfo(kind).eps for kind in kinds)


def _rounds_by_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    look: Look,
    largest: Callable[[float], float],
) -> bool:
    """Whether rows change the rounding of each other, as in experts and codes, or nothing is sure.

    Each row stands before and behind a twin. Both have their own tokens or the others: what a row
    says should not depend on which of them its twin has.
    """
    tokens = inputs, {**inputs, **look.other}
    pairs = [_stacked(row, twin, len(look.at)) for row, twin in product(tokens, tokens)]
    if largest(None in pairs):
        return True
    twice = torch.cat([look.at, look.at])
    found = [_logits(model, pair, twice) for pair in pairs if pair is not None]
    if largest(any(logits is None for logits in found)):
        return True
    rows, twins = zip(*(logits.chunk(2) for logits in found if logits is not None), strict=True)
    # Pairs that differ in the twin of a row alone, and in the row of a twin alone.
    same = [torch.equal(rows[i], rows[i + 1]) and torch.equal(twins[j], twins[j + 2])
            for i, j in ((0, 0), (2, 1))]  # fmt: skip
    return bool(largest(not all(same)))


def _stacked(
    one: Mapping[str, Any], another: Mapping[str, Any], rows: int
) -> dict[str, Any] | None:
    """Inputs of both, one below the other; None where it cannot be told what belongs to a row."""
    stacked = dict(one)
    for name, x in one.items():
        if isinstance(x, Mapping):
            return None
        if not isinstance(x, Tensor) or x.ndim == 0:
            continue
        dim = int(name == "position_ids" and x.ndim > 2)  # of several counts, as for images
        if rows > 1 and x.shape[dim] == 1:
            continue  # is the same for all rows
        if x.ndim < 2 or x.shape[dim] % rows:
            return None
        stacked[name] = torch.cat([x, another[name]], dim=dim)
    return stacked
