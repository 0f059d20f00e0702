"""Degenerate output, of models whose answers are known."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect.evaluation import degenerate
from tests.utils import tiny

V, END = 40, 39
Item = dict[str, list[int]]


class Saying(nn.Module):
    """Says a text of its own to each question, which is one token, and then ends."""

    def __init__(self, answers: dict[int, list[int]], sure: float = 20.0) -> None:
        super().__init__()
        self.answers, self.sure = answers, sure

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, V)
        for row, ids in enumerate(input_ids.tolist()):
            said = [*self.answers[ids[0]], *[END] * len(ids)]
            for place in range(len(ids)):
                logits[row, place, said[place]] = self.sure
        return SimpleNamespace(logits=logits)


def items(answers: dict[int, list[int]]) -> list[Item]:
    return [{"input_ids": [q, *a, END], "labels": [-100, *a, END]} for q, a in answers.items()]


GOLD = {1: [10, 11, 12], 2: [13, 14], 3: [15, 16, 17, 18], 4: [19] * 12}


def told(answers: dict[int, list[int]], original: nn.Module | None = None, **options: Any) -> Any:
    model = Saying(answers)
    found = degenerate(model, items(GOLD), original or Saying(answers), ends=[END], **options)
    return found.pivot(index="item", columns="metric", values="value")


def test_what_the_original_says_is_not_degenerate() -> None:
    found = told(GOLD, batch=3).loc[[0, 1, 2]]  # the fourth answer repeats itself, by its data
    assert (found[["empty", "repeats", "unlikely", "endless", "degenerate"]] == 0).all(axis=None)
    assert (found["distinct"] == 1).all()


def test_each_kind_is_told() -> None:
    found = told({1: [], 2: [20, 21] * 5, 3: list(range(3, 39)), 4: [5] * 40})
    assert found["empty"].tolist() == [1, 0, 0, 0]
    assert found["repeats"].tolist() == [0, 1, 0, 1]  # of ten tokens nine pairs, two distinct
    # 24 tokens where three times the right answer are fewer, and 36 where it has twelve.
    assert found["endless"].tolist() == [0, 0, 1, 1]
    assert found["unlikely"].tolist() == [0, 0, 0, 0]
    assert found["degenerate"].tolist() == [1, 1, 1, 1]


def test_what_the_original_would_not_say_is_unlikely() -> None:
    said = {1: [10, 11, 12], 2: [30, 31], 3: [15, 16, 17, 33], 4: [34, 35]}
    sure = 3.0
    found = told(said, Saying(GOLD, sure))
    norm = math.log(math.exp(sure) + V - 1)
    for index, (question, answer) in enumerate(said.items()):
        gold = [*GOLD[question], *[END] * 9]
        nll = [norm - sure * (token == gold[i]) for i, token in enumerate(answer)]
        unlikely = sum(nll) / len(nll) > 0.75 * math.log(V)
        assert found["unlikely"][index] == found["degenerate"][index] == unlikely
    assert found["unlikely"].tolist() == [0, 1, 0, 1]


def test_distinct_answers_are_counted() -> None:
    found = told({1: [7, 8], 2: [7, 8], 3: [7, 8], 4: [9]})
    assert found["distinct"].mean() == pytest.approx(2 / 4)


def test_pairs_are_repeated_beyond_half() -> None:
    """rep2 = 1 - distinct / all: three of four pairs are distinct, then one of three."""
    found = told({1: [7, 8, 7, 8, 9], 2: [7, 7, 7, 7], 3: [7], 4: [7, 7, 7]})
    assert found["repeats"].tolist() == [0, 1, 0, 0]


def test_items_without_an_answer_are_nan_and_nothing_is_endless_without_ends() -> None:
    rows = [*items(GOLD), {"input_ids": [1, 2], "labels": [-100, -100]}]
    model = Saying(GOLD)
    found = degenerate(model, rows, model, ends=[])
    assert found[found["item"] == 4]["value"].isna().all()
    assert found[found["metric"] == "endless"]["value"].tolist()[:4] == [0.0] * 4
    with pytest.raises(ValueError, match=r"should have answers\. Found none in 1 items"):
        degenerate(model, rows[-1:], model)


def test_a_model_of_no_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="logits that are numbers"):
        degenerate(Saying(GOLD, sure=math.nan), items(GOLD), Saying(GOLD), ends=[END])


def test_positions_that_run_out_end_no_answer() -> None:
    model = tiny.gpt2().eval()
    ids = [3, 4, 5]
    rows = [{"input_ids": ids, "labels": [-100, -100, 5]}]
    with torch.no_grad():
        said = [*ids[:2]]
        while len(said) < 16:
            said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    never = next(token for token in range(tiny.VOCABULARY) if token not in said)
    found = degenerate(model, rows, model, ends=[never]).set_index("metric")["value"]
    assert found["endless"] == 1.0


def test_an_encoder_decoder() -> None:
    model, batch = tiny.t5(), tiny.translation(0)
    rows = [{name: of[i].tolist() for name, of in batch.items()} for i in range(3)]
    found = degenerate(model, rows, model, ends=[1])
    assert len(found) == 18 and not np.isnan(found["value"]).any()
