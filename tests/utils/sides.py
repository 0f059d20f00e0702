"""Items and batches of every side that an objective takes, drawn from a seed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geffect.batch import batches_in
from geffect.data.collate import PaddingSide, collate
from geffect.objectives import Objective, answers_of
from tests.utils import tiny

LONGEST = 9

Item = dict[str, Any]


def sets_of(objective: Objective) -> list[str]:
    """The sets that a pair for an objective has: forget and retain, and those it takes beside."""
    return [*dict.fromkeys(["forget", "retain", *(s.partition(".")[0] for s in objective.sides)])]


def items_of(objective: Objective, count: int = 3, seed: int = 0) -> dict[str, list[Item]]:
    """Items of each set, of unequal length, with the answers that the objective takes."""
    return {
        name: [_item(answers_of(objective, name), seed + 100 * i + row) for row in range(count)]
        for i, name in enumerate(sets_of(objective))
    }


def batches_of(
    objective: Objective, count: int = 2, rows: int = 2, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Batches of each set."""
    items = items_of(objective, count * rows, seed)
    return {
        name: [collate(of_set[i : i + rows]) for i in range(0, len(of_set), rows)]
        for name, of_set in items.items()
    }


def pair_of(
    objective: Objective,
    *,
    rows: Sequence[int] = (0, 1, 2),
    padding: int = 0,
    side: PaddingSide = "right",
    seed: int = 0,
) -> dict[str, Any]:
    """A batch of each set: some rows of the same items, in an order, with so much more padding."""
    items = items_of(objective, max(rows) + 1, seed)
    return {
        name: _collated([of_set[i] for i in rows], padding, side) for name, of_set in items.items()
    }


def extreme(objective: Objective, model: nn.Module) -> dict[str, Any]:
    """A pair whose labels are, row by row, what the model finds most likely, or least likely."""
    pair = pair_of(objective, rows=(0, 1, 2, 3))
    with torch.no_grad():
        for _, batch in batches_in(pair):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs).logits[:, :-1]
            asked = torch.where(
                (torch.arange(len(logits)) % 2 == 0)[:, None], logits.argmax(-1), logits.argmin(-1)
            )
            labels = batch["labels"][:, 1:]
            labels.copy_(torch.where(labels == -100, labels, asked))
    return pair


def _item(answers: Sequence[str], seed: int) -> Item:
    draw = torch.Generator().manual_seed(seed)
    question = _tokens(draw, 1, 4)
    answered = {name: _answered(question, draw) for name in ("original", *answers)}
    return answered if answers else answered["original"]


def _answered(question: Tensor, draw: torch.Generator) -> Item:
    ids = torch.cat([question, _tokens(draw, 2, LONGEST - len(question))])
    labels = ids.clone()
    labels[: len(question)] = -100
    return {"input_ids": ids, "labels": labels}


def _tokens(draw: torch.Generator, least: int, most: int) -> Tensor:
    count = int(torch.randint(least, most + 1, (), generator=draw))
    return torch.randint(0, tiny.VOCABULARY, (count,), generator=draw)


def _collated(items: Sequence[Item], padding: int, side: PaddingSide) -> dict[str, Any]:
    """A batch as wide as a longer item beside these would make it."""
    if not padding:
        return collate(items, padding_side=side)
    ids = torch.zeros(LONGEST + padding, dtype=torch.long)
    longer: Item = {"input_ids": ids, "labels": ids}
    if "original" in items[0]:
        longer = dict.fromkeys(items[0], longer)
    return _without_last(collate([*items, longer], padding_side=side))


def _without_last(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_last(value) if isinstance(value, dict) else value[:-1]
        for name, value in batch.items()
    }
