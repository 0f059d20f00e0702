"""What a study says of recognition, beside a loop over single answers."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from geffect.audit import AuditSet
from geffect.demo import language_model as lm
from geffect.demo.config import EmbeddedConfig, UnlearningConfig
from geffect.demo.corpus import Corpus, Size, alternatives, generate, value_of
from geffect.demo.recognised import forget_set, recognised
from geffect.risk import log_likelihood

SHAPE = EmbeddedConfig(layers=1, hidden=16, heads=2)
CONFIG = UnlearningConfig(teaching_steps=3, teaching_rate=1e-2)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate(0, Size(authors=3, forget=1, heldout=1, world=4))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Any:
    return lm.train_tokenizer(corpus)


@pytest.fixture(scope="module")
def asked(corpus: Corpus, tokenizer: Any) -> AuditSet:
    return forget_set(corpus, tokenizer)


def log_p(model: Any, item: Any) -> torch.Tensor:
    """Of each scored token of one row."""
    ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])[:, 1:]
    with torch.no_grad():
        found = log_likelihood(model(input_ids=ids).logits[:, :-1], labels)
    return found[labels != -100]


def test_the_set_holds_values_and_others(corpus: Corpus, asked: AuditSet, tokenizer: Any) -> None:
    for index, fact in enumerate(corpus.forget):
        assert asked.entities[index] == (value_of(fact) or ("", ""))[1]
        assert asked.wrong[index] == tuple(other.answer for other in alternatives(fact))
        text = tokenizer.decode(asked.alternatives[index][0]["input_ids"])
        assert fact.question in text and asked.wrong[index][0] in text


def test_recognition_is_that_of_a_loop(corpus: Corpus, asked: AuditSet, tokenizer: Any) -> None:
    asked = replace(asked, alternatives=tuple(others[:3] for others in asked.alternatives))
    model = lm.build(SHAPE, tokenizer, seed=0)
    before = copy.deepcopy(model.state_dict())
    found = recognised(model, asked, tokenizer, CONFIG)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def beaten(of: Any, rows: range) -> list[float]:
        return [
            np.mean(
                [
                    float(log_p(of, asked.items[i])[:-1].sum() > log_p(of, other)[:-1].sum())
                    for other in asked.alternatives[i]
                ]
            )
            for i in rows
        ]

    values = []
    for item, value in zip(asked.items, asked.entities, strict=True):
        ids = tokenizer(value, add_special_tokens=False)["input_ids"]
        answer = [x for x in item["labels"] if x != -100]
        start = next(i for i in range(len(answer)) if answer[i : i + len(ids)] == ids)
        values.append(-float(log_p(model, item)[start : start + len(ids)].mean()))
    assert found["value_nll"] == pytest.approx(np.mean(values), abs=1e-4)
    even, odd = range(0, 10, 2), range(1, 10, 2)
    assert found["recognition"] == pytest.approx(np.mean(beaten(model, range(10))))
    rows = lm.encode(tokenizer, corpus.forget)
    after = [
        beaten(lm.taught(model, lm.rows(rows, taught), steps=3, learning_rate=1e-2), of)
        for of, taught in ((even, odd), (odd, even))
    ]
    assert found["recognition_taught"] == pytest.approx(np.mean(after))


def test_without_alternatives_there_is_no_recognition(asked: AuditSet, tokenizer: Any) -> None:
    model = lm.build(SHAPE, tokenizer, seed=0)
    found = recognised(
        model, replace(asked, alternatives=tuple(() for _ in asked.items)), tokenizer, CONFIG
    )
    assert found["value_nll"] is not None
    assert (found["recognition"], found["recognition_taught"]) == (None, None)


def test_the_strongest_attack_is_none_weaker_than_teaching(
    corpus: Corpus, asked: AuditSet, tokenizer: Any
) -> None:
    """Whose budget need not be among those of the attacks."""
    config = replace(CONFIG, attack_steps=(1,), attack_rates=(1e-4,), savings_steps=1)
    model, text = lm.build(SHAPE, tokenizer, seed=0), lm.encode(tokenizer, corpus.retain)
    found = recognised(model, asked, tokenizer, config, [text] * 3)
    others = [
        recognised(model, asked, tokenizer, replace(config, teaching_steps=n, teaching_rate=rate))
        for n, rate in ((1, 1e-2), (3, 1e-2), (1, 1e-4), (3, 1e-4))
    ]
    assert found["recognition_taught"] == others[1]["recognition_taught"]
    assert found["recognition_strongest"] == max(of["recognition_taught"] or 0.0 for of in others)
