"""Probes: the gradient of a risk on data of its own, taken without a trace in the model.

A probe stands between two steps of somebody else's training. It runs real backward passes on the
swapped `.grad`, since `torch.autograd.grad` would bypass what sharded training lives on, and leaves
behind nothing: no gradient, no random number drawn, no mode, no buffer.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect import distributed
from geffect.batch import IGNORED, Batch
from geffect.gradients import Vector
from geffect.layers import trainable
from geffect.risk import token_log_probabilities

RiskSet = Batch | Iterable[Batch]
"""The data of a risk: one batch, or what gives its batches each time it is gone through."""


@dataclass(frozen=True)
class RiskGradient:
    """The gradient of a risk by parameter, in the order of `geffect.layers.trainable`.

    `loss` is the risk itself in nats per token, `tokens` how many answer tokens it is a mean of.
    """

    vector: Vector
    loss: float
    tokens: int


def risk_gradient(
    model: nn.Module,
    batches: RiskSet,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> RiskGradient:
    """The gradient of R = -(1/N) sum_i log p_i over all N answer tokens of all batches.

    A long batch weighs more than a short one: sums of gradients are divided by all tokens, once.
    Without dropout. Of several processes each takes a share of the batches, which have to come in
    the same order on all of them, and all get the gradient of the whole set. `autocast` is entered
    around each forward pass; the risk of a model in half precision is summed up in float32. The
    model is left as it was found, see `undisturbed`.

    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return type("Output", (), {"logits": super().forward(input_ids)})
    >>> model, ids = Table(2, 2), torch.tensor([[0, 1]])
    >>> _ = nn.init.zeros_(model.weight)  # p = 1/2 for either token
    >>> risk = risk_gradient(model, {"input_ids": ids, "labels": ids})
    >>> round(risk.loss, 4), risk.tokens, risk.vector[0].tolist(), model.weight.grad
    (0.6931, 1, [[0.5, -0.5], [0.0, 0.0]], None)
    """
    parameters = list(trainable(model).values())
    sums: list[Tensor | None] = [None] * len(parameters)
    loss, tokens = 0.0, 0
    with undisturbed(model), distributed.gradient_sync(model):
        for batch in _share(as_batches(batches)):
            with autocast():
                log_p, scored = token_log_probabilities(model, _beside(parameters[0], batch))
            risk = -log_p.sum(dtype=_at_least_float32(log_p))
            for parameter in parameters:
                parameter.grad = None
            risk.backward()
            sums = [_plus(a, p.grad) for a, p in zip(sums, parameters, strict=True)]
            loss, tokens = loss + risk.item(), tokens + int(scored.sum())
    # Means over the processes of sums over theirs: what is divided by what, for all of them.
    mean_loss, mean_tokens = distributed.mean([loss, float(tokens)])
    if not mean_tokens:
        raise ValueError(
            "A risk should have an answer token: a label that is not -100, beyond the first "
            "position. Found none in any batch. Mark the answers in the labels."
        )
    vector = [
        None if total is None else total.div_(mean_tokens) for total in _averaged(parameters, sums)
    ]
    return RiskGradient(
        vector, mean_loss / mean_tokens, round(mean_tokens * distributed.world_size())
    )


def as_batches(batches: RiskSet) -> Iterable[Batch]:
    """The batches of a risk, one after the other, as often as they are asked for."""
    if isinstance(batches, Mapping):
        return [batches]
    should = (
        "The data of a risk should be a batch, a list of batches or a loader, to be gone through "
        f"at each captured step. Found `{type(batches).__name__}`."
    )
    if isinstance(batches, str | os.PathLike | bytes):
        raise TypeError(
            f"{should} Read a file by `geffect.data.examples.read(path, tokenizer)`, and make "
            "batches of that by `geffect.data.collate.batched`."
        )
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(f"{should} Pass a list of it.")
    return batches


@contextmanager
def named(risk: str) -> Iterator[None]:
    """A block whose errors are about the data of one risk, and say of which in a note."""
    try:
        yield
    except Exception as error:
        error.add_note(f"It was found in the data of risk `{risk}`.")
        raise


def check_data(batches: RiskSet) -> None:
    """Refuse data whose first batch is none: not named tensors, or without labels.

    Leaves the random numbers alone, of which a loader that shuffles draws some.

    >>> check_data([{"input_ids": [[5, 6]], "labels": [[5, 6]]}])
    Traceback (most recent call last):
    TypeError: A batch should map names to tensors. Found `list` as its `input_ids`. ...
    """
    with _random_numbers_kept():
        first = next(iter(as_batches(batches)), None)
    if first is None:
        raise _without_batches()
    if not isinstance(first, Mapping):
        raise TypeError(
            "A batch should map names to tensors: `input_ids`, `attention_mask`, `labels`. Found "
            f"`{type(first).__name__}`. Pass such mappings, or a loader that collates its samples."
        )
    for name, value in first.items():
        if isinstance(value, list | tuple | np.ndarray):
            raise TypeError(
                f"A batch should map names to tensors. Found `{type(value).__name__}` as its "
                f"`{name}`. Make tensors of equal length of it, as a collator does that pads."
            )
    labels = first.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        found = (
            f"them with shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else f"the keys {', '.join(map(str, first))}"
        )
        raise ValueError(
            "A batch should have `labels`, a token for each position of each sample, with -100 "
            f"where it is not scored. Found {found}. Mark the answer tokens in labels, and put "
            "samples into batches."
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A block in which the model may be run and differentiated, and which leaves no trace in it.

    Inside, dropout is off and every `.grad` is None. Afterwards gradients, the mode of every
    module, buffers, and the random numbers of torch on every device, of numpy and of Python are
    what they were.

    >>> model = nn.Dropout(0.5)
    >>> with undisturbed(model):
    ...     model(torch.ones(3))
    tensor([1., 1., 1.])
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with _random_numbers_kept(), torch.enable_grad():
        _turn_dropout_off(model)
        for parameter, _ in grads:
            parameter.grad = None
        # What an enclosing autocast has cast belongs to a graph of training, and what is cast here
        # must not become part of one.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            for parameter, grad in grads:
                parameter.grad = grad
            for module, training in modes:
                module.training = training
            _put_back(buffers)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _turn_dropout_off(model: nn.Module) -> None:
    # Not `model.eval()`, which modules may override to do more.
    for module in model.modules():
        module.training = False
    if _has_dropout(model):
        return
    # Layers checkpoint their activations in train mode alone. Where the architecture knows no
    # dropout that mode changes nothing else, and without checkpoints the memory might not suffice.
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def _has_dropout(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    if config is None:
        return True
    options = config.get_text_config().to_dict()
    return any("drop" in name and isinstance(v, float) and v > 0 for name, v in options.items())


def _put_back(buffers: Sequence[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, before in buffers:
        module._buffers[name] = buffer
        # Only where it is needed: a graph of training may have saved the buffer.
        if not torch.equal(buffer, before):
            with torch.no_grad():
                buffer.copy_(before)


def _share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of this process: every one there is, or of n processes every n-th.

    Each process gets as many as the others, since passes through FSDP2 are taken together: where
    its last is missing it gets one in which nothing is scored.
    """
    processes, rank = distributed.world_size(), distributed.rank()
    place = -1
    for place, batch in enumerate(batches):
        if place % processes == rank:
            yield batch
    if place < 0:
        raise _without_batches()
    if place % processes < rank:
        yield {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def _without_batches() -> ValueError:
    return ValueError(
        "The data of a risk should have a batch each time it is gone through. Found none. See "
        "whether the loader drops its last batch, or the list was filtered to nothing."
    )


def _averaged(parameters: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Vector:
    if distributed.world_size() == 1:
        return sums
    # Another process may have what this one has not, and in the type of a sum.
    present = [
        torch.zeros_like(p, dtype=_at_least_float32(p), requires_grad=False)
        if total is None
        else total.to(_at_least_float32(p))
        for total, p in zip(sums, parameters, strict=True)
    ]
    return distributed.average(parameters, {"risk": present})["risk"]


def _beside(parameter: Tensor, batch: Batch) -> dict[str, Any]:
    return {
        name: value.to(parameter.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _plus(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    # A sum of many small terms: in bfloat16 it would stop to grow.
    return total.to(_at_least_float32(total)).add_(grad)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
