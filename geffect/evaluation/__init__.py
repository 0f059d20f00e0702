"""Evaluators: what a model knows and what is gone, from its answers and from its parameters.

They take models and data and give reports; none changes a model.
"""

from .answers import generated
from .closure import Closure, Rule, Triple, close
from .deep_unlearning import DeepUnlearning, deep_unlearning
from .degenerate import degenerate
from .edu_relat import Family, Target
from .ends import ends_of
from .extraction import extraction_strength
from .membership import Membership, Scores, auc, membership, privleak
from .memorised import memorised
from .minimal_sets import minimal_sets
from .privacy import grad_norm, privacy
from .retraining_gap import retraining_gap
from .rouge import rouge
from .similar_extraction import similar_extraction
from .tofu import forget_quality, model_utility
from .tokens import TokenTable, evaluate_tokens
from .truth_ratio import prob_options, truth_ratio
from .utility import divergence, kept_share, multiple_choice, perplexity, windows

__all__ = [
    "Closure",
    "DeepUnlearning",
    "Family",
    "Membership",
    "Rule",
    "Scores",
    "Target",
    "TokenTable",
    "Triple",
    "auc",
    "close",
    "deep_unlearning",
    "degenerate",
    "divergence",
    "ends_of",
    "evaluate_tokens",
    "extraction_strength",
    "forget_quality",
    "generated",
    "grad_norm",
    "kept_share",
    "membership",
    "memorised",
    "minimal_sets",
    "model_utility",
    "multiple_choice",
    "perplexity",
    "privacy",
    "privleak",
    "prob_options",
    "retraining_gap",
    "rouge",
    "similar_extraction",
    "truth_ratio",
    "windows",
]
