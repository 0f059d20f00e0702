"""Whether logits depend on other tokens, found out by running a model twice."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.codes import FLOATS, coded
from geffect.hooks import without_forward_hooks

from .undisturbed import undisturbed


def kind_of(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[object, ...]:
    """What decides what a model sees: its inputs, whether a mask is one of pairs, the kernel."""
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return frozenset((n, getattr(x, "ndim", None)) for n, x in inputs.items()), kernel


def is_in_parts(model: nn.Module) -> bool:
    """Whether all processes run a forward together, which hooks gather the parameters for."""
    is_dtensor = any(hasattr(p, "placements") for p in model.parameters())
    return is_dtensor or not distributed.shares_forwards(model.parameters())


def change(
    model: nn.Module, inputs: Mapping[str, Any], name: str, other: Tensor, at: Tensor
) -> float | None:
    """By how much logits change with other tokens under a name, 0 if that is rounding.

    None if a model has no logits there, zeros alone, or takes no such tokens. It is left as it was,
    and hooks on forwards are told nothing, whose state is not known: they count and record for
    others. Where logits change without hooks, or no forward is possible, hooks may be what makes
    the model right: these are then run.

    - `at`: `Bool[sample, position]`, where logits are looked at.
    """
    if is_in_parts(model):
        return distributed.max_over_ranks(_change(model, inputs, name, other, at) or 0.0)
    # What a model says of its own tokens, it says in the forward that was asked for.
    with suppress(Exception), without_forward_hooks(model):
        if _change(model, inputs, name, other, at) == 0:
            return 0.0
    with suppress(Exception):
        return _change(model, inputs, name, other, at)
    return None


def _change(
    model: nn.Module, inputs: Mapping[str, Any], name: str, other: Tensor, at: Tensor
) -> float | None:
    before, after = (
        _logits(model, {**inputs, name: tokens}, at) for tokens in (inputs[name], other)
    )
    if before is None or after is None or not before.any():
        return None  # a head of zeros, which has learned nothing yet, shows nothing
    # -inf less itself, of tokens that are never said, is not a number.
    found = float((before - after).abs().nan_to_num(nan=0.0, posinf=torch.inf).max())
    return found if found > _allowed(model, before) else 0.0


def _logits(model: nn.Module, inputs: Mapping[str, Any], at: Tensor) -> Tensor | None:
    """The logits at some places, from the same random numbers each time; None if there are none."""
    with undisturbed(model, recompute=False), torch.no_grad():
        logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits[:, : at.shape[1]].shape[:-1] != at.shape:
        return None
    own: Tensor = logits[:, : at.shape[1]][at.to(logits.device)]
    return own


def _allowed(model: nn.Module, logits: Tensor) -> float:
    """What rounding may change, in the coarsest numbers that a model computes with.

    Experts and codes round by what else is in the batch. Logits tell of an autocast inside.
    """
    kinds = {kind for kind in FLOATS if torch.equal(logits.to(kind).to(logits.dtype), logits)}
    kinds.update({logits.dtype}, (p.dtype for p in model.parameters() if p.dtype in FLOATS))
    if next(coded(model), None) is not None:
        kinds.add(torch.bfloat16)  # whose eight bits are as fine as codes
    # Tokens that are never said have -inf, or what stands for it.
    sizes = torch.stack([logits.max(), logits.median()]).float().nan_to_num(0.0, 0.0, 0.0)
    coarsest: float = max(torch.finfo(kind).eps for kind in kinds)
    return math.sqrt(coarsest) * float(sizes.abs().max())
