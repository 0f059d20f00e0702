"""Parts of answers as labels, for tokenizers that cut words and letters apart."""

from types import SimpleNamespace
from typing import Any

import pytest

from geffect.batch import IGNORED
from geffect.data.examples import example
from geffect.data.spans import narrowed, without_end
from tests.utils.chat import TURNS, make_tokenizer


def scored(item: Any, tokenizer: Any) -> str:
    text: str = tokenizer.decode([x for x in item["labels"] if x != IGNORED])
    return text


@pytest.mark.parametrize("template", [None, TURNS])
@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("Ada lives in Paris.", "Paris", "Paris"),
        ("Ada lives in Paris.", "Ada lives in Paris.", "Ada lives in Paris."),
        ("In Paris, Texas.", "Paris,  Texas", "Paris, Texas"),  # white space tells nothing
        ("Начала в Москве давно.", "Москве", "Москве"),
        ("彼女は京都に住む。", "京都", "京都"),
        ("Café, été", "été", "été"),
        ("Art 🎨 art", "🎨", "🎨"),
        ("started in art", "art", "art"),
    ],
)
def test_a_text_is_scored_alone(
    answer: str, text: str, expected: str, template: str | None
) -> None:
    tokenizer = make_tokenizer(template)
    item = example({"question": "Where does Ada live?", "answer": answer}, tokenizer)
    found = narrowed(item, text, tokenizer)
    assert found["input_ids"] == item["input_ids"]
    assert scored(found, tokenizer).strip() == expected
    whole, own = list(item["labels"]), list(found["labels"])
    assert all(a in (b, IGNORED) for a, b in zip(own, whole, strict=True))


def test_of_several_places_it_is_the_first_that_is_a_word_or_the_last() -> None:
    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    ids = [*map(ord, "started art, art")]
    item = {"input_ids": ids, "labels": ids}

    def places(**options: bool) -> list[int]:
        labels = narrowed(item, "art", letters, **options)["labels"]
        return [i for i, label in enumerate(labels) if label != IGNORED]

    assert places() == [8, 9, 10]
    assert places(last=True) == [13, 14, 15]


def test_a_token_that_goes_beyond_the_text_is_scored_too() -> None:
    words = ["in ", "Par", "is.", " now"]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(words[i] for i in ids))
    item = {"input_ids": [0, 1, 2, 3], "labels": [0, 1, 2, 3]}
    assert narrowed(item, "Paris", tokenizer)["labels"] == [IGNORED, 1, 2, IGNORED]


def test_capitals_tell_nothing_where_a_tokenizer_has_none() -> None:
    class Small:
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text.lower())]}

        def decode(self, ids: list[int], **options: bool) -> str:
            return "".join(map(chr, ids))

    ids = [*map(ord, "in paris")]
    labels = narrowed({"input_ids": ids, "labels": ids}, "Paris", Small())["labels"]
    assert labels == [IGNORED, IGNORED, IGNORED, *ids[3:]]


@pytest.mark.parametrize("text", ["Rome", "", " "])
def test_a_text_that_is_not_there_is_refused(text: str) -> None:
    tokenizer = make_tokenizer()
    item = example({"question": "Where?", "answer": "In Paris."}, tokenizer)
    with pytest.raises(ValueError, match="should stand in the answer of the item"):
        narrowed(item, text, tokenizer)


def test_only_the_last_token_is_an_end() -> None:
    assert without_end([-100, 2, 5, 2], {2}) == [-100, 2, 5, -100]
    assert without_end([-100, 2, 5], {2}) == [-100, 2, 5]
    assert without_end([-100], {2}) == [-100]
