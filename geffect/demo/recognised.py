"""Whether the values to forget are recognised among others, now and when other facts are taught."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from geffect.audit import AuditSet
from geffect.audit.recognition import (
    every_other,
    recognition,
    recognition_after,
    value_items,
    value_nll,
)
from geffect.audit.sets import set_of
from geffect.data.collate import Item, collate, pad_token_of

from . import language_model as lm
from .config import UnlearningConfig
from .corpus import Corpus, alternatives, value_of


def forget_set(corpus: Corpus, tokenizer: Any) -> AuditSet:
    """The facts to forget, each with its value and with the same answer of other values."""
    rows = [
        {
            "question": fact.question,
            "answer": fact.answer,
            "subject": fact.subject,
            "entity": (value_of(fact) or ("", ""))[1],
            "wrong": [other.answer for other in alternatives(fact)],
        }
        for fact in corpus.forget
    ]
    return set_of("forget", rows, tokenizer)


def recognised(
    model: PreTrainedModel, asked: AuditSet, tokenizer: Any, config: UnlearningConfig
) -> dict[str, float | None]:
    """Means over the facts to forget, None where nothing is to be told apart.

    `value_nll` is that of the values alone, in nats a token. `recognition` is the share of other
    values that a fact beats, .5 for a model that never saw it; `recognition_taught` the same after
    a copy was taught every other fact of each author: those that are asked for are not shown.
    """

    def teach(student: nn.Module, items: Sequence[Item]) -> nn.Module:
        facts = collate(items, pad_token_id=pad_token_of(tokenizer))
        steps, rate = config.teaching_steps, config.teaching_rate
        model: Any = student  # of transformers, maybe with adapters of PEFT around it
        taught: nn.Module = lm.taught(model, facts, steps=steps, learning_rate=rate)
        return taught

    others = asked.alternatives
    valued = value_items(asked.items, others, values=asked.entities, tokenizer=tokenizer)
    halves = every_other(asked.subjects)
    after = recognition_after(model, asked.items, others, {"taught": teach}, halves)
    return {
        "value_nll": _mean(value_nll(model, valued)),
        "recognition": _mean(recognition(model, asked.items, others)),
        "recognition_taught": _mean(after["value"].to_numpy()),
    }


def _mean(values: np.ndarray) -> float | None:
    there = values[~np.isnan(values)]
    mean = float(there.mean()) if len(there) else math.nan
    return mean if math.isfinite(mean) else None
