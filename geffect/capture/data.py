"""Questions and answers from a file, as the batches that risks and objectives are taken on.

Only the answer is scored: its tokens and the one that ends it. Where it stands is not computed from
lengths of its parts, which tokenizers do not keep, but found by rendering the row with and without
its answer, and then checked by decoding what is going to be scored.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from geffect.objectives.base import IGNORED, Batch

FORMS = (("question", "answer"), ("prompt", "completion"), ("text",), ("messages",))
"""The keys that a row may have."""

PLAIN = "Question: {question}\nAnswer: "
"""How a question is put to a model without a chat template."""


@dataclass(frozen=True)
class Example:
    """The tokens of a row, and its labels: the tokens again where they are scored, else -100."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def read(path: str | os.PathLike[str], tokenizer: Any) -> list[Example]:
    """The examples of a JSONL file, or of a folder that `datasets` saved, in their order.

    A row has `question` and `answer`, `prompt` and `completion`, or `messages` of which the last is
    the answer: these go through the chat template of the tokenizer. Without a template a question
    is put as "Question: ...", a new line and "Answer: ", a completion follows its prompt as it is,
    and messages are refused. A row of `text` is scored whole. The answer's tokens are scored and
    the token that ends it: what the template ends a turn with, else the tokenizer's EOS.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "who": 1, "Ada": 2, "wrote": 3}))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = path.write_text('{"prompt": "who wrote", "completion": " Ada"}')
    >>> read(path, tokenizer)
    [Example(input_ids=(1, 3, 2, 0), labels=(-100, -100, 2, 0))]
    """
    path = Path(path)
    examples = [_example(row, where, tokenizer) for where, row in _rows(path)]
    if not examples:
        raise ValueError(
            f"`{path}` should hold at least one row with {_forms()}. Found none. "
            "Write one JSON object a line."
        )
    return examples


def batched(
    examples: Sequence[Example],
    size: int,
    *,
    seed: int | None = None,
    even: bool = False,
    padding: int = 0,
) -> list[Batch]:
    """All examples once, in batches of at most `size` that differ by one example at most.

    Each is padded on the right to its own longest with the token `padding`, which is neither seen
    nor scored. With a `seed` the examples are shuffled before; `even` asks for an even number of
    batches.

    >>> three = [Example((5, 6, 7), (-100, 6, 7)), Example((5,), (5,)), Example((8, 9), (-100, 9))]
    >>> [batch["labels"].tolist() for batch in batched(three, 2)]
    [[[-100, 6, 7]], [[5, -100], [-100, 9]]]
    """
    if size < 1:
        raise ValueError(
            f"`batch_size` should be at least 1. Found {size}. Pass how many examples the memory "
            "holds at a time."
        )
    order = list(range(len(examples)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    count = -(-len(order) // size)
    count += even and count % 2 and count < len(order)
    bounds = [len(order) * i // count for i in range(count + 1)]
    return [
        _batch([examples[i] for i in order[start:stop]], padding)
        for start, stop in pairwise(bounds)
    ]


def _batch(examples: Sequence[Example], padding: int) -> Batch:
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


# Rows, each with where it stands.


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        return _saved_rows(path)
    if path.is_file():
        return _lines(path)
    raise FileNotFoundError(
        f"A data file should exist. Found nothing at `{path}`. Pass a JSONL file, or a folder that "
        "`datasets` saved."
    )


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"`{path}`, line {number},"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} should be a JSON object with {_forms()}. Found text that is no JSON: "
                    f"{error}. Write one JSON object a line."
                ) from error
            yield where, row


def _saved_rows(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"`datasets` should be installed to read the folder `{folder}`. Found no such package. "
            "Run `pip install datasets`, or write the rows into a JSONL file."
        ) from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"`{folder}` should be a folder that `datasets` saved with save_to_disk. Found another "
            "one. Save it so, or write the rows into a JSONL file."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        raise ValueError(
            f"`{folder}` should hold the rows of one data set. Found the splits "
            f"{', '.join(saved)}. Pass the folder of one, such as `{folder / next(iter(saved))}`."
        )
    for number, row in enumerate(saved):
        yield f"`{folder}`, row {number},", row


# A row, as tokens.


@dataclass(frozen=True)
class _Rendered:
    """A row as the model reads it, the same without its answer, and the answer."""

    whole: str
    unanswered: str
    answer: str
    bare: bool  # no template has put the special tokens there: the tokenizer has to


def _example(row: object, where: str, tokenizer: Any) -> Example:
    rendered = _rendered(row, where, tokenizer)
    ids = _tokens(rendered.whole, tokenizer, special=rendered.bare)
    without = _tokens(rendered.unanswered, tokenizer, special=rendered.bare)
    start = _common(ids, without)
    special = _special(tokenizer)
    stop = next((i for i in range(start, len(ids)) if ids[i] in special), len(ids))
    end = ids[stop] if stop < len(ids) else tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "The tokenizer should have a token that ends an answer, in its chat template or as its "
            "EOS. Found neither. Set `tokenizer.eos_token`."
        )
    # White space that a template puts behind the answer is not the answer's.
    last = stop
    while last > start and not tokenizer.decode(ids[last - 1 : last]).strip():
        last -= 1
    _check_scored(ids[start:last], rendered.answer, where, tokenizer)
    labels = [*[IGNORED] * start, *ids[start:last], *[IGNORED] * (stop - last), end]
    return Example((*ids[:stop], end), tuple(labels))


def _rendered(row: object, where: str, tokenizer: Any) -> _Rendered:
    form = _form(row, where)
    assert isinstance(row, Mapping)
    if form == ("messages",):
        return _of_messages(row["messages"], where, tokenizer)
    texts = [row[key] for key in form]
    if not (all(isinstance(text, str) for text in texts) and texts[-1].strip()):
        raise ValueError(
            f"{where} should have text in {' and '.join(f'`{key}`' for key in form)}. Found "
            f"{', '.join(map(repr, texts))}. Mend the row, or leave it out."
        )
    if len(form) == 1:
        return _Rendered(texts[0], "", texts[0], bare=True)
    asked, answer = texts
    if tokenizer.chat_template:
        return _templated([{"role": "user", "content": asked}], answer, tokenizer)
    before = PLAIN.format(question=asked) if form[0] == "question" else asked
    return _Rendered(before + answer, before, answer, bare=True)


def _form(row: object, where: str) -> tuple[str, ...]:
    found = row.keys() if isinstance(row, Mapping) else ()
    for form in FORMS:
        if set(form) <= set(found):
            return form
    keys = f"the keys {', '.join(map(str, found))}" if found else f"{type(row).__name__} {row!r}"
    raise ValueError(f"{where} should have {_forms()}. Found {keys}. Name its texts so.")


def _of_messages(messages: Any, where: str, tokenizer: Any) -> _Rendered:
    try:
        answered = messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
    except (TypeError, KeyError, IndexError, AttributeError):
        answered = False
    if not answered:
        raise ValueError(
            f"{where} should have in `messages` a list of role and content, with an answer of the "
            f"role `assistant` last. Found {messages!r}. Mend the row, or leave it out."
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} should have `question` and `answer`: the tokenizer has no chat template. "
            "Found `messages`. Set `tokenizer.chat_template`, or write the rows so."
        )
    return _templated(messages[:-1], messages[-1]["content"], tokenizer)


def _templated(before: Sequence[Mapping[str, str]], answer: str, tokenizer: Any) -> _Rendered:
    def render(content: str) -> str:
        messages = [*before, {"role": "assistant", "content": content}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        return text

    return _Rendered(render(answer), render(""), answer, bare=False)


def _tokens(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def _special(tokenizer: Any) -> set[int]:
    """What a template puts between turns: no token of an answer, but for the unknown one."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    return marked - {tokenizer.unk_token_id}


def _check_scored(ids: Sequence[int], answer: str, where: str, tokenizer: Any) -> None:
    """Compare what is going to be scored with the answer, but for what no tokenizer keeps."""
    scored = tokenizer.decode(ids)
    alone = tokenizer.decode(_tokens(answer, tokenizer, special=False))
    if "".join(scored.split()) != "".join(alone.split()):
        raise ValueError(
            f"{where} should have its answer, and nothing else, where the labels are: {alone!r}. "
            f"Found {scored!r}. The chat template changes the answer, or the tokenizer joins it to "
            "what stands before; use another template, or rows of `prompt` and `completion`."
        )


def _forms() -> str:
    return ", or ".join(" and ".join(f"`{key}`" for key in form) for form in FORMS)
