"""What each of two processes has of the data, and the losses of its share."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect import distributed
from tests.utils import tiny, two_ranks
from tests.utils.layouts import Small, labelled, without_reduction

SIDES = ("forget", "retain")


def trained_in(layout: str) -> nn.Module:
    """With adapters, all else but the gate is frozen."""
    model = Small()
    if layout == "fsdp around adapters":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "gate" in name)
    return model


def batch(side: str, rank: int) -> dict[str, Tensor]:
    """What a process sees of a side: the second one has more rows, and more labels."""
    return tiny.batch(2 * rank + SIDES.index(side), rows=2 + 3 * rank)


def everything(side: str) -> dict[str, Tensor]:
    parts = [batch(side, rank) for rank in range(two_ranks.RANKS)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def token_means(model: nn.Module, side: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two losses of one forward: over the labels, and over the labels in reverse."""
    logits = model(own["input_ids"])[:, :-1].flatten(0, 1)
    labels = own["labels"][:, 1:]
    return {
        side: nn.functional.cross_entropy(logits, labels.flatten()),
        f"{side} reversed": nn.functional.cross_entropy(logits, labels.flip(1).flatten()),
    }


def losses_of_a_rank(model: nn.Module) -> dict[str, Tensor]:
    """The losses of a process, so weighted that their averages are means over all tokens."""
    found = {}
    with without_reduction(model):
        for side in SIDES:
            own = batch(side, dist.get_rank())
            share = distributed.token_share(labelled(own))
            found |= {name: x * share for name, x in token_means(model, side, own).items()}
    return found


def assert_same_geometry(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """Up to so much of |a||b|, which is what decides a sign."""
    norms = np.sqrt(np.einsum("pii->pi", expected))
    assert norms.min() > 0
    assert np.all(abs(found - expected) <= tolerance * norms[:, :, None] * norms[:, None, :])
