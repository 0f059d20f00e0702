"""The PG-effect of every sample in every layer, for every model that gives token probabilities."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from geffect import distributed, dots
from geffect.batch import Batch, check_one_answer, labels_of
from geffect.gradients import Vector, differentiate, separate
from geffect.layers import describe, trainable
from geffect.losses import check_no_step_inside, plan
from geffect.risk import scored_tokens, sequence_sum, token_log_probabilities, undisturbed

from .belonging import NotOfSamples
from .direction import check_direction
from .instances import InstanceEffects

_log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Of |a||b|: what effects are promised to, and some ten times what float32 rounds in them."""

Directions = Mapping[str, Vector]


def sample_effects(
    model: nn.Module, batches: Iterable[Batch], directions: Directions
) -> dict[str, Tensor]:
    """PG_D(s) = <grad R(D), grad log p(s)> of every sample and parameter, for each direction.

    `Float64[sample, parameter]`, samples in the order of the batches, parameters in that of
    `geffect.layers.trainable`. log p(s) is the sum over the scored tokens of the sample, in nats; a
    step of gradient ascent on it, theta <- theta - rate grad log p(s), changes R(D) by
    -rate PG_D(s). Definition: arXiv 2502.19301, eq. 5.

    Eval mode; the model and its `.grad` stay as they were. One forward and backward a batch tell
    all of its samples apart where every module returns a row for each; one sample is held against
    a backward pass of its own. Where a module does not, such as a mixture of experts or a recurrent
    layer, each sample takes a backward pass of its own through the one forward of its batch, whose
    activations are kept until the last: slower by the number of samples, exact by definition, and
    said once. Layers that checkpoint their activations do so there; smaller batches need less
    memory. Where the samples of a batch meet, as in experts of limited capacity, log p(s) is that
    of this batch, and so is its gradient.

    Each batch finds the model in the state in which it was given, running statistics and random
    numbers included. The first that is told apart in the slower way is run twice.

    >>> from types import SimpleNamespace
    >>> class Bigram(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logits = nn.Embedding.from_pretrained(torch.zeros(2, 2), freeze=False)
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=self.logits(input_ids))
    >>> batch = {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[-100, 1]])}
    >>> sample_effects(Bigram(), [batch], {"forget": [torch.tensor([[1.0, 0.0], [0.0, 0.0]])]})
    {'forget': tensor([[-0.5000]], dtype=torch.float64)}
    """
    batches = list(batches)
    if not batches or not directions:
        raise ValueError(
            "`batches` and `directions` should not be empty. Found "
            f"{len(batches)} batches and {len(directions)} directions. Pass one of each at least."
        )
    if isinstance(model, DistributedDataParallel):
        model = model.module  # which averages gradients over the samples of other processes
    parameters = list(trainable(model).values())
    _check(parameters, directions)
    found: list[Mapping[str, Tensor]] = []
    has_rows, is_proven = True, False
    for batch in batches:
        check_one_answer(batch, "effects of samples")
        if has_rows:
            try:
                effects = _by_rows(model, batch, directions)
                # Where nothing is scored all effects are zero, which proves nothing.
                if not is_proven and scored_tokens(model, batch).any():
                    _check_one(model, batch, directions, effects)
                    is_proven = True
                found.append(effects)
                continue
            except NotOfSamples as refusal:
                _say(refusal.reason)
                has_rows = False
        found.append(_by_backward_passes(model, batch, directions))
    return {name: torch.cat([effects[name] for effects in found]) for name in directions}


def _by_rows(model: nn.Module, batch: Batch, directions: Directions) -> dict[str, Tensor]:
    """The effects in one batch, out of one backward pass; raises `NotOfSamples` where none fit."""
    with undisturbed(model, recompute=False), ExitStack() as stack:
        effects = {
            name: stack.enter_context(InstanceEffects(model, along))
            for name, along in directions.items()
        }
        parameters = list(trainable(model).values())
        log_p = _log_likelihoods(model, batch)
        differentiate(parameters, {"log likelihood": log_p.sum()})
    tables = {name: found.by_parameter for name, found in effects.items()}
    for table in tables.values():
        if len(table) != len(log_p):
            raise NotOfSamples(
                "The model should be called once a batch.",
                f"rows of {len(table)} samples in a batch of {len(log_p)}",
                reason=f"`{type(model).__name__}` calls itself",
            )
    return tables


def _by_backward_passes(
    model: nn.Module, batch: Batch, directions: Directions
) -> dict[str, Tensor]:
    """The same out of one backward pass for each sample, which any model has."""
    products = _products(model, batch, directions, range(len(labels_of(batch))))
    return dict(zip(directions, products[:, :, 0, 1:].unbind(dim=2), strict=True))


def _check_one(
    model: nn.Module, batch: Batch, directions: Directions, found: Mapping[str, Tensor]
) -> None:
    """Hold a sample of what was found by rows against a backward pass of its own."""
    sample = int(scored_tokens(model, batch).sum(dim=1).argmax())
    (K,) = _products(model, batch, directions, [sample])
    lengths = K.diagonal(dim1=1, dim2=2).sum(dim=0).sqrt()
    for index, effects in enumerate(found.values(), 1):
        own, exact = effects[sample], K[:, 0, index]
        allowed = _precision(model) * lengths[0] * lengths[index]
        fits = ((own - exact).abs() <= allowed) | (own.isnan() & exact.isnan())
        if not fits.all():
            name = describe(model)[int(fits.logical_not().nonzero()[0])].name
            raise NotOfSamples(
                "The effects of a sample should be those of its own gradient.",
                f"others of `{name}`, which is used outside of its module",
                reason=f"`{name}` is used outside of its module",
            )


def _products(
    model: nn.Module, batch: Batch, directions: Directions, among: Sequence[int]
) -> Tensor:
    """The Gram matrices of grad log p(s) and the directions, for some samples of a batch.

    `Float64[sample, parameter, 1 + direction, 1 + direction]`, a backward pass each.
    """
    parameters = list(trainable(model).values())
    with undisturbed(model):
        log_p = _log_likelihoods(model, batch)
        passes = plan(parameters, {f"log p of sample {s}": log_p[s] for s in among})
        products = []
        for name in passes.order.given:
            gradient = separate(parameters, passes.of([name])).of(name)
            products.append(dots.grams(zip(gradient, *directions.values(), strict=True)))
    return torch.stack(products)


def _precision(model: nn.Module) -> float:
    """What rounding may change of |a||b|: of the coarsest numbers that the model computes with."""
    device = next(model.parameters()).device.type
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(TOLERANCE, *(torch.finfo(dtype).eps for dtype in dtypes))


def _log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """log p(s) of every sample, `Float[sample]`."""
    return sequence_sum(*token_log_probabilities(model, batch))


def _check(parameters: Sequence[Tensor], directions: Directions) -> None:
    for along in directions.values():
        check_direction(parameters, along)
    check_no_step_inside(parameters)
    if any(map(distributed.is_sharded, parameters)):
        raise ValueError(
            "`model` should be whole on each process for effects of samples. Found parameters that "
            "are sharded, whose gradients are those of the samples of all processes together. Load "
            "the weights into a model that is not sharded."
        )


@cache
def _say(reason: str) -> None:
    """Said once of each reason."""
    _log.warning(
        "Effects of samples take a backward pass for each sample here, in place of one for each "
        "batch, which is slower and keeps the activations of a batch longer: %s.",
        reason,
    )
