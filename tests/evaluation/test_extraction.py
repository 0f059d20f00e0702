"""Extraction strength against greedy generation from every prefix."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect.data.collate import collate
from geffect.evaluation import extraction_strength, similar_extraction
from tests.utils import tiny


def brute_force(model: nn.Module, batch: dict[str, Tensor], ends: set[int]) -> list[float]:
    """1 - k/n with the smallest k from which greedy decoding says all of the rest."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        places = [i for i, label in enumerate(labels.tolist()) if label != -100 and i > 0]
        if labels[places[-1]].item() in ends:
            places = places[:-1]
        answer = [ids[i].item() for i in places]
        for k in range(len(answer) + 1):
            said = ids[: places[0] + k].tolist()
            while len(said) < places[-1] + 1:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([said])).logits
                said.append(logits[0, -1].argmax().item())
            if said[places[0] :] == answer:
                found.append(1 - k / len(answer))
                break
    return found


def learnt(steps: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = tiny.llama(5)
    batches = [tiny.batch(1), tiny.batch(2, rows=4), tiny.batch(7)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        for batch in batches[:2]:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batches


@pytest.mark.parametrize("steps", [0, 12, 60])
def test_one_forward_is_greedy_decoding(steps: int) -> None:
    model, batches = learnt(steps)
    ends = {int(batches[0]["labels"][0, -1])}
    for own in (set(), ends):
        found = extraction_strength(model, batches, ends=own)
        expected = [value for batch in batches for value in brute_force(model, batch, own)]
        assert found.tolist() == pytest.approx(expected) and len(found) == 10
    assert np.ptp(found) > 0 or steps == 0


def similar(model: nn.Module, row: dict[str, Tensor], share: float) -> float:
    """1 - k/n of one row without its end, by decoding from every k."""
    places = [i for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    answer = [int(row["labels"][i]) for i in places]
    for k in range(len(answer) + 1):
        said = row["input_ids"][: places[0] + k].tolist()
        with torch.no_grad():
            for _ in answer[k:]:
                logits = model.eval()(input_ids=torch.tensor([said])).logits
                said.append(logits[0, -1].argmax().item())
        rest, told = answer[k:], said[places[0] + k :]
        subsets = ([x for x, keep in zip(rest, kept, strict=True) if keep]
                   for kept in product((True, False), repeat=len(rest)))  # fmt: skip
        most = max(len(part) for part in subsets if is_within(part, told))
        if not rest or most / len(rest) >= share:
            return (len(answer) - k) / len(answer)
    raise AssertionError("the empty rest is always said")


def is_within(part: list[int], told: list[int]) -> bool:
    left = iter(told)
    return all(token in left for token in part)


@pytest.mark.parametrize("steps", [0, 12, 60])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 1.0])
def test_a_similar_answer_is_that_of_decoding_from_every_k(steps: int, share: float) -> None:
    model, batches = learnt(steps)
    rows = [{n: v[i] for n, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    found = similar_extraction(model, rows, share=share, ends=[])
    assert found.tolist() == [similar(model, row, share) for row in rows]
    exact = extraction_strength(model, batches, ends=[])
    assert (found == exact).all() if share == 1 else (found >= exact).all()
    left = [
        {
            "input_ids": [0, 0, *row["input_ids"].tolist()],
            "labels": [-100, -100, *row["labels"].tolist()],
            "attention_mask": [0, 0] + [1] * len(row["labels"]),
        }
        for row in rows[::-1]
    ]
    again = similar_extraction(model, left, share=share, ends=[], at_once=2)
    assert again.tolist() == found[::-1].tolist()


def test_what_has_no_similar_answer() -> None:
    model = tiny.llama()
    only_end = {"input_ids": [4, 2], "labels": [-100, 2]}
    first = {"input_ids": [4, 5], "labels": [4, -100]}  # nothing predicts it
    assert np.isnan(similar_extraction(model, [only_end, first], ends=[2])).all()
    gaps = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7]}
    with pytest.raises(ValueError, match="Found gaps in item 1"):
        similar_extraction(model, [only_end, gaps])
    for share in (0.0, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match="`share` should be a number above 0"):
            similar_extraction(model, [gaps], share=share)
    with pytest.raises(ValueError, match="should be of a causal model"):
        similar_extraction(tiny.t5(), [gaps])


def test_order_batching_and_padding_change_nothing() -> None:
    model, batches = learnt(20)
    model.train()
    expected = extraction_strength(model, batches)
    assert model.training and len(set(expected)) > 1
    rows = [{n: v[i] for n, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    short = [{n: v[:7] for n, v in row.items()} for row in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = extraction_strength(model, collate([rows[i] for i in order]))
    assert shuffled.tolist() == expected[order].tolist()
    padded = collate([*short, rows[0]])
    apart = [extraction_strength(model, collate([row])).item() for row in short]
    assert extraction_strength(model, padded)[:-1].tolist() == apart


class Said(nn.Module):
    """Says the same tokens whatever it is given."""

    def __init__(self, tokens: list[int], ends: Any = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.generation_config = SimpleNamespace(eos_token_id=ends)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        said = torch.tensor([*self.tokens, 0]).expand(input_ids.shape)
        return SimpleNamespace(logits=nn.functional.one_hot(said, 9).float())


ROW = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 8]]),
       "labels": torch.tensor([[-100, -100, 3, 4, 5, 8]])}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "strength", "with_end"),
    [
        ([0, 3, 4, 5, 8], 1.0, 1.0),
        ([0, 3, 4, 0, 8], 0.0, 0.25),  # a wrong last token
        ([0, 3, 0, 5, 8], 1 / 3, 0.5),
        ([0, 0, 4, 5, 8], 2 / 3, 0.75),
        ([0, 8, 8, 8, 8], 0.0, 0.25),  # ends at once: no match of what is left
        ([0, 3, 4, 5, 0], 1.0, 0.0),
        ([0, 0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_counted_by_hand(said: list[int], strength: float, with_end: float) -> None:
    for ends in (8, [8, 7]):
        assert extraction_strength(Said(said, ends), ROW).item() == pytest.approx(strength)
    ended = extraction_strength(Said(said, 8), ROW, include_end=True).item()
    assert ended == extraction_strength(Said(said), ROW).item() == pytest.approx(with_end)


def by_loop(right: list[bool]) -> float:
    """What the public loop over k gives for the labels without the last one."""
    total = len(right) - 1
    if total <= 0:
        return 0.0
    for k in range(total):
        if all(right[k:total]):
            break
    return 1 - k / total


def by_bisection(model: nn.Module, row: dict[str, Tensor], ends: set[int]) -> float:
    """What the public bisection gives, by decoding until the answer's length or an end."""
    places = [i for i, label in enumerate(row["labels"].tolist()) if label != -100 and i > 0]
    if int(row["labels"][places[-1]]) in ends:
        places = places[:-1]
    start, full = places[0], row["input_ids"][: places[-1] + 1].tolist()
    left, right, before = start, len(full), None
    for _ in range(right - left):
        middle = (left + right) // 2
        if middle == before:
            break
        said = full[:middle]
        while len(said) < len(full):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax())
            if token in ends:
                break
            said.append(token)
        is_match = said[middle:] == full[middle : len(said)]
        left, right = (left, middle) if is_match else (middle, right)
        before = middle
    return 1 - (right - start) / (len(full) - start)


@pytest.mark.parametrize("steps", [0, 12, 30, 60])
def test_legacy_strengths_are_those_of_the_public_code(steps: int) -> None:
    model, batches = learnt(steps)
    rows = [{n: v[i] for n, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    for ends in (set(), {3}, {int(batches[0]["labels"][0, -1])}, set(range(0, 40, 3))):
        found = extraction_strength(model, batches, ends=ends, legacy="uwc")
        assert found.tolist() == pytest.approx([by_bisection(model, row, ends) for row in rows])
        looped = extraction_strength(model, batches, ends=ends, legacy="open_unlearning")
        expected = []
        for row in rows:
            likely = model(input_ids=row["input_ids"][None]).logits[0, :-1].argmax(-1)
            labels = row["labels"][1:]
            expected.append(by_loop((likely == labels)[labels != -100].tolist()))
        assert looped.tolist() == pytest.approx(expected)


def test_where_legacy_strengths_are_others() -> None:
    for said, exact, looped, bisected in (
        ([0, 3, 4, 0, 8], 0.0, 1 / 3, 0.0),  # a wrong last token
        ([0, 0, 0, 0, 0], 0.0, 1 / 3, 0.0),
        ([0, 8, 8, 8, 8], 0.0, 1 / 3, 1.0),  # a collapsed model that says nothing
        ([0, 0, 8, 5, 8], 1 / 3, 1 / 3, 2 / 3),
        ([0, 3, 4, 5, 8], 1.0, 1.0, 1.0),
    ):
        for legacy, expected in ((None, exact), ("open_unlearning", looped), ("uwc", bisected)):
            found = extraction_strength(Said(said, 8), ROW, legacy=legacy)  # type: ignore[arg-type]
            assert found.item() == pytest.approx(expected), (said, legacy)
    four = {**ROW, "labels": torch.tensor([[-100, 2, 3, 4, 5, 8]])}
    assert extraction_strength(Said([0] * 5), four, legacy="open_unlearning").item() == 0.25
    one = {**ROW, "labels": torch.tensor([[-100] * 5 + [8]])}
    assert extraction_strength(Said([0] * 5, 8), one, legacy="open_unlearning").item() == 0.0
    with pytest.raises(ValueError, match="Found none in sample 0"):
        extraction_strength(Said([0] * 5, 8), one, legacy="uwc")
    with pytest.raises(ValueError, match=r"open_unlearning, uwc, or None"):
        extraction_strength(Said([0] * 5), ROW, legacy="UWC")  # type: ignore[arg-type]


def test_what_has_no_answer_is_refused() -> None:
    alone = {**ROW, "labels": torch.tensor([[-100] * 5 + [8]])}
    for batch in (alone, {**ROW, "labels": torch.full((1, 6), -100)}):
        with pytest.raises(ValueError, match="Found none in sample 0"):
            extraction_strength(Said([0] * 5, 8), batch)
    assert extraction_strength(Said([0, 0, 0, 0, 8], 8), alone, include_end=True).item() == 1.0
    packed = {**ROW, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])}
    with pytest.raises(ValueError, match="one answer a row"):
        extraction_strength(Said([0] * 5), packed)
