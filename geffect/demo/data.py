"""The facts of a study as a model reads them, and the batches that are drawn of them."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from geffect.audit import AuditSet
from geffect.batch import ORIGINAL, Pair, on_device
from geffect.data.collate import collate, pad_token_of
from geffect.data.others import WithOthers, among_others
from geffect.objectives import ALTERNATE

from . import language_model as lm
from .corpus import Corpus
from .recognised import forget_set

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Data:
    """The encoded facts of one seed, by what they are for: whole, and in batches by length.

    `answers` are further answers to the questions of a set, row by row: `forget.alternate`. Those
    of other rows are drawn by the seed.
    """

    corpus: Corpus
    sets: Mapping[str, lm.Batch]
    batches: Mapping[str, list[lm.Batch]]
    tokenizer: Any
    seed: int = 0  # of the order in which batches are drawn
    answers: Mapping[str, lm.Batch] = field(default_factory=dict)
    judged: Callable[[PreTrainedModel], dict[str, Any]] = lambda model: {}  # what an audit says

    @classmethod
    def of(
        cls, corpus: Corpus, tokenizer: Any, seed: int = 0, device: torch.device = CPU
    ) -> "Data":
        """All sets of a corpus, on a device."""
        facts = {
            "forget": corpus.forget,
            "retain": corpus.retain,
            "retain_heldout_authors": corpus.retain_heldout_authors,
            "world": corpus.world,
            "forget_paraphrase": corpus.forget_paraphrases,
        }
        facts[ALTERNATE] = corpus.forget_unknown
        sets = {
            name: on_device(lm.encode(tokenizer, chosen), device) for name, chosen in facts.items()
        }
        answers = {ALTERNATE: sets.pop(ALTERNATE)}
        batches = {name: lm.by_length(batch) for name, batch in sets.items()}
        return cls(corpus, sets, batches, tokenizer, seed, answers)

    @cached_property
    def asked(self) -> AuditSet:
        """The facts to forget, each with other values of its attribute."""
        return forget_set(self.corpus, self.tokenizer)

    def draws(self, sizes: Mapping[str, int], sides: Sequence[str] = ()) -> Iterator[Pair]:
        """Batches of some sets without end, those of each the same whatever the others are.

        With the further answers that are among the `sides`, to the same questions.
        """
        drawn = {
            name: _draws(self._answered(name, sides), size, _order(self.seed, name))
            for name, size in sizes.items()
        }
        while True:
            yield {name: next(batches) for name, batches in drawn.items()}

    def _answered(self, name: str, sides: Sequence[str]) -> Mapping[str, lm.Batch]:
        """A set by its answers: the original and those among the sides."""
        further = {
            side.partition(".")[2]: answer
            for side, answer in self.answers.items()
            if side in sides and side.startswith(f"{name}.")
        }
        own = [side.partition(".")[2] for side in sides if side.startswith(f"{name}.")]
        return {ORIGINAL: self.sets[name], **further, **self._of_others(name, among_others(own))}

    def _of_others(self, name: str, answers: Sequence[str]) -> dict[str, lm.Batch]:
        """Answers of other rows to the questions of a set."""
        if not answers:
            return {}
        batch = self.sets[name]
        rows = [{c: values[i] for c, values in batch.items()} for i in range(len(batch["labels"]))]
        drawn = WithOthers(rows, answers, seed=self.seed)
        answered = collate(
            [drawn[i] for i in range(len(rows))], pad_token_id=pad_token_of(self.tokenizer)
        )
        device = batch["input_ids"].device
        return {answer: on_device(answered[answer], device) for answer in answers}


def _order(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(32))


def _draws(
    answers: Mapping[str, lm.Batch], size: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Batches of `size` rows, without replacement until too few are left, then from the start.

    Where there is one answer they are those of it, else those of each by its name.
    """
    while True:
        order = torch.randperm(len(answers[ORIGINAL]["input_ids"]), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                drawn = {name: lm.rows(batch, index) for name, batch in answers.items()}
                yield drawn if len(drawn) > 1 else drawn[ORIGINAL]
