"""Greedy answers: those that a loop over single questions finds, whatever stands beside them."""

from typing import Any

import pytest
import torch

from geffect.batch import IGNORED
from geffect.data.examples import example
from geffect.evaluation.answers import are_right, generated, greedy, sampled
from tests.utils import tiny
from tests.utils.chat import TURNS, make_tokenizer

Item = dict[str, list[int]]


def items(count: int = 12, seed: int = 0) -> list[Item]:
    """Questions of several lengths, some of them alike, with an answer of one token."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        tokens = torch.randint(1, 16, (2 + index % 5,), generator=draw).tolist()
        found.append({"input_ids": [*tokens, 3], "labels": [*[IGNORED] * len(tokens), 3]})
    return found


def naive(model: torch.nn.Module, item: Item, end: int | None, longest: int) -> list[int]:
    """One question, one token after the other."""
    ids = [token for token, label in zip(*item.values(), strict=True) if label == IGNORED]
    said: list[int] = []
    while len(said) < longest:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == end:
            break
        said.append(token)
    return said


def test_every_answer_is_that_of_its_question_alone() -> None:
    model, asked = tiny.llama(), items()
    first = naive(model, asked[3], None, 4)
    for end in (None, first[2]):
        alone = [naive(model, item, end, 4) for item in asked]
        for at_once in (1, 2, 64):
            assert greedy(model, asked, end=end, longest=4, at_once=at_once) == alone
    for at_once in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`at_once`, should be a whole number"):
            greedy(model, asked, end=None, longest=4, at_once=at_once)
    assert greedy(model, asked, end=first[0], longest=4)[3] == []
    assert greedy(model, asked[::-1], end=None, longest=4)[-4] == first


def test_padding_on_either_side_changes_nothing() -> None:
    model, asked = tiny.llama(), items(5)
    expected = greedy(model, asked, end=None, longest=3)
    for left in (True, False):
        padded = []
        for item in asked:
            length = len(item["input_ids"])
            pad = [0] * (9 - length)
            ids, labels, mask = item["input_ids"], item["labels"], [1] * length
            off = [IGNORED] * len(pad)
            padded.append(
                {
                    "input_ids": pad + ids if left else ids + pad,
                    "labels": off + labels if left else labels + off,
                    "attention_mask": pad + mask if left else mask + pad,
                }
            )
        assert greedy(model, padded, end=None, longest=3) == expected


def test_the_model_stays_as_it_was() -> None:
    model = tiny.llama().train()
    before = torch.get_rng_state()
    greedy(model, items(2), end=None, longest=2)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_answer_stands_anywhere_in_what_is_said_in_any_case() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    rows = [example({"question": "Who wrote it?", "answer": "Ada"}, tokenizer)]
    said = "well Ada wrote it"
    model = Saying(tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer)
    assert are_right(model, tokenizer, rows, ["ADA"], longest=30) == [True]
    assert are_right(model, tokenizer, rows, ["Bob"], longest=30) == [False]
    assert are_right(model, tokenizer, rows, ["Ada"], longest=1) == [False]


class Saying(torch.nn.Module):
    """A model that says some tokens, whatever it is asked."""

    def __init__(self, tokens: list[int], tokenizer: Any) -> None:
        super().__init__()
        self.tokens, self.start = [*tokens, tokenizer.eos_token_id], 0
        self.size = len(tokenizer)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.start = self.start or input_ids.shape[1]
        next_one = self.tokens[input_ids.shape[1] - self.start]
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[..., next_one] = 1.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(
    ("labels", "found"), [([IGNORED] * 3, "none scored"), ([5, 6, 7], "none before them")]
)
def test_an_item_without_question_or_answer_is_refused(labels: list[int], found: str) -> None:
    item = {"input_ids": [5, 6, 7], "labels": labels}
    with pytest.raises(ValueError, match=f"Found {found} in item 1"):
        greedy(tiny.llama(), [*items(1), item], end=None, longest=3)


def test_answers_are_one_an_item() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    with pytest.raises(ValueError, match="Found 1 for 2"):
        are_right(tiny.llama(), tokenizer, items(2), ["Ada"], longest=1)


def test_an_empty_answer_and_no_token_are_refused() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    with pytest.raises(ValueError, match="Found an empty one"):
        are_right(tiny.llama(), tokenizer, items(2), ["Ada", " "], longest=1)
    with pytest.raises(ValueError, match="Found `longest = 0`"):
        greedy(tiny.llama(), items(1), end=None, longest=0)


def test_several_ends_and_lengths() -> None:
    model, asked = tiny.llama(), items()
    first, second = naive(model, asked[3], None, 4)[2], naive(model, asked[5], None, 4)[1]
    longest = [1 + index % 4 for index in range(len(asked))]
    said = greedy(model, asked, end={first, second}, longest=longest)
    for answer, item, limit in zip(said, asked, longest, strict=True):
        whole = naive(model, item, first, limit)
        expected = whole[: whole.index(second)] if second in whole else whole
        assert answer == expected
    with pytest.raises(ValueError, match="for all of 12 items or for each"):
        greedy(model, asked, end=None, longest=[1, 2])


def test_an_answer_ends_where_positions_do() -> None:
    model, asked = tiny.gpt2(), items(2)
    said = greedy(model, asked, end=None, longest=99)
    assert [len(a) + len(q["input_ids"]) - 1 for a, q in zip(said, asked, strict=True)] == [16, 16]
    long = {"input_ids": [3] * 17, "labels": [IGNORED] * 16 + [3]}
    with pytest.raises(ValueError, match="Found one of 16 tokens"):
        greedy(model, [long], end=None, longest=1)


def test_an_encoder_decoder_answers_its_whole_input() -> None:
    model, batch = tiny.t5().eval(), tiny.translation(0)
    asked = [{name: of[row].tolist() for name, of in batch.items()} for row in range(3)]
    said = greedy(model, asked, end=None, longest=4)
    for row, answer in zip(asked, said, strict=True):
        tokens = [0]
        for _ in range(4):
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([row["input_ids"]]),
                    decoder_input_ids=torch.tensor([tokens]),
                ).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert answer == tokens[1:]


def test_what_is_generated_is_text_as_long_as_the_answers_ask_for() -> None:
    tokenizer: Any = make_tokenizer(TURNS)
    rows = [example({"question": "Who wrote it?", "answer": "Ada"}, tokenizer)]
    said = "東京, well Ada wrote it"
    words = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert generated(Saying(words, tokenizer), tokenizer, rows) == [said]
    cut = generated(Saying(words, tokenizer), tokenizer, rows, least=2, times=2.0)
    answer = len(rows[0]["labels"]) - rows[0]["labels"].count(IGNORED) - 1  # without its end
    assert cut == [tokenizer.decode(words[: 2 * answer])]
    nothing = {"input_ids": [5, 6], "labels": [IGNORED] * 2}
    assert generated(Saying(words, tokenizer), tokenizer, [nothing, *rows]) == ["", said]


def test_samples_are_drawn_by_question_and_number_alone() -> None:
    model, asked = tiny.llama(), items(6)
    state = torch.get_rng_state()
    said = sampled(model, asked, end=3, longest=4, count=3)
    assert [len(answers) for answers in said] == [3] * 6
    assert len({tuple(answer) for answers in said for answer in answers}) > 9
    back = sampled(model, asked[::-1], end=3, longest=[4] * 6, count=2, at_once=1)
    assert back[::-1] == [answers[:2] for answers in said]
    assert torch.equal(state, torch.get_rng_state()) and model.training
    cold = sampled(model, asked, end=3, longest=4, count=1, temperature=1e-6)
    assert [answer for (answer,) in cold] == greedy(model, asked, end=3, longest=4)
    with pytest.raises(ValueError, match="`temperature = 0"):
        sampled(model, asked, end=3, longest=4, count=1, temperature=0.0)


def test_samples_follow_the_probabilities() -> None:
    model, asked = tiny.llama(), items(1)
    said = sampled(model, asked, end=None, longest=1, count=4000, at_once=4000)
    with torch.no_grad():
        ids = torch.tensor([asked[0]["input_ids"][:-1]])
        expected = model.eval()(input_ids=ids).logits[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor([answer[0] for answer in said[0]]), minlength=23) / 4000
    assert (found - expected).abs().max() < 0.03
