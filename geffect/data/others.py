"""Answers of other rows: the questions of a set, each with answers that were given to others.

Objectives that unlearn by what does not belong together take them as `forget.random1` and so on.
"""

import random
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geffect.batch import IGNORED, ORIGINAL, original_of

from .collate import Item, check_length
from .pairs import Items

_DRAWN = re.compile("random([1-9][0-9]*)")


def others(count: int) -> tuple[str, ...]:
    """The names of so many answers of other rows, inside of a side.

    >>> others(3)
    ('random1', 'random2', 'random3')
    """
    return tuple(f"random{number}" for number in range(1, count + 1))


def among_others(answers: Iterable[str]) -> tuple[str, ...]:
    """Which of some answers are those of other rows, by their names.

    >>> among_others(["alternate", "random1"])
    ('random1',)
    """
    return tuple(name for name in answers if _DRAWN.fullmatch(name))


class WithOthers(Dataset[dict[str, Item]]):
    """Items with answers of other items of the same set, as tokens.

    The tokens of an item up to the first that is scored, its question, stand before those of
    another one from there on, its answer. Which others these are follows from the seed and the
    place of the item in the set: no other twice, as far as there are enough of them.

    - `items`: samples with `input_ids` and `labels` of one length, and no further columns that have
      a value for each token but a mask; of several answers the original is taken.
    - `answers`: `random1` and so on, beside what an item has.
    - `seed`: of the draw.
    - `max_length`: rows are cut off after so many tokens.
    - `positions`: how many tokens the model takes.

    >>> items = [{"input_ids": [q, a], "labels": [-100, a]} for q, a in ((1, 2), (3, 4))]
    >>> WithOthers(items, ["random1"])[0]["random1"]
    {'input_ids': [1, 4], 'labels': [-100, 4]}
    """

    def __init__(
        self,
        items: Items,
        answers: Iterable[str],
        *,
        seed: int = 0,
        max_length: int | None = None,
        positions: int | None = None,
    ) -> None:
        self.names = {name: int(name.removeprefix("random")) for name in among_others(answers)}
        self.items, self.seed = items, seed
        self._max_length, self._positions = max_length, positions
        if len(items) < 2:
            raise ValueError(
                f"Items should be two or more where an objective takes answers of others. Found "
                f"{len(items)}. Pass more of them, or answers of your own: items such as "
                f'{{"{ORIGINAL}": ..., "random1": ...}}.'
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Item]:
        item = self.items[index]
        question = original_of(item)
        given = dict(item) if ORIGINAL in item else {ORIGINAL: item}
        drawn = self._drawn(range(len(self.items))[index])
        for name, number in self.names.items():
            answer = original_of(self.items[drawn[(number - 1) % len(drawn)]])
            given[name] = self._checked(_joined(question, answer, self._max_length), index)
        return given

    def _checked(self, row: dict[str, list[int]], index: int) -> dict[str, list[int]]:
        where = f"Item {index} with an answer of another one"
        if all(label == IGNORED for label in row["labels"]):
            raise ValueError(
                f"{where} should have some of that in the first {self._max_length} tokens. Found "
                "none. Pass a larger `max_length`, or leave the item out."
            )
        check_length(len(row["input_ids"]), self._positions, where)
        return row

    def _drawn(self, index: int) -> list[int]:
        """The other items whose answers an item gets, in their order."""
        count = min(max(self.names.values()), len(self.items) - 1)
        drawn = random.Random(f"{self.seed} {index}").sample(range(len(self.items) - 1), count)
        return [other + (other >= index) for other in drawn]


def _joined(question: Any, answer: Any, max_length: int | None) -> dict[str, list[int]]:
    """The question of one item with the answer of another, as lists of tokens."""
    asked, answered = _parted(question), _parted(answer)
    tokens = [*asked[0], *answered[1]][:max_length]
    labels = [*[IGNORED] * len(asked[0]), *answered[2]][:max_length]
    return {"input_ids": tokens, "labels": labels}


def _parted(item: Any) -> tuple[list[int], list[int], list[int]]:
    """The tokens before the first that is scored, those from it on, and the labels of these."""
    ids, labels = (_listed(item, column) for column in ("input_ids", "labels"))
    start = next((i for i, label in enumerate(labels) if i and label != IGNORED), None)
    further = sorted({*item} - {"input_ids", "labels", "attention_mask"})
    if len(ids) != len(labels) or start is None or further:
        found = f"the columns {', '.join(item)}" if further else f"{len(ids)} and {len(labels)}"
        raise ValueError(
            "Items should have `input_ids` and `labels` of one length, with an answer behind a "
            "token or more, and nothing else but a mask, where an objective takes answers of "
            f"others. Found {found}. Pass these answers yourself: items such as "
            f'{{"{ORIGINAL}": ..., "random1": ...}}.'
        )
    mask = _listed(item, "attention_mask") if "attention_mask" in item else [1] * len(ids)
    begin, end = mask.index(1) if 1 in mask else 0, len(ids) - 1
    while labels[end] == IGNORED:
        end -= 1
    return ids[begin:start], ids[start : end + 1], labels[start : end + 1]


def _listed(item: Any, column: str) -> list[int]:
    value = item[column]
    found: list[int] = (value if isinstance(value, Tensor) else torch.as_tensor(value)).tolist()
    return found
