"""What a model answers by itself: the most likely token again and again, after a question."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geffect.batch import IGNORED
from geffect.data.collate import Item
from geffect.risk import undisturbed


def are_right(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    answers: Sequence[str],
    *,
    longest: int = 10,
) -> list[bool]:
    """Whether the model answers each question: the answer stands in what it says, in any case.

    - `items`: questions with their answers, as `geffect.data.examples.example` makes them.
    - `answers`: the text to be found, one an item.
    - `longest`: so many tokens are decoded greedily, fewer where the EOS of the tokenizer comes.
    """
    said = greedy(model, items, end=tokenizer.eos_token_id, longest=longest)
    if len(said) != len(answers):
        raise ValueError(
            "`answers` should be one text for each item. Found "
            f"{len(answers)} for {len(said)}. Pass the answers in the order of the items."
        )
    if not all(answer.strip() for answer in answers):
        raise ValueError(
            "`answers` should be texts. Found an empty one, which stands in everything that is "
            "said. Leave that question out."
        )
    return [
        answer.strip().casefold() in tokenizer.decode(tokens).casefold()
        for tokens, answer in zip(said, answers, strict=True)
    ]


def greedy(
    model: nn.Module, items: Sequence[Item], *, end: int | None, longest: int, at_once: int = 64
) -> list[list[int]]:
    """The tokens that follow each question where the most likely one is always taken.

    - `items`: rows whose first scored token ends the question; what follows it is not looked at.
    - `end`: the token that ends an answer, which is left out.
    - `longest`: the most tokens of an answer.
    - `at_once`: rows of a forward, all as long as each other, so that none is padded.

    Eval mode; the model stays as it was.

    >>> from types import SimpleNamespace
    >>> class Next(nn.Module):  # a token is followed by the next one
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 9).float())
    >>> item = {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}
    >>> greedy(Next(), [item], end=6, longest=10)
    [[3, 4, 5]]
    """
    if longest < 1:
        raise ValueError(
            f"`longest` should be at least 1. Found `longest = {longest}`. Pass, say, 10."
        )
    questions = [_question(item, index) for index, item in enumerate(items)]
    device = next(model.parameters(), torch.empty(0)).device
    said: list[list[int]] = [[] for _ in questions]
    with undisturbed(model), torch.no_grad():
        for rows in _of_one_length(questions, at_once):
            ids = torch.tensor([questions[row] for row in rows], device=device)
            for row, tokens in zip(rows, _continued(model, ids, end, longest), strict=True):
                said[row] = tokens
    return said


def _continued(model: nn.Module, ids: Tensor, end: int | None, longest: int) -> list[list[int]]:
    start, ended = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < start + longest and not ended.all():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        token = logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        ended |= token == (-1 if end is None else end)
    rows: list[list[int]] = ids[:, start:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _question(item: Item, index: int) -> list[int]:
    """The attended tokens before the first that is scored."""
    mask = item.get("attention_mask", [1] * len(item["input_ids"]))
    tokens, labels = list(map(int, item["input_ids"])), list(map(int, item["labels"]))
    first = next((i for i, label in enumerate(labels) if label != IGNORED), None)
    question = [token for token, seen in zip(tokens[:first], mask, strict=False) if seen]
    if first is None or not question:
        raise ValueError(
            "An item should have a question and an answer: tokens that are not scored before some "
            f"that are. Found none {'scored' if first is None else 'before them'} in item "
            f"{index}. Mark the answer in its labels."
        )
    return question


def _of_one_length(questions: Sequence[Sequence[int]], at_once: int) -> Iterator[list[int]]:
    """The rows in groups of one length, at most `at_once` each."""
    groups: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        groups.setdefault(len(question), []).append(row)
    for rows in groups.values():
        yield from (rows[i : i + at_once] for i in range(0, len(rows), at_once))
