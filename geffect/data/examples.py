"""Questions and answers as tokens. Only the answer is scored, with the token that ends it.

Tokenizers do not keep the lengths of the parts of a row. So the row is rendered with and without
its answer, which tells where that stands, and what is going to be scored is decoded and checked.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geffect.batch import IGNORED, ORIGINAL

from .collate import Item, check_length
from .lines import answered, form_of, forms, rows_of
from .others import WithOthers, among_others

PLAIN = "Question: {question}\nAnswer: "
"""How a question is put to a model without a chat template."""


def read(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    template: bool = True,
    answers: Sequence[str] = (),
    seed: int = 0,
    max_length: int | None = None,
    positions: int | None = None,
) -> list[dict[str, Any]]:
    """The items of a JSONL file, or of a folder that `datasets` saved, in their order.

    - `path`: the file or folder.
    - `tokenizer`: of transformers, with a token that ends an answer.
    - `template`: whether rows go through its chat template, where it has one.
    - `answers`: keys of each row with further answers in place of its own, such as `alternate`.
      Those called `random1` and so on are drawn from the other rows, by `seed`, where the first row
      has no such key: see `geffect.data.others`.
    - `max_length`: rows are cut off after so many tokens.
    - `positions`: how many tokens the model takes.

    Returns mappings of `input_ids` and `labels`, -100 where nothing is scored; with `answers`, of
    such by the names of the answers, `original` for the row's own. Raises ValueError
    for a row in another form, without an answer to score, or longer than `positions`, and says
    where it stands.

    A row has one of these forms:

    - `question` and `answer` go through the chat template of the tokenizer. Without one, or with
      `template=False`, they are put as "Question: ...", a new line and "Answer: ".
    - `messages` go through the template, and need one. The last is the answer.
    - `prompt` and `completion` are plain text, one after the other as they are.
    - `text` is scored whole.

    The answer's tokens are scored and the token that ends it: what the template ends a turn with,
    or the text itself, else the tokenizer's EOS.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "who": 1, "Ada": 2, "wrote": 3}))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = path.write_text('{"prompt": "who wrote", "completion": " Ada"}')
    >>> read(path, tokenizer)
    [{'input_ids': [1, 3, 2, 0], 'labels': [-100, -100, 2, 0]}]
    """
    path = Path(path)
    items: list[dict[str, Any]] = []
    drawn = among_others(answers)

    def item_of(row: object, where: str) -> dict[str, list[int]]:
        item = _cut(example(row, tokenizer, template=template, where=where), max_length, where)
        check_length(len(item["input_ids"]), positions, where)
        return item

    for where, row in rows_of(path):
        if not items and isinstance(row, Mapping):
            drawn = tuple(name for name in drawn if name not in row)
        item: dict[str, Any] = item_of(row, where)
        further = [name for name in answers if name not in drawn]
        if further:
            read_too = {name: item_of(*answered(row, name, where)) for name in further}
            item = {ORIGINAL: item, **read_too}
        items.append(item)
    if not items:
        raise ValueError(
            f"`{path}` should hold at least one row with {forms()}. Found none. "
            "Write one JSON object a line."
        )
    if drawn:
        limits = {"max_length": max_length, "positions": positions}
        with_others = WithOthers(items, drawn, seed=seed, **limits)
        items = [with_others[index] for index in range(len(items))]
    return items


def example(
    row: object, tokenizer: Any, *, template: bool = True, where: str = "The row"
) -> dict[str, list[int]]:
    """The item of one row, in one of the forms of `read`; errors say `where` it stands."""
    rendered = _rendered(row, where, tokenizer, template)
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
    _check_scored(ids[start:last], _answer(rendered, tokenizer, special), where, tokenizer)
    labels = [*[IGNORED] * start, *ids[start:last], *[IGNORED] * (stop - last), end]
    return {"input_ids": [*ids[:stop], end], "labels": labels}


def spelled(item: Item, tokenizer: Any) -> str:
    """The text of an item, with [[ and ]] around what is scored.

    >>> class Letters:
    ...     def decode(self, ids): return "".join(map(chr, ids))
    >>> spelled({"input_ids": [65, 66, 67], "labels": [-100, 66, 67]}, Letters())
    'A[[BC]]'
    """
    scored = [label != IGNORED for label in item["labels"]]
    text, start = "", 0
    for stop in range(1, len(scored) + 1):
        if stop == len(scored) or scored[stop] != scored[start]:
            part = tokenizer.decode(item["input_ids"][start:stop])
            text += f"[[{part}]]" if scored[start] else part
            start = stop
    return text


def _cut(item: dict[str, list[int]], max_length: int | None, where: str) -> dict[str, list[int]]:
    """The first tokens of an item. Raises ValueError where none of them is scored."""
    cut = {column: values[:max_length] for column, values in item.items()}
    if all(label == IGNORED for label in cut["labels"]):
        raise ValueError(
            f"{where} should have some of its answer in the first {max_length} tokens. Found none. "
            "Pass a larger `max_length`, or leave the row out."
        )
    return cut


# A row, as tokens.


@dataclass(frozen=True)
class _Rendered:
    """A row as the model reads it, the same without its answer, and the answer."""

    whole: str
    unanswered: str
    answer: str
    bare: bool  # no template has put the special tokens there: the tokenizer has to


def _rendered(row: object, where: str, tokenizer: Any, template: bool) -> _Rendered:
    form = form_of(row, where)
    assert isinstance(row, Mapping)
    templated = template and bool(tokenizer.chat_template)
    if form == ("messages",):
        return _of_messages(row["messages"], where, tokenizer, templated)
    texts = [row[key] for key in form]
    if not (all(isinstance(text, str) for text in texts) and texts[-1].strip()):
        raise ValueError(
            f"{where} should have text in {' and '.join(f'`{key}`' for key in form)}. Found "
            f"{', '.join(map(repr, texts))}. Mend the row, or leave it out."
        )
    if len(form) == 1:
        return _Rendered(texts[0], "", texts[0], bare=True)
    asked, answer = texts
    if form[0] == "question" and templated:
        return _templated([{"role": "user", "content": asked}], answer, tokenizer)
    before = PLAIN.format(question=asked) if form[0] == "question" else asked
    return _Rendered(before + answer, before, answer, bare=True)


def _of_messages(messages: Any, where: str, tokenizer: Any, templated: bool) -> _Rendered:
    try:
        answered = messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
    except (TypeError, KeyError, IndexError, AttributeError):
        answered = False
    if not answered:
        raise ValueError(
            f"{where} should have in `messages` a list of role and content, with an answer of the "
            f"role `assistant` last. Found {messages!r}. Mend the row, or leave it out."
        )
    if not templated:
        reason = "it is not to be used" if tokenizer.chat_template else "the tokenizer has none"
        raise ValueError(
            f"{where} should have another form than `messages` without a chat template. Found "
            f"`messages`, and {reason}. Use a template, or write rows of `question` and `answer` "
            "or of `prompt` and `completion`."
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


def _answer(rendered: _Rendered, tokenizer: Any, special: set[int]) -> list[int]:
    """The answer's own tokens, without the end token that a text brings along."""
    ids = _tokens(rendered.answer, tokenizer, special=False)
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    ends = rendered.bare and not tokenizer.decode(ids[end + 1 :]).strip()
    return ids[:end] if ends else ids


def _check_scored(
    scored_ids: Sequence[int], answer: Sequence[int], where: str, tokenizer: Any
) -> None:
    """Compare what is going to be scored with the answer, but for what no tokenizer keeps."""
    scored, alone = tokenizer.decode(scored_ids), tokenizer.decode(answer)
    if not alone.strip() or "".join(scored.split()) != "".join(alone.split()):
        raise ValueError(
            f"{where} should have its answer, and nothing else, where the labels are: {alone!r}. "
            f"Found {scored!r}. The chat template changes the answer, or the tokenizer joins it to "
            "what stands before. Write rows of `prompt` and `completion`, which take no template "
            "and may end and begin with a space, or leave the row out."
        )
