"""Alternate answers that a model gives itself, as AltPO prefers them to what is to be forgotten."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geffect.batch import IGNORED, ORIGINAL
from geffect.beside import beside

from .collate import Item, check_length

TRIES = 20
"""How often an alternate is drawn until it is another answer than the original."""


def sampled_alternates(
    model: Any,
    items: Iterable[Item],
    *,
    count: int = 5,
    temperature: float = 1.0,
    seed: int = 0,
    prompts: Sequence[Sequence[int]] | None = None,
    longest: int | None = None,
) -> list[dict[str, dict[str, list[int]]]]:
    """`count` items for each, with the original answer and an alternate that the model has sampled.

    The data of AltPO (arXiv 2409.13474), for `DPO`. An answer is sampled token by token from
    softmax(z / temperature) of all tokens, and ends with the token that ends the original. It is
    drawn by the seed and the tokens of the row alone: order, other rows and the random numbers of
    the process change nothing. One that is the original word for word is drawn again.

    - `model`: a causal language model that returns `.logits`; it is left as it was.
    - `items`: as `geffect.data.examples.read` makes them.
    - `prompts`: tokens that the model is given in place of the question of each item, as where it
      is asked for another answer than the true one. The items keep their questions.
    - `longest`: tokens of an alternate, at most, where the model has positions for these; twice
      those of the original if left out.

    Returns items {"original": item, "alternate": item}, those of one question together. Raises
    ValueError for a model that says nothing but the original.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 9))
    >>> item = {"input_ids": [4, 5, 0], "labels": [-100, 5, 0]}
    >>> two = sampled_alternates(uniform, [item], count=2)
    >>> [(pair["original"] == item, pair["alternate"]["input_ids"][0]) for pair in two]
    [(True, 4), (True, 4)]
    """
    items = list(items)
    _check(model, count, temperature, longest)
    if prompts is not None and len(prompts) != len(items):
        raise ValueError(
            f"`prompts` should be one for each item. Found {len(prompts)} for {len(items)} items. "
            "Pass the tokens of each, in their order."
        )
    pairs = []
    with torch.no_grad(), _as_it_was(model):
        for number, item in enumerate(items):
            question, answer = _parts(item, number)
            asked = question if prompts is None else list(prompts[number])
            most = _most(model, asked, longest or 2 * len(answer), number)
            sample = _Sampler(model, asked, answer[-1], most, temperature)
            draws = [_generator(seed, question, asked, index) for index in range(count)]
            for found in _others(sample, answer, draws, number):
                alternate = {
                    "input_ids": [*question, *found],
                    "labels": [*[IGNORED] * len(question), *found],
                }
                pairs.append({ORIGINAL: _plain(item, number), "alternate": alternate})
    return pairs


@dataclass(frozen=True)
class _Sampler:
    """Answers to one question, a token at a time, for several random numbers at once."""

    model: Any
    asked: Sequence[int]
    end: int
    longest: int
    temperature: float

    def __call__(self, draws: Sequence[torch.Generator]) -> list[list[int]]:
        """An answer of each, with the token that ends it."""
        model = self.model
        device = next(model.parameters()).device if isinstance(model, nn.Module) else None
        ids = torch.tensor([[*self.asked]] * len(draws), device=device)
        found: list[list[int]] = [[] for _ in draws]
        inputs: dict[str, Any] = {"input_ids": ids}
        for _ in range(self.longest - 1):
            output = model(**inputs)
            # On the CPU, where the draws of one seed are the same everywhere.
            p = (output.logits[:, -1].double().cpu() / self.temperature).softmax(-1)
            # One that has ended draws no more, so that none depends on the others.
            for answer, row, draw in zip(found, p, draws, strict=True):
                if self.end not in answer:
                    answer.append(int(torch.multinomial(row, 1, generator=draw)))
            if all(self.end in answer for answer in found):
                break
            last = torch.tensor([answer[-1:] for answer in found], device=device)
            cache = getattr(output, "past_key_values", None)
            ids = torch.cat([ids, last], dim=1)
            inputs = (
                {"input_ids": ids}
                if cache is None
                else {"input_ids": last, "past_key_values": cache}
            )
        return [a if self.end in a else [*a, self.end] for a in found]


def _others(
    sample: _Sampler, answer: Sequence[int], draws: Sequence[torch.Generator], number: int
) -> list[list[int]]:
    """An answer of each of the draws that is neither the original nor empty."""
    found: dict[int, list[int]] = {}
    for _ in range(TRIES):
        open_ones = [index for index in range(len(draws)) if index not in found]
        sampled = sample([draws[index] for index in open_ones])
        found |= {
            index: other
            for index, other in zip(open_ones, sampled, strict=True)
            if other != [*answer] and len(other) > 1
        }
        if len(found) == len(draws):
            return [found[index] for index in range(len(draws))]
    raise ValueError(
        f"The model should give other answers than the original of item {number}. Found "
        f"{len(found)} of {len(draws)} after {TRIES} tries. Pass `prompts` that ask for another "
        "answer or a higher `temperature`, or write alternates of your own into the rows of a file."
    )


def _most(model: Any, asked: Sequence[int], longest: int, number: int) -> int:
    """How many tokens an answer may have, of those that the model has positions for."""
    config = getattr(model, "config", None)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return longest
    check_length(len(asked) + 2, positions, f"The question of item {number}, with an answer,")
    return min(longest, positions - len(asked))


def _parts(item: Item, number: int) -> tuple[list[int], list[int]]:
    """The tokens before the answer, and the answer with the token that ends it."""
    tokens, labels = _plain(item, number).values()
    scored = [i for i, label in enumerate(labels) if label != IGNORED]
    if not scored or not scored[0]:
        found = "an answer without a question" if scored else "none"
        raise ValueError(
            f"Item {number} should have a question, and an answer that is scored. Found {found}. "
            "Pass items of rows with both."
        )
    return tokens[: scored[0]], tokens[scored[0] : scored[-1] + 1]


def _plain(item: Item, number: int) -> dict[str, list[int]]:
    if not (isinstance(item, Mapping) and {"input_ids", "labels"} <= item.keys()):
        found = ", ".join(item) if isinstance(item, Mapping) else repr(item)
        raise ValueError(
            f"Item {number} should have `input_ids` and `labels`. Found {found:.60}. Pass a list "
            "of items, as `geffect.data.examples.read` makes them, of one answer each."
        )
    return {name: [int(x) for x in item[name]] for name in ("input_ids", "labels")}


def _check(model: Any, count: int, temperature: float, longest: int | None) -> None:
    if count < 1 or not 0 < temperature < float("inf") or (longest or 2) < 2:
        raise ValueError(
            "`count` should be 1 or more, `temperature` a positive number, and `longest` 2 or "
            f"more. Found {count}, {temperature} and {longest}. Pass, say, count=5."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "`model` should be a causal language model, which goes on with a question. Found an "
            f"encoder-decoder, `{type(model).__name__}`. Sample its answers by its own `generate`."
        )


def _generator(
    seed: int, question: Sequence[int], asked: Sequence[int], index: int
) -> torch.Generator:
    """Random numbers of an alternate of a row, whatever rows there are beside it."""
    told = repr((seed, [*question], [*asked], index)).encode()
    number = int.from_bytes(hashlib.blake2b(told, digest_size=7).digest(), "big")
    return torch.Generator().manual_seed(number)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """A block in eval mode, which the model does not notice."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    with beside(model):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
