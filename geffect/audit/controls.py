"""Controls: models of which it is known whether they forgot, to see how an audit reads them.

An audit that calls a model hidden should say so of one whose facts are there for certain, and not
of one that never knew. Each control is made of the original and of the data of the audit.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geffect.risk import nll, undisturbed

from .adapters import deployed
from .kept import check_weights
from .rounding import int4_cells
from .verdict import BROKEN, HIDDEN, NEVER_KNEW, REMEMBERS

MOST = 400
"""So many steps a control is trained at most until it says no more than a model that never knew."""

ASCENT = 60
"""So many steps of gradient ascent leave nothing of a model."""

Batches = Iterator[Mapping[str, Mapping[str, Tensor]]]
"""Batches of `forget` and `retain` without end."""

Reached = Callable[[nn.Module], bool]
"""Whether a model says no more of what should be forgotten than one that never knew."""


def head_only(original: nn.Module, batches: Batches, rate: float, reached: Reached) -> nn.Module:
    """All facts are in the body still: an untied output head alone ascends on them.

    - `rate`: the learning rate of its AdamW.
    - `reached`: asked after each step; the first True ends the training.
    """
    model: Any = _copied(original)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(
            "A model whose head alone is trained should have an output head with a weight. Found "
            f"none in `{type(model).__name__}`. Leave this control out for it."
        )
    untied = copy.deepcopy(head)
    untied.weight = nn.Parameter(head.weight.detach().clone())
    model.set_output_embeddings(untied)
    if hasattr(model, "config"):
        model.config.tie_word_embeddings = False
    return _to_level(model, [untied.weight], batches, rate, reached)


def in_int4_cells(
    original: nn.Module, batches: Batches, rate: float, reached: Reached
) -> nn.Module:
    """An edit that rounding to four bits takes back: no weight leaves its cell of int4."""
    model = _copied(original)
    cells = int4_cells(model)

    def keep() -> None:
        for weight, low, high in cells:
            weight.clamp_(low, high)

    return _to_level(model, [weight for weight, *_ in cells], batches, rate, reached, keep)


def shuffled(original: nn.Module, seed: int = 0) -> nn.Module:
    """All weights of each tensor in another order."""
    model = _copied(original)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.flatten()
            order = torch.randperm(len(flat), generator=draw).to(flat.device)
            parameter.copy_(flat[order].view_as(parameter))
    return model


def ascended(original: nn.Module, batches: Batches, rate: float, steps: int = ASCENT) -> nn.Module:
    """Gradient ascent on the forget set that nobody stopped."""
    model = _copied(original)
    stepping = _stepping(model, [*model.parameters()], batches, rate, retains=False)
    for _ in zip(range(steps), stepping, strict=False):
        pass
    return model


@dataclass(frozen=True)
class Control:
    """A model of which it is known how an audit has to read it.

    - `says`: what is known of it.
    - `should`: the verdict.
    - `make`: builds it of the original, batches, a learning rate, and what says that the level of
      a model that never knew is reached. None for one that the audit has read already.
    """

    name: str
    says: str
    should: str
    make: Callable[[nn.Module, Batches, float, Reached], nn.Module] | None = None


CONTROLS = (
    Control("original", "it was never unlearned", REMEMBERS),
    Control("retrained", "it was trained without the forget set", NEVER_KNEW),
    Control("head only", "an untied head alone was trained: all is in the body", HIDDEN, head_only),
    Control("int4 cells", "no weight left its cell of int4", HIDDEN, in_int4_cells),
    Control("shuffled", "all weights are in another order", BROKEN, lambda of, *_: shuffled(of)),
    Control(
        "ascended",
        f"{ASCENT} steps of gradient ascent",
        BROKEN,
        lambda of, batches, rate, _: ascended(of, batches, rate),
    ),
)
"""The six controls of an audit."""


def _copied(original: nn.Module) -> nn.Module:
    """A copy in float32 that has merged its adapter: a step in half precision may move nothing."""
    check_weights(original, "A control")
    whole = deployed(original)
    return (copy.deepcopy(original) if whole is original else whole).float().eval()


def _to_level(
    model: nn.Module,
    trained: list[Tensor],
    batches: Batches,
    rate: float,
    reached: Reached,
    after: Callable[[], None] = lambda: None,
) -> nn.Module:
    """The model, which descends on retain and ascends on forget until the level is reached."""
    for _ in zip(range(MOST), _stepping(model, trained, batches, rate, after=after), strict=False):
        if reached(model):
            return model
    raise ValueError(
        f"A control should say no more of the forget set than a model that never knew after {MOST} "
        f"steps at the learning rate {rate:g}. Found that it says more. Give a higher learning "
        "rate, that of the unlearning."
    )


def _stepping(
    model: nn.Module,
    trained: list[Tensor],
    batches: Batches,
    rate: float,
    *,
    retains: bool = True,
    after: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Steps of AdamW, without weight decay, on some weights of a model."""
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained))
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for batch in batches:
        with undisturbed(model):
            loss = -nll(model, batch["forget"])
            if retains:
                loss = loss + nll(model, batch["retain"])
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                after()
        yield
