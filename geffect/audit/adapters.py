"""Models with adapters as they are deployed: with what an adapter adds merged in, or beside."""

import copy
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from geffect.checkpoints.merging import merging

Form = Literal["merged", "base"]
"""What counts as the weights of a model with an adapter: those with what the adapter adds, or those
below the adapter, which stays as it is."""


def deployed(model: nn.Module, adapter: Form = "merged") -> nn.Module:
    """The model whose weights are attacked: itself, or a copy that has merged its adapters.

    >>> model = nn.Linear(1, 1)
    >>> deployed(model) is model
    True
    """
    if adapter not in ("merged", "base"):
        raise ValueError(
            f'`adapter` should be "merged" or "base". Found {adapter!r}. Choose one of them.'
        )
    found = [*tuners(model)]
    if adapter == "base" and any(tuner.merged for tuner in found):
        raise ValueError(
            "The adapter should stand beside the weights that are attacked. Found that it is "
            'merged into them. Call `unmerge_adapter()`, or pass adapter="merged".'
        )
    return _merged(model) if adapter == "merged" and found else model


def tuners(model: nn.Module) -> Iterator[Any]:
    """The layers of an adapter, around those of the model that they change."""
    return (m for m in model.modules() if hasattr(m, "merged_adapters") and hasattr(m, "merge"))


def _merged(model: Any) -> nn.Module:
    whole = copy.deepcopy(model)
    enabled = [tuner for tuner in tuners(whole) if not tuner.disable_adapters]
    with merging(f"The adapter of `{type(model).__name__}` should be one"):
        if enabled and hasattr(whole, "merge_and_unload"):
            plain: nn.Module = whole.merge_and_unload()
            return plain
        for tuner in enabled:
            tuner.merge()
    if enabled and any(hasattr(module, "modules_to_save") for module in whole.modules()):
        raise ValueError(
            f"The adapter of `{type(model).__name__}` should be one of the package peft where it "
            "replaces whole layers. Found it in the model itself. Load the model by "
            "`peft.PeftModel.from_pretrained`."
        )
    found: nn.Module = whole
    return found
