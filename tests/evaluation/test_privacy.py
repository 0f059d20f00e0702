"""Scores of membership against pinned numbers, loops, and plain autograd."""

import math
import zlib as compression
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from geffect.evaluation import TokenTable, evaluate_tokens, grad_norm, privacy
from geffect.evaluation.memorised import nll
from geffect.evaluation.privacy import loss, min_k, min_k_pp, reference, zlib
from tests.utils import tiny
from tests.utils.predictions import END, five

Item = dict[str, list[int]]


def items(count: int = 4) -> list[Item]:
    """Rows of several lengths whose last token is 2."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (4 + index,), generator=draw).tolist()
        found.append({"input_ids": [*ids, 2], "labels": [-100, -100, *ids[2:], 2]})
    return found


def pinned(**options: Any) -> TokenTable:
    model, item = five()
    return evaluate_tokens(model, [item], ends=[END], **options)


def test_pinned() -> None:
    table = pinned()
    assert loss(table)[0] == pytest.approx(0.657772, abs=1e-6)
    assert min_k(table, 0.4)[0] == pytest.approx(1.609438, abs=1e-6)
    assert min_k(table, 0.5)[0] == pytest.approx(1.151293, abs=1e-6)
    assert min_k_pp(table, 0.5)[0] == pytest.approx(-(-0.389241 + 1 / 3) / 2, abs=1e-6)
    assert min_k_pp(table, 0.5)[0] == pytest.approx(0.027954, abs=1e-6)
    with_end = pinned(include_end=True)
    answer = "the author lives in Lund"
    assert len(compression.compress(answer.encode())) == 32
    assert zlib(with_end, [answer])[0] == pytest.approx(0.016765, abs=1e-6)
    assert zlib(with_end, [""])[0] == pytest.approx(0.536476 / 8, abs=1e-6)


def test_scores_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    lengths = (1, 2, 7, 0, 30)
    tokens = [
        (i, -rng.exponential(), rng.normal()) for i, n in enumerate(lengths) for _ in range(n)
    ]
    table = TokenTable(
        pd.DataFrame(tokens, columns=["item", "logprob", "z"]).assign(is_end=False), (*"abcde",), 4
    )
    for column, kind in ((1, min_k), (2, min_k_pp)):
        for share in (0.1, 0.2, 0.4, 1.0):
            found = kind(table, share)
            for index, n in enumerate(lengths):
                own = sorted(token[column] for token in tokens if token[0] == index)
                taken = own[: max(1, math.floor(share * n + 1e-9))]
                expected = -sum(taken) / len(taken) if own else math.nan
                assert found[index] == pytest.approx(expected, nan_ok=True)
    assert min_k(table, 1.0) == pytest.approx(nll(table), nan_ok=True)
    found = privacy(table, ["a"] * 5)
    assert found["attack"].unique().tolist() == [
        "loss", "min_k_0.4", "min_k_0.2", "min_k_pp_0.4", "min_k_pp_0.2", "zlib",
    ]  # fmt: skip
    assert found[found["item"] == 3]["value"].isna().all() and len(found) == 30


def test_a_share_is_not_rounded_down_by_binary_fractions() -> None:
    logprob = -np.arange(100.0)
    told = {"item": 0, "is_end": False, "logprob": logprob, "z": logprob}
    table = TokenTable(pd.DataFrame(told), ("a",), 4)
    assert math.floor(0.29 * 100) == 28
    assert min_k(table, 0.29)[0] == np.mean(np.arange(71.0, 100.0))


def test_a_reference_is_of_the_same_tokens() -> None:
    rows = items()
    first, second = (evaluate_tokens(tiny.llama(seed), rows, ends=[2]) for seed in (0, 1))
    assert reference(first, second).tolist() == (nll(first) - nll(second)).tolist()
    assert reference(first, first).tolist() == [0.0] * 4
    for other in (evaluate_tokens(tiny.llama(), rows, ends=[]),
                  evaluate_tokens(tiny.llama(), rows[::-1], ends=[2])):  # fmt: skip
        with pytest.raises(ValueError, match="a record of the tokens of `table`"):
            reference(first, other)


def by_autograd(model: torch.nn.Module, item: Item, include_end: bool) -> list[float]:
    """The lengths of the gradients of all tensors."""
    ids = torch.tensor([item["input_ids"]])
    labels = torch.tensor([item["labels"] if include_end else [*item["labels"][:-1], -100]])
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    lengths = [float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return lengths


@pytest.mark.parametrize("include_end", [False, True])
def test_lengths_of_gradients_are_those_of_autograd(include_end: bool) -> None:
    model, rows = tiny.llama(), items(3)
    only_end = {"input_ids": [5, 2], "labels": [-100, 2]}
    options: dict[str, Any] = {"ends": [2], "include_end": include_end}
    expected = [by_autograd(model, item, include_end) for item in rows]
    model.train()
    whole = grad_norm(model, [*rows, only_end], **options)
    assert whole[:3] == pytest.approx([math.hypot(*lengths) for lengths in expected], rel=1e-5)
    assert math.isnan(whole[3]) is not include_end and model.training
    means = grad_norm(model, rows, legacy="open_unlearning", **options)
    assert means == pytest.approx([np.mean(lengths) for lengths in expected], rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama])
def test_padding_changes_no_length_of_a_gradient(build: Any) -> None:
    """Also of a row that is scored from its first token on, which nothing predicts."""
    model, rows = build(), [*items(3), {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    padded = [
        {
            "input_ids": [0] * 3 + row["input_ids"] + [0],
            "labels": [-100] * 3 + row["labels"] + [-100],
            "attention_mask": [0] * 3 + [1] * len(row["labels"]) + [0],
        }
        for row in rows
    ]
    assert grad_norm(model, padded, ends=[2]) == pytest.approx(grad_norm(model, rows, ends=[2]))


def test_what_has_no_score_is_refused() -> None:
    table = pinned()
    for share in (0.0, -0.4, 40, math.nan):
        with pytest.raises(ValueError, match="`share` should be above 0 and at most 1"):
            min_k(table, share)
    with pytest.raises(ValueError, match=r"a text for each of 1 items\. Found 2"):
        zlib(table, ["a", "b"])
    with pytest.raises(ValueError, match=r"require a gradient\. Found none"):
        grad_norm(tiny.llama().requires_grad_(False), items(1))
    with pytest.raises(ValueError, match="Found 'mean'"):
        grad_norm(tiny.llama(), items(1), legacy="mean")  # type: ignore[arg-type]
