"""Recognition against alternatives that are scored one by one."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from geffect.audit.recognition import (
    by_subject,
    every_other,
    recognition,
    recognition_after,
    savings,
    strongest,
    value_items,
    value_nll,
)
from geffect.data.collate import collate
from geffect.risk import log_likelihood, nll
from tests.utils import tiny

Item = dict[str, list[int]]

ENDS = 2  # of a text, as a Llama is configured


def facts(count: int = 4, others: int = 5, seed: int = 1) -> tuple[list[Item], list[list[Item]]]:
    """Questions whose answers begin and end alike, and are of unequal lengths in between."""
    draw = torch.Generator().manual_seed(seed)

    def answered(question: list[int]) -> Item:
        length = 1 + int(torch.randint(0, 3, (), generator=draw))
        value = torch.randint(10, 23, (length,), generator=draw).tolist()
        answer = [5, 6, *value, 7, ENDS]
        return {"input_ids": [*question, *answer], "labels": [-100] * len(question) + answer}

    questions = [torch.randint(3, 23, (3,), generator=draw).tolist() for _ in range(count)]
    rows = [[answered(question) for _ in range(1 + others)] for question in questions]
    return [own for own, *_ in rows], [further for _, *further in rows]


def naive_log_p(model: nn.Module, item: Item) -> float:
    """Of one row, without its end."""
    ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
    labels = labels.masked_fill(labels == ENDS, -100)
    return float(log_likelihood(model(input_ids=ids).logits[:, :-1], labels[:, 1:]).sum())


def beaten(own: float, other: float) -> float:
    return 0.5 if own == other else float(own > other)


def test_recognition_is_the_share_of_alternatives_that_are_less_likely() -> None:
    model = tiny.llama(0).eval()
    items, alternatives = facts()
    with torch.no_grad():
        expected = [
            np.mean([beaten(naive_log_p(model, own), naive_log_p(model, o)) for o in others])
            for own, others in zip(items, alternatives, strict=True)
        ]
    assert 0 < np.mean(expected) < 1
    for batch_size in (1, 3, 64):
        found = recognition(model, items, alternatives, batch_size=batch_size)
        np.testing.assert_allclose(found, expected)
    back = recognition(model, items[::-1], [others[::-1] for others in alternatives[::-1]])
    np.testing.assert_allclose(back[::-1], expected)


class Told(nn.Module):
    """A model that gives one token of the vocabulary a logit, or all the same."""

    def __init__(self, likely: int | None = None, constant: float = 0.0) -> None:
        super().__init__()
        self.likely, self.constant = likely, constant

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, 23) + self.constant
        if self.likely is not None:
            logits[..., self.likely] += 50.0
        return SimpleNamespace(logits=logits)


def short(value: int) -> Item:
    return {"input_ids": [1, 5, value], "labels": [-100, 5, value]}


def test_known_uniform_and_ignorant_models() -> None:
    items, alternatives = [short(9)], [[short(value) for value in range(10, 20)]]
    assert recognition(Told(9), items, alternatives) == 1
    assert recognition(Told(12), items, alternatives) == 0.45  # 12 is beaten by none, 9 others tie
    assert recognition(Told(), items, alternatives) == 0.5
    assert recognition(Told(9, constant=7.5), items, alternatives) == 1


def test_a_constant_on_all_logits_changes_nothing() -> None:
    model = tiny.llama(0).eval()
    items, alternatives = facts()

    class Shifted(nn.Module):
        config = model.config

        def forward(self, **inputs: Tensor) -> Any:
            return SimpleNamespace(logits=model(**inputs).logits + 3.0)

    found = recognition(model, items, alternatives)
    np.testing.assert_array_equal(recognition(Shifted(), items, alternatives), found)
    assert 0 < found.mean() < 1


def test_an_item_without_alternatives_has_no_recognition() -> None:
    found = recognition(Told(9), [short(9), short(9)], [[], [short(10)]])
    np.testing.assert_array_equal(found, [np.nan, 1])
    with pytest.raises(ValueError, match="`alternatives` should be some for each of the 2 items"):
        recognition(Told(9), [short(9), short(9)], [[]])


def test_values_are_what_tells_answers_apart() -> None:
    items, alternatives = facts()
    for item, found in zip(items, value_items(items, alternatives), strict=True):
        kept = [label for label in found["labels"] if label != -100]
        assert kept == item["input_ids"][5:-2]
    assert value_items(items, [[] for _ in items]) == items
    longer = {"input_ids": [1, 5, 9, 9], "labels": [-100, 5, 9, 9]}
    (found,) = value_items([longer], [[short(9)]])  # 9 is both what begins and what ends
    assert found["labels"] == [-100, -100, -100, 9]
    letters = SimpleNamespace(decode=lambda ids: "".join(chr(60 + i) for i in ids))
    (named,) = value_items([short(9)], [[short(8)]], values=["AE"], tokenizer=letters)
    assert named["labels"] == [-100, 5, 9]
    with pytest.raises(ValueError, match="`values` should be one for each of the 4 items"):
        value_items(items, alternatives, values=["a"])


def test_value_nll_is_that_of_the_values_alone() -> None:
    model = tiny.llama(0).eval()
    items, alternatives = facts()
    valued = value_items(items, alternatives)
    with torch.no_grad():
        expected = [-naive_log_p(model, item) / (len(item["input_ids"]) - 7) for item in valued]
    np.testing.assert_allclose(value_nll(model, valued), expected, atol=1e-5)


def teach(model: nn.Module, items: list[Item]) -> nn.Module:
    """A few large steps on a copy."""
    student = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    batch = collate(items)
    for _ in range(12):
        nll(student, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def test_recognition_after_attacks_on_the_other_half() -> None:
    model = tiny.llama(0).eval()
    items, alternatives = facts()
    before = copy.deepcopy(model.state_dict())
    attacks = {"taught": teach, "untaught": lambda model, items: copy.deepcopy(model)}
    halves = every_other(["a", "a", "b", "b"])
    table = recognition_after(model, items, alternatives, attacks, halves)
    assert list(table.columns) == ["attack", "item", "value"]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    by_attack = {name: part["value"].to_numpy() for name, part in table.groupby("attack")}
    assert table[table["attack"] == "taught"]["item"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(by_attack["untaught"], recognition(model, items, alternatives))
    for asked, taught in (halves, halves[::-1]):
        student = teach(model, [items[i] for i in taught])
        for i in asked:
            expected = recognition(student, [items[i]], [alternatives[i]])
            np.testing.assert_allclose(by_attack["taught"][i], expected[0])
    assert strongest(table)[1] == max(values.mean() for values in by_attack.values())
    assert savings(model, items, alternatives, teach).mean() > 0.9


def test_attacks_and_halves_that_would_mislead_are_refused() -> None:
    items, alternatives = facts()
    with pytest.raises(ValueError, match="Found the model itself"):
        savings(Told(), items, alternatives, lambda model, items: model)
    with pytest.raises(ValueError, match="`halves` should hold each of the 4 items once"):
        recognition_after(Told(), items, alternatives, {}, ([0, 1], [1, 2]))
    with pytest.raises(ValueError, match="should be two subjects or more"):
        by_subject(["a", "a"])
    with pytest.raises(ValueError, match="should be two items or more"):
        every_other(["a"])
    with pytest.raises(ValueError, match="none but NaN"):
        strongest(pd.DataFrame({"attack": ["a"], "item": [0], "value": [np.nan]}))


def test_halves() -> None:
    subjects = [*["a"] * 10, *["b"] * 10]
    assert every_other(subjects)[0] == [*range(0, 20, 2)]
    assert by_subject(subjects)[0] == [*range(10)]
    assert every_other("abcdef") == ([0, 2, 4], [1, 3, 5])
