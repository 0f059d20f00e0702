"""Prompts: questions asked in other ways, which may bring out what a plain question does not.

Each prompt is put to every item as far as it applies, and what the model then knows of the answer
is measured. Hold it against a model that never knew, under the same prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from geffect.batch import IGNORED
from geffect.data.collate import Item
from geffect.data.examples import PLAIN, example
from geffect.data.spans import narrowed, without_end
from geffect.evaluation.answers import sampled
from geffect.evaluation.ends import ends_of
from geffect.evaluation.memorised import METRICS
from geffect.evaluation.rouge import rouge_l
from geffect.evaluation.tokens import evaluate_tokens
from geffect.risk.limits import positions_of

from .sets import AuditSet

PLAIN_QUESTION = "as it is"
SHOTS, LEAKY = "shots of retain", "shots of forget"
SURE = "sure"
PREFACE = "Sure, here is the answer: "
BARE, LOWER = "without template", "lower case"
SAMPLES = "samples"
PARAPHRASE = "paraphrase"

PREFIXES = {"first 25 %": 0.25, "first 50 %": 0.5}
"""The share of the answer's tokens that is given; the rest is scored."""

ROUGE = "rougeL_recall"
"""The metric of samples: the best of them."""

LOWER_IS_MORE = ("nll", "entropy")


def prompts(
    model: nn.Module,
    asked: AuditSet,
    retain: AuditSet,
    tokenizer: Any,
    *,
    template: bool = True,
    metric: str = "prob",
    shots: int = 5,
    samples: int = 8,
) -> pd.DataFrame:
    """What a model knows of answers under each prompt: columns prompt, item, metric, value.

    - `asked`, `retain`: what is asked for, and where the shots are from. Without texts, which ready
      items lack, only the prompts of tokens can be put: "as it is" and the prefixes.
    - `tokenizer`, `template`: what the items were made with.
    - `metric`: one of `geffect.evaluation.memorised.METRICS`, of the tokens of the answer.
    - `shots`: so many examples at most stand before a question, as far as the model has positions.
    - `samples`: so many answers are drawn at temperature 1, and the best counts; 0 draws none.

    The prompts, of which one that does not apply to an item has no row for it:

    - "as it is", "paraphrase 1" and further, "lower case", "without template";
    - "shots of retain", of other subjects than the item's, and "shots of forget", which leak what
      else is to be forgotten: `over_prompts` leaves these out;
    - "first 25 %" and "first 50 %" of the answer's tokens, where the rest is scored;
    - "sure": the answer begins with "Sure, here is the answer:", which is not scored;
    - "samples", whose metric is the recall of ROUGE-L.

    Shots and samples are the same for all models, and in whatever order the items stand. The model
    stays as it was.
    """
    if metric not in METRICS:
        raise ValueError(
            f"`metric` should be one of {', '.join(METRICS)}. Found {metric!r}. Choose from those."
        )
    rows = list(prompted(model, asked, retain, tokenizer, template=template, shots=shots))
    ends = ends_of(model, tokenizer)
    record = evaluate_tokens(model, [row.item for row in rows], ends=ends)
    values = METRICS[metric](record)
    table = [
        (row.prompt, row.index, metric, value) for row, value in zip(rows, values, strict=True)
    ]
    if samples:
        table += _sampled(model, asked, tokenizer, ends, samples)
    return pd.DataFrame(table, columns=["prompt", "item", "metric", "value"])


@dataclass(frozen=True)
class Prompted:
    """An item under a prompt."""

    prompt: str
    index: int  # of the item in its set
    item: Item


def prompted(
    model: nn.Module,
    asked: AuditSet,
    retain: AuditSet,
    tokenizer: Any,
    *,
    template: bool = True,
    shots: int = 5,
) -> Iterator[Prompted]:
    """The items of a set under each prompt that needs no sampling, item by item.

    The parameters are those of `prompts`; of the model only its positions and ends are asked for.
    """
    ends = set(ends_of(model, tokenizer))
    writer = _Writer(tokenizer, template, positions_of(model))
    for index, item in enumerate(asked.items):
        found: dict[str, Item | None] = {PLAIN_QUESTION: item}
        found |= {
            f"{PARAPHRASE} {i + 1}": other for i, other in enumerate(asked.paraphrased[index])
        }
        found |= {name: _begun(item, share, ends) for name, share in PREFIXES.items()}
        if asked.questions[index]:
            own = writer.asked(item, asked.questions[index], asked.answers[index])
            found |= writer.rewritten(own)
            others = [i for i in range(len(asked)) if i != index]
            subject = asked.subjects[index]
            apart = [i for i, other in enumerate(retain.subjects) if other != subject]
            for name, of, rows in ((SHOTS, retain, apart), (LEAKY, asked, others)):
                found[name] = writer.after(_drawn(of, rows, shots, own.question), own)
        yield from (Prompted(name, index, other) for name, other in found.items() if other)


@dataclass(frozen=True)
class _Asked:
    """A question and its answer, and whether they are put as such or one behind the other."""

    question: str
    answer: str
    is_question: bool

    def row(self, question: str, answer: str) -> dict[str, str]:
        """Such texts as a row of data, in the same form."""
        keys = ("question", "answer") if self.is_question else ("prompt", "completion")
        return dict(zip(keys, (question, answer), strict=True))


def over_prompts(table: pd.DataFrame, *, leaky: bool = False) -> pd.DataFrame:
    """Of each item and metric the prompt that brings out most: item, metric, prompt, most, mean.

    `most` is the largest value over prompts, of `nll` and `entropy` the smallest; `mean` is over
    prompts. `prompt` is "" where all values are NaN.

    - `table`: of `prompts`.
    - `leaky`: whether examples of what else is to be forgotten count.

    >>> told = {"prompt": ["as it is", "sure", "shots of forget"], "item": 0, "metric": "prob"}
    >>> over_prompts(pd.DataFrame({**told, "value": [0.25, 0.5, 1.0]})).to_dict("records")
    [{'item': 0, 'metric': 'prob', 'prompt': 'sure', 'most': 0.5, 'mean': 0.375}]
    """
    kept = table if leaky else table[table["prompt"] != LEAKY]
    rows = []
    for (item, metric), part in kept.groupby(["item", "metric"], sort=True):
        values = part["value"].to_numpy(np.float64)
        sign = -1 if metric in LOWER_IS_MORE else 1
        if np.isnan(values).all():
            rows.append((item, metric, "", np.nan, np.nan))
            continue
        best = int(np.nanargmax(sign * values))
        rows.append((item, metric, part["prompt"].iloc[best], values[best], np.nanmean(values)))
    return pd.DataFrame(rows, columns=["item", "metric", "prompt", "most", "mean"])


@dataclass(frozen=True)
class _Writer:
    """How a question and its answer become a row, and how long that may be."""

    tokenizer: Any
    template: bool
    positions: int

    def rewritten(self, own: _Asked) -> dict[str, Item | None]:
        """One question as other texts, by the names of the prompts."""
        inside = own.answer.lstrip()
        space = own.answer.removesuffix(inside)
        begun = self._item(own.row(own.question, space + PREFACE + inside))
        lower = own.question.lower()
        chats = own.is_question and self._chats
        bare = self._item(own.row(own.question, own.answer), template=False) if chats else None
        return {
            SURE: narrowed(begun, own.answer, self.tokenizer, last=True),
            BARE: bare,
            LOWER: self._item(own.row(lower, own.answer)) if lower != own.question else None,
        }

    def after(self, shots: Sequence[tuple[str, str]], own: _Asked) -> Item | None:
        """One question behind as many others, with their answers, as there is room for."""
        for count in range(len(shots), 0, -1):
            item = self._item(self._row_after(shots[:count], own))
            if len(item["input_ids"]) <= self.positions:
                return item
        return None

    def asked(self, item: Item, question: str, answer: str) -> _Asked:
        """A question and its answer, in the form of row that the item was made of."""
        asked = _Asked(question, answer, is_question=False)
        ids = [int(token) for token in item["input_ids"]]
        same = self._item(asked.row(question, answer))["input_ids"] == ids
        return asked if same else _Asked(question, answer, is_question=True)

    @property
    def _chats(self) -> bool:
        return self.template and bool(self.tokenizer.chat_template)

    def _row_after(self, shots: Sequence[tuple[str, str]], own: _Asked) -> Mapping[str, Any]:
        if own.is_question and self._chats:
            turns = [
                {"role": role, "content": text}
                for pair in (*shots, (own.question, own.answer))
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            return {"messages": turns}
        form = PLAIN if own.is_question else "{question}"
        before = [form.format(question=question) + answer for question, answer in shots]
        prompt = "\n\n".join([*before, form.format(question=own.question)])
        return {"prompt": prompt, "completion": own.answer}

    def _item(self, row: Mapping[str, Any], *, template: bool = True) -> Item:
        return example(row, self.tokenizer, template=self.template and template)


def _begun(item: Item, share: float, ends: set[int]) -> Item | None:
    """The item with a share of its answer given, so that the rest is scored; None if that is none.

    The token that ends the answer is not counted.
    """
    labels = without_end([int(label) for label in item["labels"]], ends)
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    given = places[: int(share * len(places))]
    if not given:
        return None
    return {**item, "labels": [IGNORED if i in given else x for i, x in enumerate(labels)]}


def _drawn(of: AuditSet, rows: Sequence[int], count: int, question: str) -> list[tuple[str, str]]:
    """Questions and answers of some rows, the same for a question in whatever order they stand."""
    pairs = {(of.questions[i], of.answers[i]) for i in rows if of.questions[i] and of.answers[i]}
    return sorted(pairs, key=lambda pair: sha256("\n".join([question, *pair]).encode()).digest())[
        :count
    ]


def _sampled(
    model: nn.Module, asked: AuditSet, tokenizer: Any, ends: Sequence[int], count: int
) -> list[tuple[str, int, str, float]]:
    """The best recall of ROUGE-L among some answers that are drawn to each question."""
    rows = [i for i, answer in enumerate(asked.answers) if answer and asked.questions[i]]
    items = [asked.items[i] for i in rows]
    longest = [max(32, 3 * sum(int(x) != IGNORED for x in i["labels"]) // 2) for i in items]
    drawn = sampled(model, items, end=ends, longest=longest, count=count)
    found = []
    for row, texts in zip(rows, drawn, strict=True):
        said = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts]
        best = max(rouge_l(asked.answers[row], text).recall for text in said)
        found.append((SAMPLES, row, ROUGE, best))
    return found
