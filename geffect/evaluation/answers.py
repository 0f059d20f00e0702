"""What a model answers by itself: the most likely token again and again, after a question."""

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from geffect.batch import IGNORED
from geffect.data.collate import Item
from geffect.numbers import is_whole
from geffect.risk import predicts_next, undisturbed
from geffect.risk.alignment import unwrapped
from geffect.risk.limits import positions_of

from .ends import chosen_ends, ends_of
from .tokens import check_items, check_numbers, in_float64


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


def generated(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    ends: Collection[int] | None = None,
    times: float = 1.5,
    least: int = 32,
) -> list[str]:
    """What the model says by itself to each question, as text: the most likely token each time.

    - `items`: questions with their answers, as `geffect.data.examples.example` makes them. To an
      item without an answer nothing is said, "".
    - `ends`: tokens that end an answer; by default those of the model and the tokenizer.
    - `times`, `least`: an answer has at most so many times the tokens of the right one, or so many
      if that is more.
    """
    check_items(items)
    ended = set(ends_of(model, tokenizer)) if ends is None else chosen_ends(model, ends)
    lengths = [length_of_answer(item, ended) for item in items]
    asked = [index for index, length in enumerate(lengths) if length is not None]
    limits = [max(least, math.ceil(times * (lengths[index] or 0))) for index in asked]
    said = greedy(model, [items[index] for index in asked], end=ended, longest=limits)
    texts = dict(zip(asked, said, strict=True))
    return [
        tokenizer.decode(texts.get(index, []), skip_special_tokens=True)
        for index in range(len(items))
    ]


def greedy(
    model: nn.Module,
    items: Sequence[Item],
    *,
    end: int | Collection[int] | None,
    longest: int | Sequence[int],
    at_once: int = 64,
) -> list[list[int]]:
    """The tokens that follow each question where the most likely one is always taken.

    - `items`: rows whose first scored token ends the question; what follows it is not looked at. Of
      an encoder-decoder the question is all of `input_ids`.
    - `end`: the token that ends an answer, or several such, which is left out.
    - `longest`: the most tokens of an answer, for all items or for each. Where a model has no more
      positions an answer ends earlier.
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
    limits = _limits(longest, len(items))
    ended = {end} if isinstance(end, int) else set(end or ())
    is_next, questions = predicts_next(model), questions_of(model, items)
    device = next(model.parameters(), torch.empty(0)).device
    said: list[list[int]] = [[] for _ in questions]
    with undisturbed(model), torch.no_grad():
        for rows in _of_one_length(questions, at_once):
            ids = torch.tensor([questions[row] for row in rows], device=device)
            found = _continued(model, ids, ended, max(limits[row] for row in rows), is_next)
            for row, tokens in zip(rows, found, strict=True):
                said[row] = tokens[: limits[row]]
    return said


def sampled(
    model: nn.Module,
    items: Sequence[Item],
    *,
    end: int | Collection[int] | None,
    longest: int | Sequence[int],
    count: int,
    temperature: float = 1.0,
    at_once: int = 64,
) -> list[list[list[int]]]:
    """Some answers to each question, drawn token by token: of each item `count` rows of tokens.

    p(token) is the softmax of logits / temperature. The random numbers of an answer are those of
    its question and its number: neither other items nor batches change it, nor the random numbers
    of torch. The parameters are those of `greedy`; the model stays as it was.

    >>> from types import SimpleNamespace
    >>> class Even(nn.Module):  # 0 or 2, one as likely as the other
    ...     def forward(self, input_ids, attention_mask=None):
    ...         logits = torch.tensor([0.0, -torch.inf, 0.0])
    ...         return SimpleNamespace(logits=logits.expand(*input_ids.shape, 3))
    >>> item = {"input_ids": [1, 2], "labels": [-100, 2]}
    >>> sampled(Even(), [item], end=None, longest=4, count=2)
    [[[2, 0, 0, 0], [2, 0, 2, 2]]]
    """
    if count < 1 or not temperature > 0:
        raise ValueError(
            "`count` should be at least 1 and `temperature` above 0. Found "
            f"`count = {count}` and `temperature = {temperature}`. Pass, say, 8 and 1.0."
        )
    limits = _limits(longest, len(items))
    ended = {end} if isinstance(end, int) else set(end or ())
    is_next, questions = predicts_next(model), questions_of(model, items)
    device = next(model.parameters(), torch.empty(0)).device
    said: list[list[list[int]]] = [[[] for _ in range(count)] for _ in questions]
    each = [(row, number) for row in range(len(questions)) for number in range(count)]
    with undisturbed(model), torch.no_grad():
        for group in _of_one_length([questions[row] for row, _ in each], at_once):
            chosen = [each[place] for place in group]
            ids = torch.tensor([questions[row] for row, _ in chosen], device=device)
            most = max(limits[row] for row, _ in chosen)
            draws = torch.stack([_draws(questions[row], number, most) for row, number in chosen])

            def choose(logits: Tensor, step: int, draws: Tensor = draws) -> Tensor:
                shares = (in_float64(logits) / temperature).softmax(-1).cumsum(-1)
                at = draws[:, step : step + 1].to(shares.device) * shares[:, -1:]
                return torch.searchsorted(shares, at, right=True)[:, 0].to(logits.device)

            found = _continued(model, ids, ended, most, is_next, choose)
            for (row, number), tokens in zip(chosen, found, strict=True):
                said[row][number] = tokens[: limits[row]]
    return said


def _draws(question: Sequence[int], number: int, count: int) -> Tensor:
    """Numbers from 0 to 1 for the tokens of an answer to a question, `Float64[token]`."""
    seed = zlib.crc32(repr((list(question), number)).encode())
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=draw, dtype=torch.float64)


def _limits(longest: int | Sequence[int], count: int) -> list[int]:
    """The most tokens of each answer."""
    limits = [longest] * count if isinstance(longest, int) else list(longest)
    if len(limits) != count or min(limits, default=1) < 1:
        raise ValueError(
            f"`longest` should be at least 1, for all of {count} items or for each. Found "
            f"`longest = {longest}`. Pass, say, 10."
        )
    return limits


def _most_likely(logits: Tensor, step: int) -> Tensor:
    return logits.argmax(-1)


def _continued(
    model: nn.Module,
    ids: Tensor,
    ended: set[int],
    longest: int,
    is_next: bool,
    choose: Callable[[Tensor, int], Tensor] = _most_likely,
) -> list[list[int]]:
    """What is said to questions of one length, up to and without the token that ends it.

    `choose(logits, step)` takes a token for each row.
    """
    asked = {} if is_next else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    said = ids if is_next else torch.full_like(ids[:, :1], _first_of_decoder(model))
    start, over = said.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stop = min(start + longest, positions_of(model))
    if stop <= start:
        raise ValueError(
            f"A question should leave room for an answer in the model's {stop} positions. Found "
            f"one of {start} tokens. Leave it out."
        )
    ends = torch.tensor(sorted(ended), dtype=ids.dtype, device=ids.device)
    while said.shape[1] < stop and not over.all():
        logits = model(**asked, **_so_far(said, is_next)).logits
        check_numbers(model, logits[:, -1])
        token = choose(logits[:, -1], said.shape[1] - start)
        said = torch.cat([said, token[:, None]], dim=1)
        over |= torch.isin(token, ends)
    rows: list[list[int]] = said[:, start:].tolist()
    return [list(takewhile(lambda token: token not in ended, row)) for row in rows]


def _so_far(said: Tensor, is_next: bool) -> dict[str, Tensor]:
    if is_next:
        return {"input_ids": said, "attention_mask": torch.ones_like(said)}
    return {"decoder_input_ids": said}


def _first_of_decoder(model: Any) -> int:
    config = unwrapped(model).config
    first = getattr(config, "decoder_start_token_id", None)
    if first is None:
        raise ValueError(
            f"`{type(unwrapped(model)).__name__}` should name the token that its decoder begins "
            "with. Found no `decoder_start_token_id` in its config. Set it."
        )
    return int(first)


def length_of_answer(item: Item, ended: set[int]) -> int | None:
    """How many tokens an answer has, without the one that ends it; None where nothing is scored."""
    scored = [int(label) for label in item["labels"] if int(label) != IGNORED]
    return len(scored) - (scored[-1] in ended) if scored else None


def questions_of(model: nn.Module, items: Sequence[Item]) -> list[list[int]]:
    """The tokens of each question: those before the answer, or all inputs of an encoder-decoder."""
    is_next = predicts_next(model)
    return [
        _question(item, index) if is_next else _attended(item) for index, item in enumerate(items)
    ]


def _attended(item: Item) -> list[int]:
    mask = item.get("attention_mask", [1] * len(item["input_ids"]))
    return [int(t) for t, seen in zip(item["input_ids"], mask, strict=True) if seen]


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
    if not is_whole(at_once, 1):
        raise ValueError(
            "The rows of a forward, `at_once`, should be a whole number from 1 on. Found "
            f"`at_once = {at_once!r}`. Pass, say, 64."
        )
    groups: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        groups.setdefault(len(question), []).append(row)
    for rows in groups.values():
        yield from (rows[i : i + at_once] for i in range(0, len(rows), at_once))
