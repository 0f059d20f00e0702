"""The words for what stands outside of the lists of modules, and for towers: one table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

EMBEDDING, FINAL_NORM, POOLER, HEAD, OTHER = "embedding", "final norm", "pooler", "head", "other"
PROJECTOR = "projector"

_EITHER = "by its place"

WORDS = {
    _EITHER: r"embedding_norm",  # before the layers, or behind them, as in LFM2
    HEAD: r"(\w+_)?(heads?|classifiers?|predictions?|predictors?)|embed_out|unembed\w*|vocab_\w+"
    r"|lm_loss|qa_outputs|cls|scorer?|(out(put)?|final)_(layer|linear|proj\w*)|out(put)?s?"
    r"|proj(ection)?|proj(ect)?_out|conv_out|fc|(to_)?logits|seq_relationship|sequence_summary",
    PROJECTOR: r"(mm|multi_?modal|vision|visual|image|audio|speech|video|text|language|modality"
    r"|enc_to_dec)_(\w+_)?(proj(ection|ector)?|adapter)|projector|connector|\w*merger\w*"
    r"|abstractor|\w*resampler|q_?former|query_tokens|image_newline|logit_(scale|bias)|input_projection",
    POOLER: r"\w*pool(er|ing)?(_layer)?",
    FINAL_NORM: r"(post|final|out|last)_?\w*norm\w*|\w*norm\w*_(after|post|final|out|last|f)"
    r"|ln_(f|out|post|final|last)",
    EMBEDDING: r"(\w+_)?emb\w*|\w*embed\w*|wte|wpe|(cls|class|dist\w*|mask|register)_tokens?"
    r"|shared|stem|conv_in|project_in|in(put)?_proj\w*|pos(ition\w*)?_\w+|patchify"
    r"|feature_(extractor|projection)|prompt_encoder|pre_?\w*norm\w*|\w*norm\w*_pre|ln_pre",
    "norm": r"\w*norm\w*|ln(_\w+)?",
    "vision": r"(vision|visual|image|video)(_?(tower|model|encoder|backbone|transformer)\w*)?",
    "audio": r"(audio|speech)(_?(tower|model|encoder|backbone|transformer)\w*)?",
    "text": r"(text|language)(_?(tower|model|encoder|decoder|backbone|transformer)\w*)?|llm",
    "coder": r"(\w+_)?(encoder|decoder)",
    "backbone": r"backbone",
}
"""What modules are called, by what they are. The first that fits the whole of a name holds."""

_WORDS = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in WORDS.items()}
_TOWERS = frozenset({"vision", "audio", "text", "coder", "backbone"})


@dataclass(frozen=True)
class Said:
    """What the words of a path say: a tower, how many modules lead to it, and the part of it."""

    tower: str | None = None
    depth: int = 0
    part: str | None = None


def is_norm(module: str) -> bool:
    """Whether a module is called as a norm is."""
    return _what(module) in (FINAL_NORM, "norm")


def said(path: Sequence[str]) -> Said:
    """What the words of a path of modules say, the outer ones first.

    >>> said(["vision_tower", "encoder"]), said(["decoder", "embed_tokens"]).part
    (Said(tower='vision', depth=1, part=None), 'embedding')
    """
    tower, depth = None, 0
    for i, module in enumerate(path, start=1):
        what = _what(module)
        if what == PROJECTOR:
            return Said(PROJECTOR, i)
        if what in _TOWERS:
            if tower is None:
                tower, depth = module.lower().replace("_", " ") if what == "coder" else what, i
        elif what not in (None, _EITHER):
            return Said(tower, depth, FINAL_NORM if what == "norm" else what)
    return Said(tower, depth)


@cache
def _what(module: str) -> str | None:
    return next((what for what, word in _WORDS.items() if word.fullmatch(module)), None)
