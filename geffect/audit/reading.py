"""The sets of an audit from files, rows or ready items."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geffect.data.examples import example
from geffect.data.lines import answered, form_of, rows_of
from geffect.evaluation.utility import WINDOW, windows

from .sets import COLUMNS, NAMES, TEXT, AuditSet, AuditSets, Item, Items, check_names

LISTS = ("answers", "wrong", "paraphrases", "choices")
"""The keys of a row that hold lists of texts: further answers, wrong ones, further questions, and
all answers of a question of multiple choice."""


def sets_of(
    given: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    template: bool = True,
    positions: int | None = None,
) -> AuditSets:
    """The sets of an audit from files, rows or ready items, each by its name.

    - `given`: for each name a JSONL file or a folder of `datasets`, a sequence of rows as such a
      file has them, a sequence of items, or an `AuditSet`. For "text" also a file of plain text.
    - `tokenizer`: of transformers; needed for files and rows.
    - `template`, `positions`: as for `geffect.data.examples.read`.

    A row has a form of `geffect.data.examples.read`, and may have more keys: `subject`; `entity`,
    a part of the answer; and lists of texts, `answers` (also right), `wrong`, `paraphrases` (of the
    question), and `choices`, two or more with the answer among them. Raises ValueError for names
    that an audit does not know and for rows in another form, and says where they stand.

    >>> sets = sets_of({name: [{"input_ids": [1, 2], "labels": [-100, 2]}]
    ...                 for name in ("retain", "forget")})
    >>> [*sets], len(sets["forget"])
    (['forget', 'retain'], 1)
    """
    check_names(given)
    reading = _Reading(tokenizer, template, positions)
    sets = {name: reading.set_of(name, given[name]) for name in NAMES if name in given}
    files = {n: str(d) for n, d in given.items() if isinstance(d, str | os.PathLike)}
    return AuditSets(sets, tokenizer, template, files)


def set_of(name: str, given: Any, tokenizer: Any = None, *, template: bool = True) -> AuditSet:
    """One set by its name, from what `sets_of` takes, where there are no others.

    >>> len(set_of("forget", [{"input_ids": [1, 2], "labels": [-100, 2]}]))
    1
    """
    return _Reading(tokenizer, template, None).set_of(name, given)


@dataclass(frozen=True)
class _Reading:
    """How rows become items."""

    tokenizer: Any
    template: bool
    positions: int | None

    def set_of(self, name: str, data: Any) -> AuditSet:
        if isinstance(data, AuditSet):
            return data if data.name == name else AuditSet(**{**vars(data), "name": name})
        if isinstance(data, str | os.PathLike):
            path = Path(data)
            self._check_tokenizer(name)
            if name == TEXT and path.is_file() and path.suffix not in (".jsonl", ".json"):
                return self._windows(path)
            return self._of_rows(name, list(rows_of(path)))
        if isinstance(data, Sequence) and not isinstance(data, str | bytes):
            if all(isinstance(row, Mapping) and "input_ids" in row for row in data):
                return AuditSet.of(name, data)
            self._check_tokenizer(name)
            return self._of_rows(
                name, [(f"Row {i} of `{name}`", row) for i, row in enumerate(data)]
            )
        raise ValueError(
            f"`{name}` should be a file, rows, items of `input_ids` and `labels`, or an AuditSet. "
            f"Found {type(data).__name__}. Pass one of those."
        )

    def _check_tokenizer(self, name: str) -> None:
        if self.tokenizer is None:
            raise ValueError(
                f"`tokenizer` should be given with rows of text, such as those of `{name}`. Found "
                "none. Pass the model's tokenizer, or items of `input_ids` and `labels`."
            )

    def _of_rows(self, name: str, rows: Sequence[tuple[str, Any]]) -> AuditSet:
        columns: dict[str, list[Any]] = {"items": [], **{column: [] for column in COLUMNS}}
        for where, row in rows:
            for column, value in self._columns_of(row, where).items():
                columns[column].append(value)
        items = columns.pop("items")
        columns["numbers"] = [*range(len(items))]
        named = {subject for subject in columns["subjects"] if subject is not None}
        own = "row " if any(subject.isdecimal() for subject in named) else ""
        columns["subjects"] = [
            f"{own}{number}" if subject is None else subject
            for number, subject in enumerate(columns["subjects"])
        ]
        return AuditSet.of(name, items, **columns)

    def _columns_of(self, row: object, where: str) -> dict[str, Any]:
        *before, key = form_of(row, where)
        assert isinstance(row, Mapping)
        further = {name: _texts(row, name, where) for name in LISTS}
        if further["paraphrases"] and key == "text":
            raise ValueError(
                f"{where} should have a question to have `paraphrases` of it. Found `text` alone. "
                "Write rows of `question` and `answer`."
            )
        item = self._item(row, where)
        answer = _last(row) if key == "messages" else row[key]
        entity = _text(row, "entity", where) or ""
        _check_answers(answer, entity, further, where)

        def other(texts: Sequence[str], name: str) -> Items:
            said = {**row, **{f"{name} {i}": text for i, text in enumerate(texts)}}
            return tuple(
                self._item(*answered(said, f"{name} {i}", where)) for i in range(len(texts))
            )

        return {
            "items": item,
            "questions": _asked(row, before, key),
            "answers": answer,
            "subjects": _text(row, "subject", where),
            "entities": entity,
            "wrong": further["wrong"],
            "paraphrases": further["paraphrases"],
            "choices": further["choices"],
            "options": other(further["choices"], "choices"),
            "alternatives": other(further["wrong"], "wrong"),
            "reworded": other(further["answers"], "answers"),
            "paraphrased": tuple(
                self._item(asking(row, text, where), f"{where} `paraphrases`")
                for text in further["paraphrases"]
            ),
        }

    def _item(self, row: object, where: str) -> Item:
        item = example(row, self.tokenizer, template=self.template, where=where)
        check_fits(len(item["input_ids"]), self.positions, where)
        return item

    def _windows(self, path: Path) -> AuditSet:
        """A file of plain text in windows, without the first token of each."""
        width = min(WINDOW, self.positions or WINDOW)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`{path}` should be text in UTF-8. Found a byte that is none at {error.start}. "
                "Write it in UTF-8."
            ) from error
        items = windows(text, self.tokenizer, width)
        return AuditSet.of(
            TEXT, items, answers=[self.tokenizer.decode(x["input_ids"]) for x in items]
        )


def check_fits(length: int, positions: int | None, where: str) -> None:
    """Refuse an item of more tokens than each model has positions for; None is no limit."""
    if positions is not None and length > positions:
        raise ValueError(
            f"{where} should have at most {positions} tokens, for which each model has positions. "
            f"Found {length}. Shorten it, or leave it out."
        )


def asking(row: Mapping[str, Any], question: str, where: str = "The row") -> Mapping[str, Any]:
    """The row with another question.

    >>> asking({"question": "Who?", "answer": "Ada."}, "Who was it?")
    {'question': 'Who was it?', 'answer': 'Ada.'}
    """
    *before, key = form_of(row, where)
    if key != "messages":
        return {**row, before[0]: question}
    *earlier, last, answer = row["messages"]
    return {**row, "messages": [*earlier, {**last, "content": question}, answer]}


def _check_answers(
    answer: str, entity: str, further: Mapping[str, Sequence[str]], where: str
) -> None:
    """Refuse texts that contradict the answer of a row."""
    right = {text.strip() for text in (answer, *further["answers"])}
    if (taken := next((t for t in further["wrong"] if t.strip() in right), None)) is not None:
        raise ValueError(
            f"{where} should have answers in `wrong` that are not right. Found {taken!r}, "
            "which is one of its answers. Leave it out."
        )
    choices = further["choices"]
    if choices and (len({*choices}) < max(2, len(choices)) or choices.count(answer) != 1):
        raise ValueError(
            f"{where} should have two `choices` or more, each once, with its answer among "
            f"them. Found {len(choices)}: {', '.join(map(repr, choices))}, and the answer "
            f"{answer!r}. Write the answer as it stands among them."
        )
    if entity not in answer:
        raise ValueError(
            f"{where} should have an `entity` that stands in its answer. Found {entity!r}, and "
            f"the answer {answer!r}. Copy it from the answer."
        )


def _asked(row: Mapping[str, Any], before: Sequence[str], key: str) -> str:
    if key != "messages":
        return str(row[before[0]]) if before else ""
    return str(row["messages"][-2]["content"]) if len(row["messages"]) > 1 else ""


def _last(row: Mapping[str, Any]) -> str:
    return str(row["messages"][-1]["content"])


def _text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    raise ValueError(
        f"{where} should have text in `{key}`. Found {value!r}. Quote it, or leave it out."
    )


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key, ())
    if isinstance(value, list | tuple) and all(isinstance(t, str) and t.strip() for t in value):
        return tuple(value)
    raise ValueError(
        f"{where} should have a list of texts in `{key}`. Found {value!r}. Write a list, or leave "
        "it out."
    )
