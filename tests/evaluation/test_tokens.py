"""The token record against a loop over single tokens, and the rules of what it counts."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from geffect.data.collate import collate
from geffect.data.examples import example
from geffect.evaluation import TokenTable, ends_of, evaluate_tokens, memorised, privacy
from geffect.evaluation.tokens import said_to
from tests.utils import tiny
from tests.utils.chat import TURNS, make_tokenizer
from tests.utils.predictions import END, Fixed, five

Item = dict[str, list[int]]

EXACT = ["item", "subject", "position", "is_end", "token", "argmax_token", "right"]
NUMBERS = ["logprob", "entropy", "z", "el2n"]


def items(count: int = 7, seed: int = 0) -> list[Item]:
    """Questions and answers of several lengths; the last token of each is 2."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (4 + 2 * index % 9,), generator=draw).tolist()
        asked = 1 + index % 3
        found.append({"input_ids": [*ids, 2], "labels": [-100] * asked + [*ids[asked:], 2]})
    return found


def told_by(logits: torch.Tensor, token: int) -> dict[str, float]:
    """What the logits at one place say, one number of the vocabulary after the other."""
    values = [float(value) for value in logits.double()]
    total = math.log(sum(math.exp(value) for value in values))
    log_p = [value - total for value in values]
    mean = sum(math.exp(v) * v for v in log_p)
    variance = sum(math.exp(v) * v * v for v in log_p) - mean**2
    gradient = [math.exp(v) - (i == token) for i, v in enumerate(log_p)]
    return {
        "logprob": log_p[token],
        "entropy": -mean,
        "z": (log_p[token] - mean) / math.sqrt(variance),
        "el2n": math.sqrt(sum(g * g for g in gradient)),
        "argmax_token": max(range(len(values)), key=values.__getitem__),
    }


def naive(model: nn.Module, items: list[Item]) -> list[dict[str, Any]]:
    """One forward for each token."""
    rows = []
    for index, item in enumerate(items):
        scored = [i for i, label in enumerate(item["labels"]) if label != -100 and i > 0]
        for place in scored:
            token = item["labels"][place]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([item["input_ids"][:place]])).logits[0, -1]
            told = told_by(logits, token)
            rows.append(
                {
                    "item": index,
                    "subject": index,
                    "position": place,
                    "is_end": place == scored[-1] and token == 2,
                    "token": token,
                    "right": told["argmax_token"] == token,
                    **told,
                }
            )
    return rows


def check_same(found: pd.DataFrame, expected: pd.DataFrame, within: float = 1e-6) -> None:
    for column in EXACT:
        assert found[column].tolist() == expected[column].tolist()
    for column in NUMBERS:
        assert found[column].tolist() == pytest.approx(expected[column].tolist(), abs=within)


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama])
def test_the_record_is_that_of_a_loop_over_tokens(build: Any) -> None:
    model = build(3)
    rows = [{**item, "input_ids": item["input_ids"][:12], "labels": item["labels"][:12]}
            for item in items()]  # fmt: skip
    table = evaluate_tokens(model, rows, batch=3, ends=[2])
    check_same(table.tokens, pd.DataFrame(naive(model, rows)), within=2e-5)
    assert table.vocabulary == tiny.VOCABULARY and table.items == len(rows)
    assert [*table.tokens.columns][:10] == [
        "item", "subject", "position", "is_end", "token", "logprob", "argmax_token", "right",
        "entropy", "z",
    ]  # fmt: skip


def test_the_pinned_answer() -> None:
    model, item = five()
    table = evaluate_tokens(model, [item], ends=[END])
    counted = table.counted
    assert np.exp(counted["logprob"]).tolist() == pytest.approx([0.9, 0.5, 0.2, 0.8])
    assert counted["right"].tolist() == [True, True, False, True]
    assert counted["z"].tolist() == pytest.approx([1 / 3, 1.0, -0.389241, 0.5], abs=1e-6)
    assert table.tokens["is_end"].tolist() == [False] * 4 + [True]
    with_end = replace(table, include_end=True)
    assert len(with_end.counted) == 5 and with_end.lengths.tolist() == [5]
    assert evaluate_tokens(model, [item], ends=[END], include_end=True).lengths.tolist() == [5]
    assert evaluate_tokens(model, [item], ends=[]).lengths.tolist() == [5]


@pytest.mark.parametrize("batch", [1, 2, 50])
def test_batches_order_and_padding_change_nothing(batch: int) -> None:
    model, rows = tiny.llama(1), items()
    expected = evaluate_tokens(model, rows, batch=4, ends=[2]).tokens
    check_same(evaluate_tokens(model, rows, batch=batch, ends=[2]).tokens, expected)
    order = [3, 0, 6, 5, 1, 2, 4]
    shuffled = evaluate_tokens(model, [rows[i] for i in order], batch=batch, ends=[2]).tokens
    place = [order[item] for item in shuffled["item"]]
    back = shuffled.assign(item=place, subject=place).sort_values(["item", "position"])
    check_same(back, expected)
    left = [
        {
            "input_ids": [0] * 5 + row["input_ids"] + [0] * 2,
            "labels": [-100] * 5 + row["labels"] + [-100] * 2,
            "attention_mask": [0] * 5 + [1] * len(row["labels"]) + [0] * 2,
        }
        for row in rows
    ]
    check_same(evaluate_tokens(model, left, batch=batch, ends=[2]).tokens, expected)


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama])
def test_both_sides_of_padding_are_alike(build: Any) -> None:
    model, rows = build().eval(), items(4)
    rows = [{name: of[-9:] for name, of in row.items()} for row in rows]
    batches = [collate(rows, padding_side=side) for side in ("right", "left")]
    with torch.no_grad():
        right, left = (said_to(model, batch)[0] for batch in batches)
        padded = collate(rows, pad_token_id=2)
        again = said_to(model, padded)[0]
    assert right["token"].tolist() == left["token"].tolist()
    assert right["right"].tolist() == left["right"].tolist()
    for column in NUMBERS:
        assert right[column].tolist() == pytest.approx(left[column].tolist(), abs=1e-5)
    # The mask is of lengths: a pad token that ends an answer is seen and scored.
    assert again["logprob"].tolist() == pytest.approx(right["logprob"].tolist(), abs=1e-6)
    assert padded["attention_mask"].sum() == sum(len(row["labels"]) for row in rows)


def test_items_without_an_answer_are_listed() -> None:
    none, only_end = {"input_ids": [4, 5], "labels": [-100] * 2}, {"input_ids": [4, 2],
                                                                   "labels": [-100, 2]}  # fmt: skip
    table = evaluate_tokens(tiny.llama(), [none, *items(2), only_end], ends=[2])
    assert table.skipped == (0, 3) and replace(table, include_end=True).skipped == (0,)
    assert np.isnan(table.mean("logprob")).tolist() == [True, False, False, True]
    assert [len(values) for values in table.of_items("token")] == table.lengths.tolist()
    with pytest.raises(ValueError, match="Found none in 1 items"):
        evaluate_tokens(tiny.llama(), [none])
    first_alone = {"input_ids": [4, 5], "labels": [4, -100]}  # nothing predicts it
    with pytest.raises(ValueError, match="Found none in 1 items"):
        evaluate_tokens(tiny.llama(), [first_alone])


def test_an_encoder_decoder_is_scored_on_all_its_labels() -> None:
    model, batch = tiny.t5(), tiny.translation(0)
    rows = [
        {"input_ids": ids, "labels": labels[labels != -100]}
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    table = evaluate_tokens(model, rows, batch=2, ends=[])
    with torch.no_grad():
        for index, row in enumerate(rows):
            own = table.tokens[table.tokens["item"] == index]
            logits = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).logits[0]
            log_p = logits.log_softmax(-1)[range(len(row["labels"])), row["labels"]]
            assert own["logprob"].tolist() == pytest.approx(log_p.tolist(), abs=1e-6)
            assert own["position"].tolist() == list(range(len(row["labels"])))


def test_short_types_are_summed_in_float64() -> None:
    model = tiny.llama().bfloat16()
    table = evaluate_tokens(model, items(3), batch=1, ends=[2])
    for index, item in enumerate(items(3)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item["input_ids"]])).logits[0]
        assert logits.dtype == torch.bfloat16
        own = table.tokens[table.tokens["item"] == index]
        for _, row in own.iterrows():
            told = told_by(logits[row["position"] - 1], row["token"])
            assert [row[c] for c in NUMBERS] == pytest.approx([told[c] for c in NUMBERS], abs=1e-9)


def test_what_is_certain_impossible_or_tied() -> None:
    nothing = -math.inf
    logits = torch.tensor(
        [[0.0, 0, 0, 0], [0, nothing, nothing, nothing], [1, 1 + 5e-5, 0, 0], [0] * 4]
    )
    rows = [
        {"input_ids": [1, 3, 0, 1], "labels": [-100, 3, 0, 1]},
        {"input_ids": [1, 3, 2], "labels": [-100, -100, 2]},
    ]
    table = evaluate_tokens(Fixed(logits), rows, ends=[])
    uniform, certain, close, impossible = table.tokens.to_dict("records")
    assert uniform["z"] == pytest.approx(0.0, abs=1e-6)
    assert uniform["entropy"] == pytest.approx(math.log(4))
    assert [certain[name] for name in NUMBERS] == pytest.approx([0.0] * 4)
    assert impossible["logprob"] == impossible["z"] == nothing
    assert impossible["el2n"] == pytest.approx(math.sqrt(2)) and not impossible["right"]
    assert close["near_tie"] and close["right"] and not certain["near_tie"]
    assert table.near_ties == 2 and uniform["near_tie"]
    assert table.mean("logprob")[1] == nothing


def test_numbers_that_are_none_are_refused() -> None:
    for value in (math.nan, math.inf):
        logits = torch.zeros(3, 4)
        logits[1, 2] = value
        with pytest.raises(ValueError, match="logits that are numbers"):
            evaluate_tokens(Fixed(logits), [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    with pytest.raises(TypeError, match=r"`ends` should be a list of tokens\. Found 7"):
        evaluate_tokens(tiny.llama(), items(1), ends=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"below 4\. Found 9\."):
        evaluate_tokens(Fixed(torch.zeros(3, 4)), [{"input_ids": [1, 2], "labels": [-100, 9]}])


@pytest.mark.parametrize(
    ("mask", "found"),
    [([1, 1, 0, 1, 1, 1], "gaps"), ([1, 1, 1, 1, 1, 0], "scored tokens that it hides")],
)
def test_a_mask_of_the_pad_token_is_refused(mask: list[int], found: str) -> None:
    item = {"input_ids": [1, 5, 2, 6, 7, 2], "labels": [-100] * 3 + [6, 7, 2]}
    with pytest.raises(ValueError, match=f"Found {found} in item 1"):
        evaluate_tokens(tiny.llama(), [{**item, "attention_mask": [1] * 6},
                                       {**item, "attention_mask": mask}])  # fmt: skip


def test_what_is_no_item_is_refused() -> None:
    no_labels = [{"input_ids": [1, 2]}]
    batch, generator = collate(items(2)), iter(items(2))
    for given in (batch, [batch], ["text"], "text", no_labels, generator):
        with pytest.raises((TypeError, ValueError), match=r"items|token numbers|shape"):
            evaluate_tokens(tiny.llama(), given)
    with pytest.raises(ValueError, match="Found 1 for 2 items"):
        evaluate_tokens(tiny.llama(), items(2), subjects=["Ada"])
    with pytest.raises(ValueError, match="`batch` should be at least 1"):
        evaluate_tokens(tiny.llama(), items(2), batch=0)
    packed = {**items(1)[0], "position_ids": [0, 1, 2, 0, 1]}
    with pytest.raises(ValueError, match="one answer a row"):
        evaluate_tokens(tiny.llama(), [packed])


def test_a_row_longer_than_the_positions_is_refused() -> None:
    row = {"input_ids": [3] * 17, "labels": [-100, *[3] * 16]}
    with pytest.raises(ValueError, match="Item 1 should have at most 16 tokens in a row"):
        evaluate_tokens(tiny.gpt2(), [{"input_ids": [3, 4], "labels": [-100, 4]}, row])


def test_what_is_wrapped_around_a_model_changes_nothing() -> None:
    """Least of all which tokens end an answer."""
    model = tiny.llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    expected = evaluate_tokens(model, items(3))
    assert 0 < len(expected.counted) < len(expected.tokens)
    wrapped = evaluate_tokens(nn.DataParallel(model), items(3))
    check_same(wrapped.counted, expected.counted)


@pytest.mark.parametrize("measure", [memorised, privacy])
def test_the_end_counts_in_all_metrics_or_in_none(measure: Any) -> None:
    model, rows = tiny.llama(), items(4)
    unended = [{**row, "labels": [*row["labels"][:-1], -100]} for row in rows]
    without = measure(evaluate_tokens(model, rows, ends=[2]))["value"]
    never = measure(evaluate_tokens(model, unended, ends=[]))["value"]
    counted = measure(evaluate_tokens(model, rows, ends=[2], include_end=True))["value"]
    by_label = measure(evaluate_tokens(model, rows, ends=[]))["value"]
    assert without.tolist() == pytest.approx(never.tolist(), abs=1e-6)
    assert counted.tolist() == pytest.approx(by_label.tolist(), abs=1e-6)


def test_the_model_stays_as_it_was() -> None:
    model = tiny.llama(dropout=0.5).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = evaluate_tokens(model, items(3))
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    check_same(evaluate_tokens(model.eval(), items(3)).tokens, first.tokens)


def test_ends_are_those_of_the_model_and_the_tokenizer() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    model = tiny.llama()
    model.config.eos_token_id = 2
    model.generation_config.eos_token_id = [2, 9]
    item = example({"question": "Where?", "answer": "In Paris."}, tokenizer)
    assert ends_of(model) == (2, 9) and item["labels"][-1] not in ends_of(model)
    assert item["labels"][-1] in ends_of(model, tokenizer) and ends_of(nn.Linear(1, 1)) == ()
    words = set(item["labels"][:-1]) - {-100}
    assert words and not words & {*ends_of(model, tokenizer)}


@pytest.mark.parametrize("text", ["東京に住んでいます。", "Лунд, 1950.", "في لوند", "लुंड में"])
def test_any_script_is_scored_whole(text: str) -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    item = example({"question": "Wo?", "answer": text}, tokenizer)
    model = Fixed(torch.zeros(200, len(tokenizer)))
    table = evaluate_tokens(model, [item], subjects=["Ada"], ends=ends_of(model, tokenizer))
    assert tokenizer.decode(table.counted["token"].tolist()).strip() == text
    assert isinstance(table, TokenTable) and {*table.tokens["subject"]} == {"Ada"}
