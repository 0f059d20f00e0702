"""The risk R on data: the negative log-likelihood of the tokens that are scored, and its gradient.

One place says which label a position predicts, takes likelihoods in float32, runs a model without a
trace, and takes the gradient of a risk. Recorder, callback, replay, effects, the trainers'
evaluation and the demo use it.
"""

from geffect.beside import beside

from .alignment import check_differentiable, check_loaded, predicts_next
from .data import RiskSet, as_batches, check_data, check_each, noting_risk
from .gradient import RiskGradient, mean_nll, risk_gradient
from .likelihood import (
    at_least_float32,
    check_answers,
    for_labels,
    inputs_of,
    label_logits,
    log_likelihood,
    nll,
    scored_tokens,
    sequence_nll,
    sequence_sum,
    token_log_probabilities,
    token_mean,
)
from .undisturbed import undisturbed

__all__ = [
    "RiskGradient",
    "RiskSet",
    "as_batches",
    "at_least_float32",
    "beside",
    "check_answers",
    "check_data",
    "check_differentiable",
    "check_each",
    "check_loaded",
    "for_labels",
    "inputs_of",
    "label_logits",
    "log_likelihood",
    "mean_nll",
    "nll",
    "noting_risk",
    "predicts_next",
    "risk_gradient",
    "scored_tokens",
    "sequence_nll",
    "sequence_sum",
    "token_log_probabilities",
    "token_mean",
    "undisturbed",
]
