"""What an audit refuses of its sets before a model is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from geffect.batch import IGNORED
from geffect.checkpoints.folders import has_tokenizer, tokenizer_of
from geffect.data.collate import check_tokens

from .models import AuditModels, limits_of
from .reading import check_fits
from .sets import FORGET, HOLDOUT, AuditSets


def check_answered(sets: AuditSets) -> None:
    """Refuse a set of which nothing is scored."""
    for name in sets:
        if not any(int(x) != IGNORED for item in sets[name].items for x in item["labels"]):
            raise ValueError(
                f"`{name}` should have an item with an answer, in labels that are not {IGNORED}. "
                f"Found none in {len(sets[name])}. Mark the answers in the labels."
            )


def check_readable(sets: AuditSets, models: AuditModels) -> None:
    """Refuse items that a model cannot read, before the first one is loaded."""
    for role in models:
        positions, vocabulary = limits_of(models[role])
        for name in sets:
            for index, item in enumerate(sets[name].items):
                where = f"Item {index} of `{name}`, for the {role} model,"
                check_fits(len(item["input_ids"]), positions, where)
                check_tokens(item["input_ids"], vocabulary, where)


def check_one_tokenizer(sets: AuditSets, models: AuditModels) -> None:
    """Refuse a model whose own tokenizer reads the texts as other tokens than the audit does.

    All models get the same tokens, which to a model of another tokenizer are other words: one that
    never knew would seem to know nothing at all.
    """
    texts = [text for name in sets for text in (*sets[name].questions, *sets[name].answers) if text]
    if sets.tokenizer is None or not texts:
        return
    read = sets.tokenizer(texts)["input_ids"]
    for role, source in models.items():
        if isinstance(source, nn.Module) or not has_tokenizer(source):
            continue
        own = tokenizer_of([source])(texts)["input_ids"]
        other = next((i for i, tokens in enumerate(own) if tokens != read[i]), None)
        if other is not None:
            raise ValueError(
                "The models of an audit should have one tokenizer, since all are asked the same "
                f"tokens. Found that the one in `{Path(source)}` reads {texts[other]!r:.60} as "
                f"{own[other]!s:.40}, and that of the audit as {read[other]!s:.40}. Pass a "
                f"{role} model that was trained with the tokenizer of the original."
            )


def check_apart(sets: AuditSets) -> None:
    """Refuse sets that share an item where each is asked for the opposite of the other.

    What should be forgotten is none of what stays, and a holdout is in nothing else.
    """
    apart = {FORGET: (sets.kept, "none of what should stay")}
    if HOLDOUT in sets:
        others = tuple(name for name in sets if name != HOLDOUT)
        apart[HOLDOUT] = (others, "data that no model has seen")
    for own, (others, should) in apart.items():
        places = {tokens_of(item): index for index, item in enumerate(sets[own].items)}
        for name in others:
            for index, item in enumerate(sets[name].items):
                if (same := places.get(tokens_of(item))) is not None:
                    raise ValueError(
                        f"`{own}` should be {should}. Found item {same} of it, counted from 0, "
                        f"also as item {index} of `{name}`. Leave it out of one of them."
                    )


def tokens_of(item: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The tokens and the labels of an item, by which it is the same as another."""
    return tuple(tuple(map(int, item[column])) for column in ("input_ids", "labels"))
