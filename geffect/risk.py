"""The risk R on data: the negative log-likelihood of the tokens that are scored."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import IGNORED, Batch, labels_of


def token_log_probabilities(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p of every scored token, `Float[sample, position - 1]`, and the mask of what is scored.

    Positions that are not scored hold 0.
    """
    labels = labels_of(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(labels), labels != IGNORED


def token_mean(values: Tensor, scored: Tensor) -> Tensor:
    """The mean over all scored tokens of the batch: a long answer weighs more than a short one."""
    return values.where(scored, torch.zeros_like(values)).sum() / scored.sum()


def sequence_sum(values: Tensor, scored: Tensor) -> Tensor:
    """The sum over the scored tokens of every sample, `Float[sample]`."""
    return values.where(scored, torch.zeros_like(values)).sum(dim=1)


def nll(model: Any, batch: Batch) -> Tensor:
    """The risk R: negative log-likelihood of the scored tokens, token mean, in nats per token.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> ids = torch.tensor([[0, 1, 2]])
    >>> nll(uniform, {"input_ids": ids, "labels": ids})  # log 4
    tensor(1.3863)
    """
    log_p, scored = token_log_probabilities(model, batch)
    return -token_mean(log_p, scored)
