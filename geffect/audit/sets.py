"""The sets of an audit: items that are scored, and beside them the texts that they are made of."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from geffect.near import meant

FORGET, RETAIN, NEIGHBOURS = "forget", "retain", "neighbours"
HOLDOUT, TEXT, WORLD = "holdout", "text", "world"

NEEDED = (FORGET, RETAIN)
NAMES = (*NEEDED, NEIGHBOURS, HOLDOUT, TEXT, WORLD)
"""What sets are called: to be forgotten; kept; kept and of the same kind; seen by no model; running
text; general knowledge."""

KEPT = (RETAIN, NEIGHBOURS, WORLD)
"""The sets of questions that unlearning should leave alone."""

Item = Mapping[str, Any]
"""`input_ids` and `labels`, and maybe `attention_mask`, as `geffect.data.examples.example` makes
them."""

Items = tuple[Item, ...]


@dataclass(frozen=True)
class AuditSet:
    """Questions and answers that an audit asks about, as tokens and as texts, row by row.

    - `items`: the rows as the model reads them.
    - `questions`, `answers`: their texts; "" for a question where a row is running text.
    - `subjects`: what each row is about: rows of one are drawn together by a bootstrap.
    - `numbers`: which row of its data each is, from 0.
    - `entities`: the part of each answer that counts, such as a name; "" for all of it.
    - `wrong`, `alternatives`: answers to each question that are not right, as texts and as items.
    - `reworded`: items of further right answers to each question, those of the rows' `answers`.
    - `paraphrases`, `paraphrased`: other questions with the same answer, as texts and as items.
    - `choices`, `options`: the answers of a question of multiple choice, as texts and as items.

    All have an entry a row. Those that nobody gave are empty in each: `of` fills them.

    >>> AuditSet.of("forget", [{"input_ids": [1, 2], "labels": [-100, 2]}]).subjects
    ('0',)
    """

    name: str
    items: Items
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    subjects: tuple[str, ...]
    numbers: tuple[int, ...]
    entities: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...]
    paraphrases: tuple[tuple[str, ...], ...]
    alternatives: tuple[Items, ...]
    reworded: tuple[Items, ...]
    paraphrased: tuple[Items, ...]
    choices: tuple[tuple[str, ...], ...]
    options: tuple[Items, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError(
                f"The set `{self.name}` should have an item or more. Found none. Give it some"
                f"{'' if self.name in NEEDED else ', or leave the set out'}."
            )
        for column, values in self._columns():
            if len(values) != len(self.items):
                raise ValueError(
                    f"`{column}` of the set `{self.name}` should have an entry for each of its "
                    f"{len(self.items)} items. Found {len(values)}. Give one for each."
                )

    @classmethod
    def of(cls, name: str, items: Iterable[Item], **columns: Sequence[Any]) -> "AuditSet":
        """A set of ready items, whose further columns are empty where they are not given.

        A row without a subject is about itself.
        """
        items = tuple(items)
        _check_items(name, items)
        unknown = [column for column in columns if column not in COLUMNS]
        if unknown:
            raise ValueError(
                f"The columns of the set `{name}` should be some of {', '.join(COLUMNS)}. Found "
                f"`{unknown[0]}`.{meant(unknown[0], COLUMNS)} Choose from those."
            )
        filled = {c: tuple(columns.get(c, [empty] * len(items))) for c, empty in COLUMNS.items()}
        for column, own in (
            ("numbers", range(len(items))),
            ("subjects", map(str, range(len(items)))),
        ):
            if column not in columns:
                filled[column] = tuple(own)
        return cls(name, items, **filled)

    def __len__(self) -> int:
        return len(self.items)

    def some(self, rows: Iterable[int]) -> "AuditSet":
        """The set of some of the rows, in the order given."""
        rows = list(rows)
        chosen = {column: tuple(values[i] for i in rows) for column, values in self._columns()}
        return AuditSet(self.name, tuple(self.items[i] for i in rows), **chosen)

    def in_one_order(self) -> "AuditSet":
        """The set in the order of its tokens, the same however its rows stand."""

        def tokens(row: int) -> tuple[list[int], list[int]]:
            ids, labels = ([*map(int, self.items[row][c])] for c in ("input_ids", "labels"))
            return ids, labels

        return self.some(sorted(range(len(self)), key=tokens))

    def _columns(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        return ((column, getattr(self, column)) for column in COLUMNS)


COLUMNS: Mapping[str, Any] = {
    "questions": "", "answers": "", "subjects": "", "numbers": 0, "entities": "", "wrong": (),
    "paraphrases": (), "alternatives": (), "reworded": (), "paraphrased": (), "choices": (),
    "options": (),
}  # fmt: skip
"""What a set has beside its items, and what an entry is where nobody gives it."""


@dataclass(frozen=True)
class AuditSets(Mapping[str, AuditSet]):
    """The sets of an audit by name, and how their texts become tokens.

    - `sets`: some of `NAMES`; "forget" and "retain" have to be among them.
    - `tokenizer`: what the items were made with; None for ready items, without which no attack
      that writes prompts of its own can run.
    - `template`: whether its chat template was used.
    """

    sets: Mapping[str, AuditSet]
    tokenizer: Any = None
    template: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)  # where each set was read

    def __post_init__(self) -> None:
        check_names(self.sets)

    def __getitem__(self, name: str) -> AuditSet:
        return self.sets[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in NAMES if name in self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the sets that unlearning should leave alone."""
        return tuple(name for name in KEPT if name in self.sets)


def check_names(names: Iterable[str]) -> None:
    """Refuse sets without those that an audit needs, and with names that it does not know."""
    names = list(names)
    unknown = [name for name in names if name not in NAMES]
    missing = [name for name in NEEDED if name not in names]
    if unknown or missing:
        found = f"`{unknown[0]}`" if unknown else f"no `{missing[0]}`"
        raise ValueError(
            f"The sets of an audit should be {' and '.join(NEEDED)}, and maybe some of "
            f"{', '.join(NAMES[len(NEEDED) :])}. Found {found}."
            f"{meant(unknown[0], NAMES) if unknown else ''} Name them so."
        )


def _check_items(name: str, items: Sequence[Item]) -> None:
    for index, item in enumerate(items):
        if not (isinstance(item, Mapping) and {"input_ids", "labels"} <= item.keys()):
            raise ValueError(
                f"Item {index} of `{name}` should have `input_ids` and `labels`. Found "
                f"{item!r:.80}. Make items with geffect.data.examples.example."
            )
        shapes = {
            column: np.shape(item[column])
            for column in ("input_ids", "labels", "attention_mask")
            if column in item
        }
        read = {shapes[column] for column in ("input_ids", "attention_mask") if column in shapes}
        if len(read) > 1 or {*map(len, shapes.values())} != {1}:
            found = ", ".join(f"{shape} in `{column}`" for column, shape in shapes.items())
            raise ValueError(
                f"Item {index} of `{name}` should be one row, with an entry for each of its "
                f"tokens. Found the shapes {found}. Make items with geffect.data.examples.example."
            )


def check_labels(sets: AuditSets) -> None:
    """Refuse items of a causal model that have not one label for each of their tokens."""
    for name in sets:
        for index, item in zip(sets[name].numbers, sets[name].items, strict=True):
            tokens, labels = (len(item[column]) for column in ("input_ids", "labels"))
            if tokens != labels:
                raise ValueError(
                    f"Item {index} of `{name}` should have a label for each of its tokens, as the "
                    f"model is causal. Found {labels} of {tokens}. Make items with "
                    "geffect.data.examples.example."
                )
