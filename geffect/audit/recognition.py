"""Recognition: whether a model prefers the right answer to others of the same kind.

The mean NLL of an answer is mostly that of names and templates, which a model learns again within a
few steps whether it knew the fact or not. What tells is the value, and its alternatives.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from geffect.batch import IGNORED
from geffect.data.collate import Item
from geffect.data.spans import narrowed
from geffect.evaluation.tokens import TIE, evaluate_tokens

Floats = NDArray[np.float64]

Attack = Callable[[nn.Module, list[Item]], nn.Module]
"""What teaches some items to a copy of a model, and returns the copy."""

Halves = tuple[Sequence[int], Sequence[int]]
"""The items of each half, by their numbers."""


def recognition(
    model: nn.Module,
    items: Sequence[Item],
    alternatives: Sequence[Sequence[Item]],
    *,
    batch_size: int = 64,
    ends: Collection[int] | None = None,
) -> Floats:
    """The share of the alternatives that the right answer beats in log p, `Float64[item]`.

    1 where the answer is known, .5 on average for a model that never saw it, whatever its
    calibration. A tie counts half. The log p is that of the whole answer, without a token that ends
    it. NaN for an item without alternatives.

    - `items`: questions with their right answers, as `geffect.data.examples.example` makes them.
    - `alternatives`: for each item the same question with other answers, otherwise equal to the
      right one, such as other values of the same attribute.
    - `batch_size`: the rows of a forward.
    - `ends`: tokens that end an answer, as for `geffect.evaluation.evaluate_tokens`.

    >>> from types import SimpleNamespace
    >>> import torch
    >>> class Next(nn.Module):  # a token is followed by the next one
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 9).float())
    >>> right, wrong, as_wrong = ({"input_ids": [3, x], "labels": [-100, x]} for x in (4, 5, 6))
    >>> recognition(Next(), [right, wrong], [[wrong, as_wrong], [right, as_wrong]])
    array([1.  , 0.25])
    """
    _check(items, alternatives)
    together = [(own, *others) for own, others in zip(items, alternatives, strict=True)]
    rows = [item for answers in together for item in answers]
    record = evaluate_tokens(model, rows, batch=batch_size, ends=ends)
    log_p = np.where(record.lengths > 0, record.mean("logprob") * record.lengths, np.nan)
    ends = np.cumsum([len(answers) for answers in together])
    return np.array([_share(own, others) for own, *others in np.split(log_p, ends[:-1])])


def value_items(
    items: Sequence[Item],
    alternatives: Sequence[Sequence[Item]],
    *,
    values: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[dict[str, Any]]:
    """The items with labels on the value of each answer alone, for `value_nll`.

    The value is what is named in `values`, a part of each answer, "" for none. Else it is what
    tells the answer from all of its alternatives: the tokens between those that all begin with and
    those that all end with. An item without either is scored whole.

    >>> right, wrong = ({"input_ids": [1, 2, x, 4], "labels": [-100, 2, x, 4]} for x in (3, 5))
    >>> value_items([right], [[wrong]])[0]["labels"]
    [-100, -100, 3, -100]
    """
    _check(items, alternatives)
    if values and len(values) != len(items):
        raise ValueError(
            f"`values` should be one for each of the {len(items)} items. Found {len(values)}. Give "
            '"" where an answer has none.'
        )
    return [
        narrowed(item, value, tokenizer) if value else _between(item, others)
        for item, others, value in zip(
            items, alternatives, values or [""] * len(items), strict=True
        )
    ]


def value_nll(model: nn.Module, items: Sequence[Item], *, batch_size: int = 64) -> Floats:
    """NLL of the value of each answer, `Float64[item]`, in nats per token of it.

    - `items`: with labels on the values alone, as `value_items` makes them.
    """
    return -evaluate_tokens(model, items, batch=batch_size).mean("logprob")


def recognition_after(
    model: nn.Module,
    items: Sequence[Item],
    alternatives: Sequence[Sequence[Item]],
    attacks: Mapping[str, Attack],
    halves: Halves,
    *,
    ends: Collection[int] | None = None,
) -> pd.DataFrame:
    """Recognition of each half after attacks that have taught the other one: attack, item, value.

    A model that has forgotten does not recognise facts because others were shown again: it stays at
    .5. One that hides them does.

    - `attacks`: by name, such as one for every learning rate and budget. Each gets the model and
      the items of a half, and returns a copy that has seen them.
    - `halves`: `every_other` or `by_subject` of the subjects of the items.
    - `ends`: as for `recognition`.
    """
    _check(items, alternatives)
    if sorted([*halves[0], *halves[1]]) != [*range(len(items))]:
        raise ValueError(
            f"`halves` should hold each of the {len(items)} items once. Found "
            f"{len(halves[0])} and {len(halves[1])}. Take `every_other` of the subjects."
        )
    rows = []
    for name, attack in attacks.items():
        for taught, asked in (halves, halves[::-1]):
            student = _taught(model, attack, [items[i] for i in taught])
            values = recognition(
                student, [items[i] for i in asked], [alternatives[i] for i in asked], ends=ends
            )
            rows += [(name, i, value) for i, value in zip(asked, values, strict=True)]
    table = pd.DataFrame(rows, columns=["attack", "item", "value"])
    return table.sort_values("item", kind="stable", ignore_index=True)


def savings(
    model: nn.Module,
    items: Sequence[Item],
    alternatives: Sequence[Sequence[Item]],
    attack: Attack,
) -> Floats:
    """Recognition of facts after an attack that has taught these very facts, `Float64[item]`.

    After a few steps a model that never knew them recognises some of them, one that hides them all.
    """
    return recognition(_taught(model, attack, list(items)), items, alternatives)


def strongest(table: pd.DataFrame) -> tuple[str, float]:
    """The attack with the largest mean over items, and that mean.

    A maximum is biased upwards: hold it against that of a model that never knew.

    >>> strongest(pd.DataFrame({"attack": ["a", "a", "b"], "value": [0.0, 1.0, 0.75]}))
    ('b', 0.75)
    """
    means = table.groupby("attack", sort=False)["value"].mean()
    if means.isna().all():
        raise ValueError(
            "A table of attacks should have a value. Found none but NaN. Give items alternatives."
        )
    return str(means.idxmax()), float(means.max())


def every_other(subjects: Sequence[str]) -> Halves:
    """Every other item of each subject, and the rest: both halves know all subjects.

    Subjects of one item are dealt in turn.

    >>> every_other(["Ada", "Ada", "Bob", "Ada", "Bob"])
    ([0, 2], [1, 3, 4])
    """
    halves: tuple[list[int], list[int]] = ([], [])
    dealt: dict[str, list[int]] = {}
    for index, subject in enumerate(subjects):
        own = dealt.setdefault(subject, [0, 0])
        side = min((0, 1), key=lambda half: (own[half], len(halves[half])))
        own[side] += 1
        halves[side].append(index)
    return _halves(halves, "item")


def by_subject(subjects: Sequence[str]) -> Halves:
    """The items of the first subjects, and those of the others.

    >>> by_subject(["Ada", "Ada", "Bob", "Cid"])
    ([0, 1], [2, 3])
    """
    known = list(dict.fromkeys(subjects))
    first = set(known[: len(known) // 2])
    halves: tuple[list[int], list[int]] = ([], [])
    for index, subject in enumerate(subjects):
        halves[subject not in first].append(index)
    return _halves(halves, "subject")


def _halves(halves: tuple[list[int], list[int]], of: str) -> Halves:
    if not all(halves):
        raise ValueError(
            f"There should be two {of}s or more, one half to be taught and the other to be asked. "
            f"Found {sum(map(len, halves))} in one half, and none in the other. Give more."
        )
    return halves


def _taught(model: nn.Module, attack: Attack, items: list[Item]) -> nn.Module:
    student = attack(model, items)
    if student is model:
        raise ValueError(
            "An attack should return a changed copy of the model. Found the model itself. Train "
            "`copy.deepcopy(model)` in it."
        )
    return student


def _share(own: float, others: Sequence[float]) -> float:
    if not others or np.isnan([own, *others]).any():
        return float("nan")
    beaten = [0.5 if own == other or abs(own - other) < TIE else own > other for other in others]
    return float(np.mean(beaten))


def _between(item: Item, others: Sequence[Item]) -> dict[str, Any]:
    """The item with labels on what tells it from all of the others."""
    labels = [int(label) for label in item["labels"]]
    if not others:
        return {**item, "labels": labels}
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    answers = [[int(x) for x in other["labels"] if x != IGNORED] for other in (item, *others)]
    before = _shared(answers)
    longest = min(map(len, answers)) - before
    after = min(_shared([answer[::-1] for answer in answers]), longest)
    kept = set(places[before : len(places) - after])
    return {**item, "labels": [x if i in kept else IGNORED for i, x in enumerate(labels)]}


def _shared(answers: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    return len([*takewhile(lambda column: len(set(column)) == 1, zip(*answers, strict=False))])


def _check(items: Sequence[Item], alternatives: Sequence[Sequence[Item]]) -> None:
    if len(items) != len(alternatives):
        raise ValueError(
            f"`alternatives` should be some for each of the {len(items)} items. Found "
            f"{len(alternatives)}. Give an empty list where an item has none."
        )
