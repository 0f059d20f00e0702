"""What is kept of the reference model of an objective: what it says of some batches."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from geffect.batch import Batch
from geffect.risk import token_log_probabilities


class Likelihoods:
    """A model that is no longer there: what it said of the answer tokens of some batches.

    Called as a model with one of those batches, it returns logits that give each of its answer
    tokens the likelihood it had, and share what is left among all other tokens.
    """

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        # By the identity of the tokens, which are kept so that it stays theirs.
        self._header: dict[int, tuple[Batch, Tensor]] = {}
        for batch in batches:
            with torch.no_grad():
                log_p, _ = token_log_probabilities(model, batch)
            self._header[id(batch["input_ids"])] = batch, log_p.float()

    def __call__(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        """The logits `Float[sample, position, token]`, up to the largest token of the answers."""
        batch, log_p = self._header[id(input_ids)]
        answers = batch["labels"][:, 1:].clamp(min=0)
        tokens = int(answers.max()) + 2
        left = torch.log(-torch.expm1(log_p) / (tokens - 1))
        logits = left.unsqueeze(-1).repeat(1, 1, tokens)
        logits.scatter_(-1, answers.unsqueeze(-1), log_p.unsqueeze(-1))
        # The last position predicts nothing that is there.
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))
