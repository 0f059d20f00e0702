"""Answers that a model samples itself, against the probabilities that it gives."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from geffect.data.alternates import sampled_alternates
from geffect.data.collate import collate
from geffect.objectives import DPO, FrozenModel
from tests.utils import shallow as tiny

END = 0
ITEMS = [
    {"input_ids": [5, 6, 7, 8, END], "labels": [-100, -100, 7, 8, END]},
    {"input_ids": [9, 3, END], "labels": [-100, 3, END]},
]


def told(probabilities: dict[int, list[float]]) -> Any:
    """A model whose next token depends on the last one."""
    table = torch.full((12, 12), 1 / 12)
    for token, p in probabilities.items():
        table[token] = torch.tensor([*p, *[0.0] * (12 - len(p))])
    return lambda input_ids: SimpleNamespace(logits=table.log()[input_ids])


def answers(pairs: list[Any]) -> list[tuple[int, ...]]:
    """The alternates without their questions."""
    return [tuple(x for x in pair["alternate"]["labels"] if x != -100) for pair in pairs]


def test_five_items_a_question_with_the_original_and_another_answer() -> None:
    model = tiny.gpt2()
    pairs = sampled_alternates(model, ITEMS)
    assert len(pairs) == 10
    for number, pair in enumerate(pairs):
        original, alternate = pair["original"], pair["alternate"]
        asked = 2 if number < 5 else 1
        assert original == ITEMS[number // 5] != alternate
        assert alternate["input_ids"][:asked] == original["input_ids"][:asked]
        assert alternate["labels"][:asked] == [-100] * asked
        assert alternate["labels"][asked:] == alternate["input_ids"][asked:]
        assert alternate["labels"][-1] == END and END not in alternate["labels"][:-1]
        assert 2 <= len(alternate["labels"]) - asked <= 2 * (len(original["labels"]) - asked)
    batch = collate(pairs)
    assert DPO()(model, {"forget": batch}, FrozenModel.copied(model.eval())).isfinite()


def test_a_seed_and_a_row_say_what_is_drawn() -> None:
    model = tiny.gpt2()
    first = sampled_alternates(model, ITEMS, seed=3)
    torch.rand(5)
    assert sampled_alternates(model, ITEMS[::-1], seed=3) == [*first[5:], *first[:5]]
    assert sampled_alternates(model, ITEMS[:1], count=2, seed=3) == first[:2]
    assert sampled_alternates(model, ITEMS, seed=4) != first
    assert len({*answers(first[:5])}) > 1


def test_tokens_are_drawn_as_the_model_gives_them() -> None:
    model = told({6: [0, 0.1, 0.3, 0.6], 1: [1.0], 2: [1.0], 3: [1.0]})
    pairs = sampled_alternates(model, ITEMS[:1], count=3000)
    found = Counter(answers(pairs))
    assert {*found} == {(1, END), (2, END), (3, END)}
    for token, p in ((1, 0.1), (2, 0.3), (3, 0.6)):
        assert found[token, END] / 3000 == pytest.approx(p, abs=5 * (p * (1 - p) / 3000) ** 0.5)
    sharp = Counter(answers(sampled_alternates(model, ITEMS[:1], count=500, temperature=0.5)))
    assert sharp[3, END] / 500 == pytest.approx(0.36 / 0.46, abs=0.1)


def test_the_original_is_drawn_again() -> None:
    model = told({9: [0, 0, 0, 0.7, 0.3], 3: [1.0], 4: [1.0]})
    assert {*answers(sampled_alternates(model, ITEMS[1:], count=20))} == {(4, END)}
    long = told({9: [0, 0, 0, 0.7, 0.3], 3: [0.5, 0.5], 4: [0.1, 0, 0, 0, 0.9]})
    twenty = sampled_alternates(long, ITEMS[1:], count=20, longest=30)
    assert sampled_alternates(long, ITEMS[1:], count=4, longest=30) == twenty[:4]
    nothing_else = told({9: [0, 0, 0, 1.0], 3: [1.0]})
    with pytest.raises(ValueError, match=r"of item 0\. Found 0 of 5 after 20 tries\. Pass"):
        sampled_alternates(nothing_else, ITEMS[1:])
    asked = sampled_alternates(told({9: [0, 0, 0, 1.0], 3: [1.0], 8: [0, 1.0], 1: [1.0]}),
                               ITEMS[1:], prompts=[[9, 8]], count=1)  # fmt: skip
    assert asked[0]["alternate"]["input_ids"] == [9, 1, END]  # the question is that of the item


def test_an_answer_that_does_not_end_is_ended() -> None:
    model = told({6: [0, 1.0], 1: [0, 1.0]})
    assert answers(sampled_alternates(model, ITEMS[:1], count=1)) == [(1, 1, 1, 1, 1, END)]
    assert answers(sampled_alternates(model, ITEMS[:1], count=1, longest=3)) == [(1, 1, END)]


def test_an_alternate_is_no_longer_than_the_model() -> None:
    pairs = sampled_alternates(tiny.gpt2(), ITEMS, longest=99, prompts=[[1] * 13] * 2)
    assert max(map(len, answers(pairs))) == 3  # of 16 positions


@pytest.mark.parametrize("caches", [True, False])
def test_the_model_and_the_random_numbers_are_left_as_they_were(caches: bool) -> None:
    model: Any = tiny.llama(dropout=0.5).train()
    model.config.use_cache = caches
    model.get_submodule("model.norm").eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    first = sampled_alternates(model, ITEMS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert sampled_alternates(model, ITEMS) == first
    assert all(p.grad is None for p in model.parameters())
    model.config.use_cache = not caches
    assert sampled_alternates(model, ITEMS) == first


@pytest.mark.parametrize(
    ("model", "items", "given", "says"),
    [
        (tiny.gpt2, ITEMS, {"count": 0}, "`count` should be 1 or more"),
        (tiny.gpt2, ITEMS, {"temperature": 0.0}, "`temperature` a positive number"),
        (tiny.gpt2, ITEMS, {"longest": 1}, "`longest` 2 or more"),
        (tiny.gpt2, ITEMS, {"prompts": [[1]]}, "one for each item. Found 1 for 2"),
        (tiny.gpt2, [{"input_ids": [1, 2], "labels": [1, 2]}], {}, "without a question"),
        (tiny.gpt2, [{"input_ids": [1, 2], "labels": [-100, -100]}], {}, "scored. Found none"),
        (tiny.gpt2, ["x"], {}, "Item 0 should have `input_ids` and `labels`. Found 'x'"),
        (tiny.gpt2, ITEMS[0], {}, "Item 0 should have .* Found 'input_ids'. Pass a list"),
        (tiny.gpt2, [{"original": ITEMS[0], "alternate": ITEMS[1]}], {}, "Found original, alt"),
        (tiny.gpt2, ITEMS, {"prompts": [[1] * 15] * 2}, "item 0.* at most 16 .* Found 17"),
        (tiny.t5, ITEMS, {}, "Found an encoder-decoder, `T5ForConditionalGeneration`"),
    ],
)
def test_what_is_refused(model: Any, items: Any, given: dict[str, Any], says: str) -> None:
    made: nn.Module = model()
    with pytest.raises(ValueError, match=says):
        sampled_alternates(made, items, **given)
