"""The batteries of an audit: what is measured of each model, a value for each item.

`memorised` asks directly, `privacy` by membership; `utility` asks for what should stay; `hidden`
attacks. None knows what the others find, and none changes a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log
from typing import Any

import numpy as np
import pandas as pd

from geffect.data.collate import Item
from geffect.evaluation import memorised as memorised_of
from geffect.evaluation.answers import generated
from geffect.evaluation.memorised import nll, prob
from geffect.evaluation.privacy import privacy as scored
from geffect.evaluation.rouge import rouge
from geffect.evaluation.tokens import TokenTable
from geffect.evaluation.truth_ratio import truth_ratio

from .attacks import HIDDEN, attacks
from .look import Look
from .models import ORIGINAL
from .sets import FORGET, HOLDOUT, RETAIN, TEXT, AuditSet
from .verdict import MEMORISED, NEAR_TIES, PRIVACY, UNIFORM, UTILITY

PARAPHRASED = "paraphrase prob"


def memorised(look: Look) -> Iterator[pd.DataFrame]:
    """What the model says when asked: of the forget set and the holdout."""

    def measured(metric: Callable[[TokenTable], Any]) -> Callable[[list[Item]], Any]:
        return lambda items: metric(look.record(items))

    for of in look.asked:
        record = look.record(of.items)
        yield from _told(look, MEMORISED, of, record)
        yield look.rows(MEMORISED, NEAR_TIES, of, record.mean("near_tie"))
        if any(of.alternatives):
            right = nll(look.record([*_first_or(of.reworded, of.items)]))
            wrong = _grouped(of.alternatives, measured(nll))
            yield look.rows(MEMORISED, "truth ratio", of, truth_ratio(right, wrong))
        if any(of.paraphrased):
            asked = _grouped(of.paraphrased, measured(prob))
            means = [float(np.mean(x)) if len(x) else float("nan") for x in asked]
            yield look.rows(MEMORISED, PARAPHRASED, of, means)
        yield from _said(look, MEMORISED, of)
    uniform = np.full(len(look.sets[FORGET]), log(record.vocabulary))
    yield look.rows(UTILITY, UNIFORM, look.sets[FORGET], uniform)


def utility(look: Look) -> Iterator[pd.DataFrame]:
    """What the model says of what should stay."""
    for name in (*look.sets.kept, TEXT):
        if name in look.sets:
            of = look.budget.some_of(look.sets[name])
            yield from _told(look, UTILITY, of, look.record(of.items))
    of = look.budget.some_of(look.sets[RETAIN])
    yield from _said(look, UTILITY, of)


def privacy(look: Look) -> Iterator[pd.DataFrame]:
    """How much the forget set looks like what the model was trained on, beside the holdout."""
    if HOLDOUT not in look.sets:
        look.skipped.setdefault("privacy", "No holdout was given, which no model has seen.")
        return
    for of in look.asked:
        answers = of.answers if all(of.answers) else None
        found = scored(look.record(of.items), answers)
        for attack, part in found.groupby("attack", sort=False):
            yield look.rows(PRIVACY, str(attack), of, part.sort_values("item")["value"])


def hidden(look: Look) -> Iterator[pd.DataFrame]:
    """What the model shows under attacks.

    Of the forget set; of the original, on the holdout, where that is to say what a model that never
    knew would show.
    """
    for of in look.asked:
        if (of.name == HOLDOUT) == (look.role == ORIGINAL):
            yield from attacks(look, of)


BATTERIES: Mapping[str, Callable[[Look], Iterator[pd.DataFrame]]] = {
    MEMORISED: memorised,
    PRIVACY: privacy,
    HIDDEN: hidden,
    UTILITY: utility,
}
"""The batteries by name, in the order in which a model passes them."""


def _told(look: Look, battery: str, of: AuditSet, record: TokenTable) -> Iterator[pd.DataFrame]:
    for metric, part in memorised_of(record).groupby("metric", sort=False):
        yield look.rows(battery, str(metric), of, part.sort_values("item")["value"])


def _said(look: Look, battery: str, of: AuditSet) -> Iterator[pd.DataFrame]:
    """What the model says by itself, beside the answers, where there are texts to compare."""
    if look.sets.tokenizer is None or not all(of.questions) or not all(of.answers):
        look.skipped.setdefault(f"texts of {of.name}", "It has no questions and answers as text.")
        return
    texts = generated(look.model, look.sets.tokenizer, of.items)
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
