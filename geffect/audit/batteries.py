"""The batteries of an audit: what is measured of each model, a value for each item.

`memorised` asks directly, `privacy` by membership; `utility` asks for what should stay; `hidden`
attacks. None knows what the others find, and none changes a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import log
from typing import Any

import numpy as np
import pandas as pd

from geffect.data.collate import Item
from geffect.evaluation import memorised as memorised_of
from geffect.evaluation.answers import generated
from geffect.evaluation.degenerate import degenerate
from geffect.evaluation.memorised import nll, prob
from geffect.evaluation.privacy import privacy as scored
from geffect.evaluation.rouge import rouge
from geffect.evaluation.tokens import TokenTable, evaluate_tokens
from geffect.evaluation.truth_ratio import truth_ratio
from geffect.evaluation.utility import divergence, multiple_choice

from .attacks import HIDDEN, attacks, recognised
from .look import Look
from .models import ORIGINAL
from .sets import FORGET, HOLDOUT, RETAIN, TEXT, AuditSet
from .verdict import MEMORISED, NEAR_TIES, PRIVACY, UNIFORM, UTILITY

PARAPHRASED = "paraphrase prob"

TOKEN_NLL = "nll of a token"
"""Of running text, whose perplexity is its exponential."""


def memorised(look: Look) -> Iterator[pd.DataFrame]:
    """What the model says when it is asked for what should be forgotten."""

    def measured(metric: Callable[[TokenTable], Any]) -> Callable[[list[Item]], Any]:
        return lambda items: metric(look.read(items))

    for of in look.asked:
        record = look.record(of)
        yield from _told(look, MEMORISED, of)
        yield look.rows(MEMORISED, NEAR_TIES, of, record.mean("near_tie"))
        yield look.rows(UTILITY, UNIFORM, of, np.full(len(of), log(record.vocabulary)))
        if any(of.alternatives):
            right = nll(look.read([*_first_or(of.reworded, of.items)]))
            wrong = _grouped(of.alternatives, measured(nll))
            yield look.rows(MEMORISED, "truth ratio", of, truth_ratio(right, wrong))
        if any(of.paraphrased):
            asked = _grouped(of.paraphrased, measured(prob))
            means = [float(np.mean(x)) if len(x) else float("nan") for x in asked]
            yield look.rows(MEMORISED, PARAPHRASED, of, means)
        yield from _chosen(look, MEMORISED, of)
        yield from _said(look, MEMORISED, of)


def utility(look: Look) -> Iterator[pd.DataFrame]:
    """What the model says of what should stay, and how far it is from what the original says."""
    for name in (*look.sets.kept, TEXT):
        if name in look.sets:
            of = look.budget.some_of(look.sets[name], look.budget.kept)
            yield from _told(look, UTILITY, of)
            yield from _chosen(look, UTILITY, of)
            if name == TEXT:
                yield from _perplexity(look, of)
            yield from look.tried(f"divergence on {name}", partial(_divergence, look, of))
    of = look.budget.some_of(look.sets[RETAIN], look.budget.said)
    yield from look.tried("answers to retain", partial(_answers, look, of))


def privacy(look: Look) -> Iterator[pd.DataFrame]:
    """How much the forget set looks like what the model was trained on, beside the holdout."""
    if HOLDOUT not in look.sets:
        look.skipped.setdefault("privacy", "No holdout was given, which no model has seen.")
        return
    for of in (look.sets[FORGET], look.sets[HOLDOUT]):
        answers = of.answers if all(of.answers) else None
        if answers is None:
            lacking = of.answers.count("")
            told = f"{lacking} of {len(of)} items have no answer as text, which is compressed."
            look.skipped.setdefault(f"zlib of {of.name}", told)
        found = scored(look.record(of), answers)
        for attack, part in found.groupby("attack", sort=False):
            yield look.rows(PRIVACY, str(attack), of, part.sort_values("item")["value"])


def hidden(look: Look) -> Iterator[pd.DataFrame]:
    """What the model shows of what should be forgotten, when it is attacked.

    The original is attacked where that is to say what a model that never knew would show.
    """
    for of in look.asked:
        if of.name == FORGET and look.role == ORIGINAL:
            yield from look.tried("recognition", partial(recognised, look, of))
        else:
            yield from attacks(look, of)


BATTERIES: Mapping[str, Callable[[Look], Iterator[pd.DataFrame]]] = {
    MEMORISED: memorised,
    PRIVACY: privacy,
    HIDDEN: hidden,
    UTILITY: utility,
}
"""The batteries by name, in the order in which a model passes them."""


def _told(look: Look, battery: str, of: AuditSet) -> Iterator[pd.DataFrame]:
    record = look.record(of)
    if record.skipped:
        look.skipped.setdefault(
            f"items of {of.name} without an answer",
            f"{len(record.skipped)} of {len(of)} have no token that is scored before the one that "
            f"ends a text. The first of them is item {of.numbers[record.skipped[0]]}, counted "
            "from 0.",
        )
    found = memorised_of(record)
    for metric, part in found.groupby("metric", sort=False):
        yield look.rows(battery, str(metric), of, part.sort_values("item")["value"])


def _chosen(look: Look, battery: str, of: AuditSet) -> Iterator[pd.DataFrame]:
    """Multiple choice, of the rows that have choices."""
    rows = [row for row, options in enumerate(of.options) if options]
    if not rows:
        return
    right = [of.choices[row].index(of.answers[row]) for row in rows]
    options = [of.options[row] for row in rows]
    found = multiple_choice(look.model, options, right, ends=look.ends)
    for metric, part in found.groupby("metric", sort=False):
        values = np.full(len(of), np.nan)
        values[rows] = part.sort_values("item")["value"]
        yield look.rows(battery, f"choices {metric}", of, values)


def _perplexity(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    """Of each window its part of the NLL of a token of the text: their mean is that of all."""
    record = evaluate_tokens(look.model, of.items, ends=look.ends, include_end=True)
    share = record.lengths / record.lengths.mean()
    yield look.rows(UTILITY, TOKEN_NLL, of, -record.mean("logprob") * share)


def _divergence(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    """0 for the original itself."""
    found = divergence(look.original.model, look.model, of.items, ends=look.ends)
    yield look.rows(UTILITY, "KL", of, found)


def _answers(look: Look, of: AuditSet) -> Iterator[pd.DataFrame]:
    """Whether answers are degenerate, and what they have of the right ones."""
    found = degenerate(look.model, of.items, look.original.model, ends=look.ends)
    for metric, part in found.groupby("metric", sort=False):
        yield look.rows(UTILITY, str(metric), of, part.sort_values("item")["value"])
    yield from _said(look, UTILITY, of)


def _said(look: Look, battery: str, of: AuditSet) -> Iterator[pd.DataFrame]:
    """What the model says by itself, beside the answers, where there are texts to compare."""
    if look.sets.tokenizer is None or not all(of.questions) or not all(of.answers):
        look.skipped.setdefault(f"texts of {of.name}", "It has no questions and answers as text.")
        return
    texts = generated(look.model, look.sets.tokenizer, of.items, ends=look.ends)
    for metric, part in rouge(of.answers, texts).groupby("metric", sort=False):
        if str(metric).startswith("rougeL"):
            yield look.rows(battery, str(metric), of, part.sort_values("item")["value"])


def _first_or(several: Sequence[Sequence[Item]], others: Sequence[Item]) -> Iterator[Item]:
    return (own[0] if own else other for own, other in zip(several, others, strict=True))


def _grouped(
    several: Sequence[Sequence[Item]], measure: Callable[[list[Item]], Any]
) -> list[np.ndarray]:
    """The values of the further items of each row, measured together."""
    values = measure([item for items in several for item in items])
    ends = np.cumsum([len(items) for items in several])
    return [np.asarray(part) for part in np.split(values, ends[:-1])]
