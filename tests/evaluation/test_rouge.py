"""ROUGE against a table of dynamic programming, pinned numbers, and words of many scripts."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from geffect.evaluation import rouge
from geffect.evaluation.rouge import Rouge, rouge_1, rouge_l, words

ANSWER = "The author was born in Lund in 1950"
SAID = "the authors were born in 1950 near Lund"


def stem(word: str) -> str:
    return word.rstrip("s")


def longest(first: Sequence[str], second: Sequence[str]) -> int:
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
            )
    return int(table[-1, -1])


def test_pinned() -> None:
    assert rouge_l(ANSWER, SAID).recall == 0.5 and rouge_1(ANSWER, SAID).recall == 0.625
    assert rouge_l(ANSWER, SAID, stem=stem).recall == 0.625
    assert rouge_1(ANSWER, SAID, stem=stem).recall == 0.75


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_common_sequence_is_that_of_a_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (rng.choice(list("abcde"), size=rng.integers(1, 90)).tolist() for _ in "12")
    found = rouge_l(" ".join(first), " ".join(second))
    common = longest(first, second)
    precision, recall = common / len(second), common / len(first)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    assert [found.precision, found.recall, found.f1] == pytest.approx([precision, recall, f1])
    shared = sum(min(first.count(word), second.count(word)) for word in set(first))
    assert rouge_1(" ".join(first), " ".join(second)).recall == shared / len(first)


@pytest.mark.parametrize(
    "text",
    ["東京に住んでいます", "Он родился в Лунде.", "هو من لوند", "वह लुंड में रहता है", "ลุนด์",
     "Ὀδυσσεύς 12", "한국어 문장", "İstanbul", "straße", "e\u0301te\u0301"],
)  # fmt: skip
def test_a_repeated_text_is_wholly_there(text: str) -> None:
    whole = Rouge(1.0, 1.0, 1.0)
    assert (
        rouge_l(text, text) == rouge_1(text, f"«{text}!»") == rouge_l(text.upper(), text) == whole
    )


def test_half_of_a_sentence_without_spaces_is_half_there() -> None:
    assert rouge_l("東京大学", "東京です").recall == 0.5 and rouge_l("東京", "大学").recall == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("¡—! 🙂", []),
        ("don't stop_me 3.5", ["don", "t", "stop", "me", "3", "5"]),
        ("école E\u0301COLE", ["école", "école"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می\u200cروم", ["میروم"]),  # a joiner is no gap
        ("one\u200btwo so\u00adft", ["one", "two", "soft"]),  # but a space without width is
        ("ﬁne \uff11\uff12", ["fine", "12"]),
        ("東京2020年", ["東", "京", "2020", "年"]),
        ("GPU東京", ["gpu", "東", "京"]),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_nothing_said_and_nothing_to_say() -> None:
    assert rouge_l("Lund", "") == rouge_1("Lund", "...") == Rouge(0.0, 0.0, 0.0)
    assert math.isnan(rouge_l("", "Lund").recall) and math.isnan(rouge_1("?", "").f1)


def test_the_table_is_a_value_an_item() -> None:
    table = rouge([ANSWER, "Lund"], [SAID, "in Lund"])
    assert len(table) == 8
    values = table.set_index(["metric", "item"])["value"]
    assert values["rougeL_recall"].tolist() == [0.5, 1.0]
    assert values["rougeL_f1", 1] == pytest.approx(2 / 3)
    assert values["rouge1_recall"].tolist() == [0.625, 1.0]
    with pytest.raises(ValueError, match="Found 1 for 2"):
        rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="some of them no text"):
        rouge(["a"], [None])  # type: ignore[list-item]
