"""Whether the values to forget are recognised among others, now and when other facts are taught."""

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import islice, repeat
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from geffect.audit import AuditSet
from geffect.audit.reading import set_of
from geffect.audit.recognition import (
    Halves,
    every_other,
    recognition,
    value_items,
    value_nll,
)
from geffect.data.collate import Item, collate, pad_token_of

from . import language_model as lm
from .config import UnlearningConfig
from .corpus import Corpus, Fact, alternatives, value_of


def forget_set(corpus: Corpus, tokenizer: Any) -> AuditSet:
    """The facts to forget, each with its value and with the same answer of other values."""
    return among_alternatives("forget", corpus.forget, tokenizer)


def among_alternatives(
    name: str, facts: Iterable[Fact], tokenizer: Any, most: int = 15
) -> AuditSet:
    """Facts, each with its value and with the same answer of `most` other values or fewer."""
    rows = [
        {
            "question": fact.question,
            "answer": fact.answer,
            "subject": fact.subject,
            "entity": (value_of(fact) or ("", ""))[1],
            "wrong": [other.answer for other in alternatives(fact, most)],
        }
        for fact in facts
    ]
    return set_of(name, rows, tokenizer)


def recognised(
    model: PreTrainedModel,
    asked: AuditSet,
    tokenizer: Any,
    config: UnlearningConfig,
    text: Iterable[lm.Batch] | None = None,
) -> dict[str, float | None]:
    """Means over the facts to forget, None where nothing is to be told apart.

    `value_nll` is that of the values alone, in nats a token. `recognition` is the share of other
    values that a fact beats, .5 for a model that never saw it; `recognition_taught` the same after
    a copy was taught every other fact of each author: those that are asked for are not shown.

    With batches of retain text also the same after a copy was trained on these,
    `recognition_retain`; after the strongest of all attacks that teach other facts,
    `recognition_strongest`; and after a few steps on the very facts, `savings`.
    """
    others = asked.alternatives
    halves = every_other(asked.subjects)
    rates, steps = {config.teaching_rate}, {config.teaching_steps}
    if text is not None:
        rates |= {*config.attack_rates}
        steps |= {*config.attack_steps}
    after = {
        budget: np.concatenate(values)
        for rate in rates
        for budget, values in _after(model, asked, halves, tokenizer, rate, steps).items()
    }
    found = {
        "value_nll": value_nll_of(model, asked, tokenizer),
        "recognition": _mean(recognition(model, asked.items, others)),
        "recognition_taught": _mean(after[config.teaching_rate, config.teaching_steps]),
    }
    if text is None:
        return found
    students = {
        "recognition_retain": lm.teaching(
            model, islice(text, config.teaching_steps), learning_rate=config.teaching_rate
        ),
        "savings": lm.teaching(
            model,
            repeat(_batch(asked.items, tokenizer), config.savings_steps),
            learning_rate=config.savings_rate,
        ),
    }
    return {
        **found,
        "recognition_strongest": max(
            (mean for mean in map(_mean, after.values()) if mean is not None), default=None
        ),
        **{
            name: _mean(recognition([*taught][-1], asked.items, others))
            for name, taught in students.items()
        },
    }


def value_nll_of(model: nn.Module, asked: AuditSet, tokenizer: Any) -> float | None:
    """The mean NLL of the values to forget, in nats a token of each."""
    valued = value_items(
        asked.items, asked.alternatives, values=asked.entities, tokenizer=tokenizer
    )
    return _mean(value_nll(model, valued))


def _after(
    model: PreTrainedModel,
    asked: AuditSet,
    halves: Halves,
    tokenizer: Any,
    rate: float,
    budgets: Collection[int],
) -> dict[tuple[float, int], list[np.ndarray]]:
    """Recognition of each half after so many steps on the other one: one training for all."""
    found: dict[tuple[float, int], list[np.ndarray]] = {}
    for shown, hidden in (halves, halves[::-1]):
        facts = _batch([asked.items[i] for i in shown], tokenizer)
        items = [asked.items[i] for i in hidden]
        others = [asked.alternatives[i] for i in hidden]
        students = lm.teaching(model, repeat(facts, max(budgets)), learning_rate=rate)
        for step, student in enumerate(students, 1):
            if step in budgets:
                found.setdefault((rate, step), []).append(recognition(student, items, others))
    return found


def _batch(items: Sequence[Item], tokenizer: Any) -> lm.Batch:
    return collate(items, pad_token_id=pad_token_of(tokenizer))


def _mean(values: np.ndarray) -> float | None:
    there = values[~np.isnan(values)]
    mean = float(there.mean()) if len(there) else math.nan
    return mean if math.isfinite(mean) else None
