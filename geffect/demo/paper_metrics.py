"""The metrics of table 1 of the G-effect paper, of a model of the study."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect.audit import AuditSet
from geffect.evaluation import (
    evaluate_tokens,
    forget_quality,
    generated,
    model_utility,
    rouge,
    truth_ratio,
)
from geffect.evaluation.memorised import nll, prob
from geffect.evaluation.tokens import Floats
from geffect.evaluation.truth_ratio import true_better

from . import language_model as lm
from .data import Data
from .recognised import among_alternatives

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PERTURBED = 5
"""So many wrong answers a question has in TOFU."""

STRENGTHS = {"ES exact": "forget", "ES perturbed": "forget_paraphrase"}


def metrics(model: "PreTrainedModel", data: Data, retrained: "PreTrainedModel") -> dict[str, Any]:
    """Columns metric and value.

    - Forget quality: the p of TOFU's test, that the truth ratios of the facts to forget are those
      of the retrained model.
    - Model utility: TOFU's harmonic mean, over authors inside and outside of the retain gradient.
      Facts of the world have no wrong answers here.
    - ES: extraction strength of the questions as they were trained, and in other words.
    """
    corpus = data.corpus
    stays = {"retain": corpus.retain, "neighbours": corpus.retain_heldout_authors}
    kept = {
        name: utility(
            model, among_alternatives(name, facts, data.tokenizer, PERTURBED), data.tokenizer
        )
        for name, facts in stays.items()
        if facts
    }
    ratios = (truth_ratios(of, data.asked) for of in (model, retrained))
    values = {
        "forget quality": forget_quality(*ratios).p,
        "model utility": model_utility(kept)["value"].iloc[-1],
        **{
            name: lm.evaluate(model, data.batches[of]).extraction_strength
            for name, of in STRENGTHS.items()
        },
    }
    return {"metric": [*values], "value": np.array([*values.values()], np.float64)}


def truth_ratios(model: "PreTrainedModel", asked: AuditSet) -> Floats:
    """How likely wrong answers are beside the right one, in the form of TOFU's code."""
    wrong = [item for others in asked.alternatives for item in others]
    ends = np.cumsum([len(others) for others in asked.alternatives])[:-1]
    right, others = (nll(evaluate_tokens(model, items)) for items in (asked.items, wrong))
    return truth_ratio(right, np.split(others, ends), "geometric")


def utility(model: "PreTrainedModel", asked: AuditSet, tokenizer: Any) -> Mapping[str, float]:
    """The three means of a set that TOFU's model utility is of."""
    said = rouge(asked.answers, generated(model, tokenizer, asked.items))
    recalled = said.loc[said["metric"] == "rougeL_recall", "value"]
    return {
        "prob": float(np.mean(prob(evaluate_tokens(model, asked.items)))),
        "rouge": float(recalled.mean()),
        "truth_ratio": float(np.nanmean(true_better(truth_ratios(model, asked)))),
    }
