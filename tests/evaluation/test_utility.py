"""Divergence, perplexity and choices against loops over single tokens and answers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geffect.evaluation import (
    divergence,
    evaluate_tokens,
    kept_share,
    multiple_choice,
    perplexity,
    windows,
)
from tests.utils import tiny
from tests.utils.chat import TURNS, make_tokenizer
from tests.utils.predictions import Fixed

Item = dict[str, list[int]]


def items(count: int = 5) -> list[Item]:
    """Rows of several lengths whose last token is 2."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (5 + index,), generator=draw).tolist()
        asked = 1 + index % 3
        found.append({"input_ids": [*ids, 2], "labels": [-100] * asked + [*ids[asked:], 2]})
    return found


def log_p(model: nn.Module, before: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
    return logits.log_softmax(-1).tolist()


def by_hand(original: nn.Module, model: nn.Module, item: Item, include_end: bool) -> float:
    places = [i for i, label in enumerate(item["labels"]) if label != -100]
    places = places if include_end else places[:-1]
    total = 0.0
    for place in places:
        p, q = (log_p(one, item["input_ids"][:place]) for one in (original, model))
        total += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return total / len(places)


@pytest.mark.parametrize("include_end", [False, True])
def test_divergence_is_that_of_a_loop(include_end: bool) -> None:
    first, second = tiny.gpt2(0), tiny.gpt2(1)
    expected = [by_hand(first, second, item, include_end) for item in items()]
    for batch in (1, 2, 9):
        found = divergence(first, second, items(), batch=batch, ends=[2], include_end=include_end)
        assert found.tolist() == pytest.approx(expected, abs=1e-9) and (found > 0).all()


def test_a_model_does_not_diverge_from_itself() -> None:
    model, only_end = tiny.llama(), {"input_ids": [5, 2], "labels": [-100, 2]}
    found = divergence(model, model, [*items(), only_end], ends=[2])
    assert found[:-1].tolist() == [0.0] * 5 and math.isnan(found[-1])
    impossible = torch.tensor([[0.0, -math.inf], [0.0, 0.0]]).repeat(2, 1)
    row = {"input_ids": [0, 0], "labels": [-100, 0]}
    assert divergence(Fixed(impossible), Fixed(torch.zeros(4, 2)), [row], ends=[])[0] == (
        pytest.approx(math.log(2))
    )
    assert divergence(Fixed(torch.zeros(4, 2)), Fixed(impossible), [row], ends=[])[0] == math.inf
    with pytest.raises(ValueError, match="logits that are numbers"):
        divergence(Fixed(torch.zeros(4, 2)), Fixed(torch.full((4, 2), math.nan)), [row], ends=[])
    with pytest.raises(ValueError, match="Found 3 tokens for 2"):
        divergence(Fixed(torch.zeros(4, 2)), Fixed(torch.zeros(4, 3)), [row])


def test_an_encoder_decoder_diverges_at_all_its_labels() -> None:
    first, second, batch = tiny.t5(0), tiny.t5(1), tiny.translation(0)
    rows = [{name: of[i] for name, of in batch.items()} for i in range(3)]
    found = divergence(first, second, rows, batch=2, ends=[])
    with torch.no_grad():
        p, q = (m.eval()(**batch).logits.log_softmax(-1) for m in (first, second))
    scored = batch["labels"] != -100
    expected = ((p.exp() * (p - q)).sum(-1) * scored).sum(1) / scored.sum(1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_kept_share_is_of_what_was_there() -> None:
    assert kept_share([0.2, 0.4, math.nan], [0.5, 0.7, 0.9]) == pytest.approx(0.5)
    assert math.isnan(kept_share([0.2], [0.0])) and math.isnan(kept_share([math.nan], [1.0]))
    with pytest.raises(ValueError, match="of the same items"):
        kept_share([1.0], [1.0, 1.0])


def test_perplexity_is_that_of_all_tokens_of_windows() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    text = "Where does Ada live? In Paris. 東京 is far."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    model = Fixed(torch.randn(99, len(tokenizer)))
    found = windows(text, tokenizer, length=6)
    assert [token for item in found for token in item["input_ids"]] == ids[: len(ids) // 6 * 6 + 6]
    assert all(item["labels"] == [-100, *item["input_ids"][1:]] for item in found)
    scored = [(i % 6 - 1, token) for i, token in enumerate(ids) if i % 6]
    total = sum(float(model.logits[at].double().log_softmax(-1)[token]) for at, token in scored)
    table = evaluate_tokens(model, found, include_end=True)
    assert perplexity(table) == pytest.approx(math.exp(-total / len(scored)))
    even = evaluate_tokens(Fixed(torch.zeros(99, len(tokenizer))), found, include_end=True)
    assert perplexity(even) == pytest.approx(len(tokenizer))


def test_windows_without_two_tokens_are_refused() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    alone = windows("abcde", tokenizer, length=2)
    assert all(len(item["labels"]) == 2 for item in alone)
    for text, length in (("", 5), ("a", 5), ("abc", 1)):
        with pytest.raises(ValueError, match=r"`text` should have|`length` should be"):
            windows(text, tokenizer, length)


def options() -> list[list[Item]]:
    """Questions with three or two answers each, of several lengths."""
    draw = torch.Generator().manual_seed(4)
    found = []
    for count in (3, 2, 3, 3):
        asked = torch.randint(3, tiny.VOCABULARY, (3,), generator=draw).tolist()
        own = []
        for length in range(1, count + 1):
            said = torch.randint(3, tiny.VOCABULARY, (length,), generator=draw).tolist()
            own.append({"input_ids": [*asked, *said, 2], "labels": [-100] * 3 + [*said, 2]})
        found.append(own)
    return found


def test_choices_are_those_of_a_loop() -> None:
    model, right = tiny.gpt2(3), [2, 0, 1, 0]
    found = multiple_choice(model, options(), right, ends=[2]).set_index(["metric", "item"])[
        "value"
    ]
    for index, (own, at) in enumerate(zip(options(), right, strict=True)):
        sums, means = [], []
        for item in own:
            answer = range(3, len(item["labels"]) - 1)
            each = [log_p(model, item["input_ids"][:i])[item["labels"][i]] for i in answer]
            sums.append(sum(each))
            means.append(sum(each) / len(each))
        assert found["accuracy_sum", index] == (max(sums) == sums[at])
        assert found["accuracy_mean", index] == (max(means) == means[at])
        p = [math.exp(value) for value in sums]
        assert found["probability", index] == pytest.approx(p[at] / sum(p))
        assert found["chance", index] == 1 / len(own)
    assert 0 < found["accuracy_sum"].mean() < 1 or 0 < found["accuracy_mean"].mean() < 1


def test_a_model_that_knows_nothing_is_at_chance_wherever_the_right_answer_stands() -> None:
    model = Fixed(torch.zeros(9, tiny.VOCABULARY))
    even = [[{"input_ids": [3, token], "labels": [-100, token]} for token in (4, 5, 6, 7)]] * 2
    found = multiple_choice(model, even, [0, 3], ends=[])
    assert found["value"].tolist() == pytest.approx([0.25] * 8)
    assert found["item"].tolist() == [0, 1] * 4
    lengths = (2, 3, 4, 6, 8, 12)  # the means of as many equal numbers differ by rounding
    uneven = [[{"input_ids": [3] * n, "labels": [-100] + [3] * (n - 1)} for n in lengths]]
    found = multiple_choice(Fixed(torch.zeros(12, 5)), uneven, [3], ends=[]).set_index("metric")
    assert found["value"]["accuracy_mean"] == 1 / 6 and found["value"]["accuracy_sum"] == 0.0
    empty = [[*even[0][:2], {"input_ids": [3, 2], "labels": [-100, 2]}], even[1]]
    found = multiple_choice(model, empty, [0, 3], ends=[2]).set_index(["metric", "item"])["value"]
    assert np.isnan(found["accuracy_sum", 0]) and np.isnan(found["probability", 0])
    assert found["accuracy_sum", 1] == 0.25


@pytest.mark.parametrize("right", [[0, 1], [3, 0, 0, 0], [-1, 0, 0, 0]])
def test_what_is_no_choice_is_refused(right: list[int]) -> None:
    with pytest.raises(ValueError, match="two answers or more to each question"):
        multiple_choice(tiny.llama(), options(), right)
