"""The corpus as an audit asks it, and what an audit says of a model of the study."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import pandas as pd
from torch import nn

from geffect.audit import AuditSets, sets_of
from geffect.audit.attacks import DECODER_SWAP
from geffect.audit.beside import Beside
from geffect.audit.budget import QUICK
from geffect.audit.models import UNLEARNED
from geffect.audit.relearning import RelearningBudget
from geffect.audit.verdict import RECOVERABLE

from .corpus import TEMPLATES, Corpus, Fact, Size, generate, value_of

OTHERS = 15
"""So many other values of its attribute an answer is told among, at most."""

UNSEEN = 6
"""So many authors that no model has seen are the holdout."""


BENIGN = "relearning benign, 48 steps, rate x 1"

BUDGET = replace(
    QUICK,
    name="study",
    relearning=RelearningBudget(steps=(48,), rates=(1.0,), seeds=(0,), sources=("benign",)),
    kept=40,
    said=8,
    layers=False,
)
"""A quick audit of one of many models: the last step of relearning alone, some of what stays."""

BATTERIES = ("memorised", "hidden", "utility")

SHARES = {"audit_benign": BENIGN, "audit_swap": DECODER_SWAP, "audit_int4": "rounding to int4"}
"""The attacks that have a column in the tables of a study, each by its recoverable share."""

Judge = Callable[[nn.Module], dict[str, Any]]
"""What an audit says of an unlearned model."""


def beside(
    original: nn.Module,
    retrained: Sequence[nn.Module],
    sets: AuditSets,
    rate: float,
    known: Mapping[str, Sequence[Any]] | None = None,
) -> Beside:
    """The models of a seed as an audit of the study holds others against them.

    - `rate`: the learning rate of its attacks, the same for all methods.
    - `known`: what was read of these models before.
    """
    read = None if known is None else pd.DataFrame(known)
    return Beside(original, retrained, sets, rate, BUDGET, BATTERIES, read)


def judge(of: Beside) -> Judge:
    """What a study keeps of the audit of each of its models.

    The verdict, what is in the tables (`SHARES`), and the largest share of an attack that is
    certain to bring something back, with its name. None for an attack that says nothing.
    """

    def judged(model: nn.Module) -> dict[str, Any]:
        verdict, table = of.audited(model)
        own = table[(table["model"] == UNLEARNED) & (table["battery"] == RECOVERABLE)]
        shares = own.set_index("metric")["value"]
        named = {**SHARES, "audit_most": verdict.attack}
        found = {name: float(shares.get(attack, float("nan"))) for name, attack in named.items()}
        return {
            **{name: share if isfinite(share) else None for name, share in found.items()},
            "audit_attack": verdict.attack,
            "verdict": verdict.verdict,
        }

    return judged


def audited_sets(corpus: Corpus, tokenizer: Any, seed: int = 0) -> AuditSets:
    """The sets of a corpus: what to forget, what stays, authors outside of the retain gradient as
    its neighbours, facts of the world, and a holdout of authors that no model has seen.
    """
    unseen = _unseen(corpus, seed)
    values = _values([*corpus.forget, *corpus.retain, *corpus.retain_heldout_authors, *unseen])
    draw = random.Random(f"{seed} others")
    paraphrases = [fact.question for fact in corpus.forget_paraphrases]
    sets = {
        "forget": _rows(corpus.forget, values, draw, paraphrases),
        "retain": _rows(corpus.retain),
        "neighbours": _rows(corpus.retain_heldout_authors),
        "world": _rows(corpus.world),
        "holdout": _rows(unseen, values, draw),
    }
    return sets_of({name: rows for name, rows in sets.items() if rows}, tokenizer)


def _rows(
    facts: Sequence[Fact],
    values: dict[str, list[str]] | None = None,
    draw: random.Random | None = None,
    paraphrases: Sequence[str] = (),
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, fact in enumerate(facts):
        row: dict[str, Any] = {
            "question": fact.question,
            "answer": fact.answer,
            "subject": fact.subject,
        }
        found = value_of(fact)
        if values is not None and draw is not None and found is not None:
            attribute, value = found
            others = [other for other in values[attribute] if other != value]
            chosen = draw.sample(others, min(OTHERS, len(others)))
            form = TEMPLATES[attribute][1]
            wrong = [form.format(name=fact.subject, value=other) for other in chosen]
            row = {**row, "entity": value, "wrong": wrong}
        if paraphrases:
            row = {**row, "paraphrases": [paraphrases[index]]}
        rows.append(row)
    return rows


def _values(facts: Iterable[Fact]) -> dict[str, list[str]]:
    """The values of each attribute among some facts, in one order."""
    values: dict[str, set[str]] = {}
    for fact in facts:
        found = value_of(fact)
        if found is not None:
            values.setdefault(found[0], set()).add(found[1])
    return {attribute: sorted(found) for attribute, found in values.items()}


def _unseen(corpus: Corpus, seed: int) -> list[Fact]:
    """Facts about authors of another corpus whose names are of nobody in this one."""
    known = {fact.subject for fact in corpus.memorised}
    other = generate(seed + 1000, Size(authors=20, forget=1, heldout=0, world=0))
    facts = [fact for fact in other.kept if fact.subject not in known]
    names = list(dict.fromkeys(fact.subject for fact in facts))[:UNSEEN]
    return [fact for fact in facts if fact.subject in names]
