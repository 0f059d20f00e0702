"""What a rectified step has to be like, and what is said where it is not."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.dots import is_sparse
from geffect.gradients import Gradients, is_empty
from geffect.layers import trainable
from geffect.losses import Loss
from geffect.optimizers import check_descends, tensors_of
from geffect.sources import OBJECTIVE

from .options import Options


def same_parameters(
    model: nn.Module, names: Sequence[str], known: Sequence[Tensor] | None
) -> list[Tensor]:
    """The parameters of the model; those of these names, and the known ones where there are."""
    found = trainable(model)
    if list(found) != names:
        raise ValueError(
            "The parameters that require a gradient should be those that the rectifier was "
            f"made for, {len(names)}. Found {len(found)}, frozen or added since. Make it "
            "after choosing the parameters to train."
        )
    if known is None:
        distributed.check_layout(model)
    elif any(p is not q for p, q in zip(known, found.values(), strict=True)):
        raise ValueError(
            "The parameters should stay the tensors that they were at the first step. Found "
            "others of the same names. Make a new rectifier, and load the state of this one."
        )
    return list(found.values())


def check_losses(losses: Mapping[str, Loss], options: Options) -> None:
    """Refuse losses that a step cannot be rectified by."""
    if OBJECTIVE not in losses:
        raise ValueError(
            f"The losses of a rectified step should have one named `{OBJECTIVE}`. Found "
            f"{', '.join(losses) or 'none'}. Pass {OBJECTIVE}=loss."
        )
    check_retain(losses, options)
    if options.part == "forget" and not isinstance(losses[OBJECTIVE], Mapping):
        kind = "tensor" if isinstance(losses[OBJECTIVE], Tensor) else "function"
        raise ValueError(
            f'`{OBJECTIVE}` should be declared as a combination of losses with part="forget", '
            f"which is rectified without the retain losses. Found a {kind}. Pass weights such "
            f'as {OBJECTIVE}={{"forget": -1.0, "retain": 1.0}}.'
        )


def check_retain(sources: Iterable[str], options: Options) -> None:
    """Refuse a step without the retain losses."""
    absent = [name for name in options.protect if name not in sources]
    if absent:
        raise ValueError(
            f"The losses of a rectified step should have one named `{absent[0]}`. Found "
            f"{', '.join(sources)}. Pass {absent[0]}=nll(model, {absent[0]}_batch)."
        )


def check_dense(gradients: Gradients) -> None:
    """Refuse sparse gradients: a rectified one is dense, and theirs may be an optimizer's need."""
    names = [name for name, vector in gradients.vectors.items() if any(map(is_sparse, vector))]
    if names:
        raise ValueError(
            f"The gradients of a rectified step should be dense. Found sparse ones of `{names[0]}`,"
            " as `nn.Embedding(..., sparse=True)` leaves them. Make such a module with "
            "sparse=False, and train it by an optimizer for dense gradients."
        )


def check_nothing_left(parameters: Iterable[Tensor]) -> None:
    """Refuse a step that does not begin with an empty `.grad`."""
    if not is_empty(parameters):
        raise ValueError(
            "`.grad` should be empty before a rectified step, which is rectified as a whole. "
            "Found gradients of an earlier backward. Call model.zero_grad() before, or pass "
            "the micro-batches with accumulate=True."
        )


def check_optimizer(options: Options, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a step of an optimizer that is needed and not known, or that climbs."""
    if optimizer is not None:
        check_descends(optimizer)
        if options.correction == "adam":
            check_adam(optimizer)
    elif options.needs_optimizer:
        raise ValueError(
            '`optimizer` should be given before a step with space="update" or '
            "measure_update=True. Found none. Pass Rectifier(..., optimizer=optimizer), or "
            "call rectifier.attach(optimizer)."
        )


def check_adam(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose own metric is not known."""
    owned = {str(i): tensor for i, tensor in enumerate(tensors_of(optimizer))}
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) or distributed.pieces(owned):
        raise ValueError(
            'correction="adam" should go with Adam or AdamW of torch, whose second moment it '
            f"measures in, and not with ZeRO. Found {type(optimizer).__name__}, or parameters that "
            'an engine holds in pieces. Take correction="retain_adam", or such an optimizer.'
        )


def check_state(
    state: Mapping[str, Any], format: int, options: Mapping[str, object], pieces: object
) -> None:
    """Refuse the state of something else, of other pieces, or of a rectifier set up otherwise."""
    if state.get("format") != format:
        raise ValueError(
            f"The state of a rectifier should have format {format}. Found "
            f"{state.get('format')!r}. Pass what `state_dict()` of a rectifier gave."
        )
    if {"ema_start": "first", "history": 0, **state["options"]} != options:  # which came later
        raise ValueError(
            "The rectifier should be set up as the one whose state it takes: "
            f"{state['options']}. Found {options}. Make it with the same arguments."
        )
    if state.get("pieces", {}) != pieces:
        raise ValueError(
            "The state of a rectifier should be of the pieces that the engine gives this process. "
            "Found those of another stage of ZeRO, process or order of parameters. Resume with as "
            "many processes, the same stage and the same groups of parameters."
        )
