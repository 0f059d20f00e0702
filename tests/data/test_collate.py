"""Items as batches: what is padded and with what, what is stacked, and what has no place."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect.batch import on_device
from geffect.data.collate import PaddingSide, batched, check_length, collate, lengths_of
from geffect.risk import nll
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.trainers import same
from tests.utils.unlearning_trainers import DPO, apart, pairs, unlearner

Item = dict[str, Any]

LENGTHS = [5, 8, 6]


def item(ids: Iterable[int], labels: Sequence[int], **further: Any) -> Item:
    return {"input_ids": [*ids], "labels": [*labels], **further}


def samples(seed: int = 0) -> list[Item]:
    """Items of unequal length, scored in part."""
    rows = [tiny.batch(seed + i, rows=1, length=length) for i, length in enumerate(LENGTHS)]
    return [{name: row[name][0] for name in ("input_ids", "labels")} for row in rows]


# Padded


@pytest.mark.parametrize("side", ["right", "left"])
def test_columns_as_long_as_the_tokens_are_padded(side: PaddingSide) -> None:
    items = [
        {
            **sample,
            "token_type_ids": torch.ones_like(sample["input_ids"]),
            "weights": torch.rand(len(sample["input_ids"])),
            "seen": torch.ones(len(sample["input_ids"]), dtype=torch.bool),
            "inputs_embeds": torch.rand(len(sample["input_ids"]), 3),
        }
        for sample in samples()
    ]
    batch = collate(items, pad_token_id=7, padding_side=side)
    fill = {"input_ids": 7, "labels": -100}
    for column in items[0]:
        assert batch[column].dtype == items[0][column].dtype
        for row, one in zip(batch[column], items, strict=True):
            own = one[column]
            missing = torch.full((max(LENGTHS) - len(own), *own.shape[1:]), fill.get(column, 0))
            parts = [own, missing] if side == "right" else [missing, own]
            assert torch.equal(row, torch.cat([part.to(own.dtype) for part in parts]))
    assert batch["attention_mask"].sum(1).tolist() == LENGTHS


@pytest.mark.parametrize("made", [list, np.asarray, lambda row: np.asarray(row, np.int32), None])
def test_lists_arrays_and_tensors_are_the_same(made: Any) -> None:
    items = [
        {name: column if made is None else made(column.tolist()) for name, column in row.items()}
        for row in samples()
    ]
    assert same(collate(items), collate(samples()))
    assert {column.dtype for column in collate(items).values()} == {torch.int64}


def test_the_mask_is_that_of_the_lengths_whatever_the_tokens() -> None:
    end = 3
    batch = collate([item([5, end], [-100, end]), item([5, 6, end], [-100, 6, end])],
                    pad_token_id=end)  # fmt: skip
    assert batch["input_ids"].tolist() == [[5, end, end], [5, 6, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, end, -100], [-100, 6, end]]


def test_a_mask_that_is_given_stands() -> None:
    masked = item([0, 5, 6], [-100, -100, 6], attention_mask=[0, 1, 1])
    longer = item([5, 6, 7, 8], [5, 6, 7, 8], attention_mask=[1, 1, 1, 1])
    batch = collate([masked, longer], padding_side="left")
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_positions_that_are_given_stand() -> None:
    packed = item([5, 6, 7, 8], [5, 6, 7, 8], position_ids=[0, 1, 0, 1])
    short = item([5, 6], [5, 6], position_ids=[0, 1])
    right, left = (collate([packed, short], padding_side=side) for side in ("right", "left"))
    assert right["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert left["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("model", [tiny.gpt2(), tiny.llama().double()], ids=["gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_token_id", [0, 11])
@pytest.mark.parametrize("whole", [False, True])
def test_a_causal_model_does_not_see_the_padding(
    model: nn.Module, side: PaddingSide, pad_token_id: int, whole: bool
) -> None:
    """The risk and its gradient are those of the items one by one, also of texts scored whole."""
    items = [{**one, "labels": one["input_ids"]} if whole else one for one in samples()]
    alone = [token for one in items for row in token_log_p(model, one) for token in row]
    expected = -torch.stack(alone).mean()
    found = nll(model, collate(items, pad_token_id=pad_token_id, padding_side=side))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    of_batch, of_items = (reference.flat(reference.gradient(model, x)) for x in (found, expected))
    torch.testing.assert_close(of_batch, of_items, rtol=1e-5, atol=1e-7)


def token_log_p(model: nn.Module, one: Item) -> list[list[Tensor]]:
    row = {name: column[None] for name, column in one.items()}
    return reference.token_log_p(model, {**row, "attention_mask": torch.ones_like(row["labels"])})


def test_labels_may_have_a_length_of_their_own() -> None:
    """As an encoder-decoder has them, with columns beside them."""
    answers = ([4, 5, 6], [7], [8, 9])
    items = [
        item(sample["input_ids"], answer, decoder_attention_mask=[1] * len(answer))
        for sample, answer in zip(samples(), answers, strict=True)
    ]
    batch = collate(items)
    assert batch["attention_mask"].sum(1).tolist() == LENGTHS
    for row, answer in enumerate(answers):
        missing = 3 - len(answer)
        assert batch["labels"][row].tolist() == [*answer, *[-100] * missing]
        seen = [*[1] * len(answer), *[0] * missing]
        assert batch["decoder_attention_mask"][row].tolist() == seen
    says = r'`padding_side` should be "right" .* Found "left", and 3 labels beside'
    with pytest.raises(ValueError, match=says):
        collate(items, padding_side="left")


@pytest.mark.parametrize("model", [tiny.t5().eval(), tiny.bart().eval()], ids=["t5", "bart"])
def test_an_encoder_decoder_does_not_see_the_padding(model: nn.Module) -> None:
    rows = [tiny.translation(0, rows=1, length=5, answer=5), tiny.translation(1, rows=1, answer=3)]
    items = [{column: value[0] for column, value in row.items()} for row in rows]
    counts = [int((row["labels"] != -100).sum()) for row in rows]
    alone = sum(n * model(**row).loss for n, row in zip(counts, rows, strict=True)) / sum(counts)
    torch.testing.assert_close(nll(model, collate(items)), alone, rtol=1e-6, atol=0)


# Stacked


def test_columns_of_one_shape_are_stacked() -> None:
    pictures = torch.rand(3, 3, 8, 8)
    items = [
        {**sample, "pixel_values": picture, "index": number, "weight": 0.5}
        for number, (sample, picture) in enumerate(zip(samples(), pictures, strict=True))
    ]
    batch = collate(items)
    assert torch.equal(batch["pixel_values"], pictures)
    assert batch["index"].tolist() == [0, 1, 2] and batch["weight"].tolist() == [0.5] * 3


def test_numbers_of_two_kinds_lose_nothing() -> None:
    batch = collate([item([5], [5], weight=[2]), item([6, 7], [6, 7], weight=[0.5, 1.0])])
    assert batch["weight"].tolist() == [[2.0, 0.0], [0.5, 1.0]]


# Sides


def test_sides_are_batches_of_their_own_at_any_depth() -> None:
    forget, other, retain = samples(), samples(10)[::-1], samples(20)
    items = [
        {"forget": {"original": f, "alternate": o}, "retain": r}
        for f, o, r in zip(forget, other, retain, strict=True)
    ]
    batch = collate(items, pad_token_id=4, padding_side="left")
    expected = [collate(side, pad_token_id=4, padding_side="left") for side in (forget, other)]
    assert same([batch["forget"]["original"], batch["forget"]["alternate"]], expected)
    assert batch["retain"].keys() == {"input_ids", "labels", "attention_mask", "position_ids"}
    assert sorted(lengths_of(batch)) == [8, 8, 8]
    moved = on_device(batch, torch.device("meta"))
    assert moved["forget"]["alternate"]["labels"].is_meta and moved["retain"]["labels"].is_meta


def test_a_trainer_of_nested_sides_trains_on_them(tmp_path: Path) -> None:
    ends = []
    for number, options in enumerate(({}, {"data_collator": collate})):
        data = pairs(alternate=True)
        trainer = unlearner(tmp_path / str(number), kind=DPO, data=data, made=options)
        trainer.train()
        ends.append(trainer)
    assert apart(*ends) == 0
    assert apart(ends[0], tiny.gpt2()) > 0


# What has no place


PICTURES = [item([5], [5], pixel_values=torch.rand(3, size)) for size in (8, 9)]


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([{"input_ids": [1, 2]}], "An item should have input_ids and labels.*Found input_ids"),
        ([{"question": "Who?", "answer": "Ada"}], "Found question, answer. Tokenize the data"),
        (["Ada"], "Found 'Ada' of type str"),
        ([{}], "An item should have input_ids and labels.*Found {}"),
        ([item([1], [1], index=0), item([1], [1])],
         "The items of a batch should have the same columns. Found index in some"),
        ([item([1], [1], text="Ada")],
         "`text` should be numbers: a list, an array or a tensor. Found 'Ada' of type str"),
        ([item([1], [1], text=None)], "`text` should be numbers.*Found None"),
        ([item([1], [1], text={"a": 1})], "`text` should be numbers.*of type dict"),
        (PICTURES, r"`pixel_values` should be as long as `input_ids` or `labels` in every item, or "
                   r"have one shape in all of them. Found the shapes \(3, 8\), \(3, 9\) beside"),
        ([item([1, 2], [1, 2], attention_mask=[1])], "`attention_mask` should be as long as"),
        ([item([[1, 2]], [[1, 2]])], "`input_ids` should be a row of token numbers"),
        ([item([], [])], r"`input_ids` should be a row of token numbers, one or more. Found"),
        ([item([1.5], [1])], "`input_ids` should be a row of token numbers.*float32"),
        ([{"forget": {"original": item([1], [1]), "alternate": item([1, 2], [[1]])}}],
         "`labels` of `forget.alternate` should be a row of token numbers"),
        ([{"forget": item([1], [1]), "retain": item([1], [1], text="Ada")}],
         "`text` of `retain` should be numbers"),
        ([{"forget": item([1], [1]), "index": 3}], "Found forget, index. Tokenize the data"),
        ([{"forget": {"original": item([1], [1])}}, {"forget": item([1], [1])}],
         "The items of `forget` of a batch should have the same columns"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_named(items: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        collate(items)


def test_there_are_two_sides_to_pad_on() -> None:
    with pytest.raises(ValueError, match=r'"right" or "left"\. Found \'both\''):
        collate(samples(), padding_side="both")  # type: ignore[arg-type]


def test_a_row_has_to_have_its_positions() -> None:
    check_length(7, 7, "The row")
    check_length(10**6, None, "The row")
    with pytest.raises(ValueError, match=r"The row should have at most 7 .*Found 8\..*--max-len"):
        check_length(8, 7, "The row")


# Batches of many items


def test_batches_are_as_wide_as_their_longest_and_padding_is_not_scored() -> None:
    lengths = [3, 9, 4, 2, 5]
    items = [item(range(1, n + 1), [-100, *range(2, n + 1)]) for n in lengths]
    batches = batched(items, 2, pad_token_id=7)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 3), (2, 9), (2, 5)]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        assert (batch["input_ids"][~mask] == 7).all() and (batch["labels"][~mask] == -100).all()
    seen = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert seen == lengths


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("even", [False, True])
def test_every_example_is_in_one_batch(count: int, size: int, even: bool) -> None:
    items = [item([i, i], [-100, i]) for i in range(count)]
    batches = batched(items, size, seed=1, even=even)
    seen = [int(i) for batch in batches for i in batch["input_ids"][:, 0]]
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert sorted(seen) == list(range(count))
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert not even or len(batches) % 2 == 0 or count == 1 or size == 1
    smaller = batched(items, size, least=6, even=even)
    assert len(smaller) >= min(6, count) and sum(len(b["labels"]) for b in smaller) == count


def test_a_seed_is_an_order() -> None:
    items = [item([i, i], [-100, i]) for i in range(20)]

    def order(seed: int | None) -> list[int]:
        return [int(i) for batch in batched(items, 4, seed=seed) for i in batch["labels"][:, 1]]

    assert order(None) == list(range(20))
    assert order(0) == order(0) != order(1)


def test_a_batch_has_room() -> None:
    with pytest.raises(ValueError, match=r"at least 1\. Found 0"):
        batched([item([1], [1])], 0)
