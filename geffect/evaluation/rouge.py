"""ROUGE-1 and ROUGE-L of texts in any script."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Letters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, Kana, Han."""


_SPACE = "\u200b"
"""A space of no width, which parts words."""


@dataclass(frozen=True)
class Rouge:
    """How much of an answer is said, and how much of what is said is of the answer; 0 to 1."""

    precision: float
    recall: float
    f1: float


def rouge_1(answer: str, said: str, *, stem: Callable[[str], str] | None = None) -> Rouge:
    """ROUGE-1: the words that both have, each as often as in the one that has it less often.

    - `answer`, `said`: what should be said, and what is.
    - `stem`: from a word to its stem, such as that of `nltk.PorterStemmer`; None compares words.

    NaN where the answer has no word. From Lin, 2004.

    >>> rouge_1("Born in Lund.", "in Lund, in 1950").recall.__round__(3)
    0.667
    """
    first, second = _stemmed(answer, stem), _stemmed(said, stem)
    return _of((Counter(first) & Counter(second)).total(), len(first), len(second))


def rouge_l(answer: str, said: str, *, stem: Callable[[str], str] | None = None) -> Rouge:
    """ROUGE-L: the longest sequence of words that both have in one order, with gaps.

    Parameters are those of `rouge_1`. TOFU reports the recall, MUSE F1.

    >>> rouge_l("生まれはルンド", "生まれはルンド")
    Rouge(precision=1.0, recall=1.0, f1=1.0)
    """
    first, second = _stemmed(answer, stem), _stemmed(said, stem)
    return _of(longest_common(first, second), len(first), len(second))


def rouge(answers: Sequence[str], said: Sequence[str]) -> pd.DataFrame:
    """Recall and F1 of both for each pair of texts: columns item, metric, value.

    `metric` is one of rouge1_recall, rouge1_f1, rougeL_recall and rougeL_f1.

    >>> rouge(["Lund"], ["In Lund"]).round(3)
       item         metric  value
    0     0  rouge1_recall  1.000
    1     0      rouge1_f1  0.667
    2     0  rougeL_recall  1.000
    3     0      rougeL_f1  0.667
    """
    are_texts = all(isinstance(text, str) for text in (*answers, *said))
    if len(answers) != len(said) or isinstance(answers, str) or not are_texts:
        raise ValueError(
            "`said` should be one text for each text of `answers`. Found "
            f"{len(said)} for {len(answers)}{'' if are_texts else ', some of them no text'}. Pass "
            "two lists in one order."
        )
    tables = []
    for name, kind in (("rouge1", rouge_1), ("rougeL", rouge_l)):
        found = [kind(*pair) for pair in zip(answers, said, strict=True)]
        for part in ("recall", "f1"):
            values = np.array([getattr(one, part) for one in found], dtype=np.float64)
            each = {"item": np.arange(len(found)), "metric": f"{name}_{part}", "value": values}
            tables.append(pd.DataFrame(each))
    return pd.concat(tables, ignore_index=True)


def words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case, with their marks.

    A letter of a script that puts no space between words is a word of its own. Forms of one
    character are the same (NFKC).

    >>> words("Où est-il né? 東京, дом 12")
    ['où', 'est', 'il', 'né', '東', '京', 'дом', '12']
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = []
    inside = joins = False
    for character in folded:
        kind = unicodedata.category(character)
        if kind == "Cf" and character != _SPACE:  # joins letters, and is seen by nobody
            continue
        if kind[0] == "M" and inside:
            found[-1] += character
        elif kind[0] in "LN":
            alone = any(low <= ord(character) <= high for low, high in _UNSPACED)
            if joins and not alone:
                found[-1] += character
            else:
                found.append(character)
            inside, joins = True, not alone
        else:
            inside = joins = False
    return found


def _stemmed(text: str, stem: Callable[[str], str] | None) -> list[str]:
    found = words(text)
    return found if stem is None else list(map(stem, found))


def _of(common: int, answer: int, said: int) -> Rouge:
    if not answer:
        nothing = float("nan")
        return Rouge(nothing, nothing, nothing)
    precision, recall = common / said if said else 0.0, common / answer
    return Rouge(precision, recall, 2 * common / (answer + said))


def longest_common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence, a bit for each word of the first.

    A zero bit stands where the length grows (Hyyro, 2004): one addition a word of the second.
    """
    places: dict[Hashable, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    all_of_them = (1 << len(first)) - 1
    row = all_of_them
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & all_of_them
    return len(first) - row.bit_count()
