"""The reference model of an objective: where it is missing, and what is kept of it."""

import copy
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from geffect.objectives import Objective
from geffect.objectives.base import Batch, token_log_probabilities


class Likelihoods:
    """A model that is no longer there: what it said of the answer tokens of some batches.

    Called as a model with one of those batches, it returns logits that give each of its answer
    tokens the likelihood it had, and share what is left among all other tokens.
    """

    def __init__(self, model: Any, batches: Iterable[Batch]) -> None:
        # By the identity of the tokens, which are kept so that it stays theirs.
        self._known: dict[int, tuple[Batch, Tensor]] = {}
        for batch in batches:
            with torch.no_grad():
                log_p, _ = token_log_probabilities(model, batch)
            self._known[id(batch["input_ids"])] = batch, log_p.float()

    def __call__(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        """The logits `Float[sample, position, token]`, up to the largest token of the answers."""
        batch, log_p = self._known[id(input_ids)]
        answers = batch["labels"][:, 1:].clamp(min=0)
        tokens = int(answers.max()) + 2
        left = torch.log(-torch.expm1(log_p) / (tokens - 1))
        logits = left.unsqueeze(-1).repeat(1, 1, tokens)
        logits.scatter_(-1, answers.unsqueeze(-1), log_p.unsqueeze(-1))
        # The last position predicts nothing that is there.
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))


def missing_in(objective: Objective) -> list[Objective]:
    """The objectives, among it and those it is made of, that have no reference yet."""
    return [part for part in _parts(objective) if getattr(part, "reference", part) is None]


def with_reference(objective: Objective, reference: Any) -> Objective:
    """The objective with a reference wherever one is missing.

    >>> from geffect.objectives import NPO, GradDiff
    >>> with_reference(GradDiff(forget=NPO()), "a model").forget.reference
    'a model'
    """
    completed = copy.copy(objective)
    for name, value in vars(objective).items():
        if isinstance(value, Objective):
            # Past the lock of a frozen dataclass: the copy is ours.
            object.__setattr__(completed, name, with_reference(value, reference))
        elif name == "reference" and value is None:
            object.__setattr__(completed, name, reference)
    return completed


def _parts(objective: Objective) -> Iterator[Objective]:
    yield objective
    for part in vars(objective).values():
        if isinstance(part, Objective):
            yield from _parts(part)
