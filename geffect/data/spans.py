"""The part of an answer that a text is: what a row is scored on, and nothing else of it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from geffect.batch import IGNORED

from .collate import Item


def narrowed(item: Item, text: str, tokenizer: Any, *, last: bool = False) -> dict[str, Any]:
    """The item with labels on the tokens of a text alone, which stands in its answer.

    Every token that holds a part of the text is scored, also one that goes beyond it. White space
    tells nothing, since tokenizers do not keep it, nor do capitals where a tokenizer has none. Of
    several places it is the first where the text is no part of a longer word, or the first.

    - `item`: `input_ids` and `labels`, as `geffect.data.examples.example` makes them.
    - `text`: such as the entity of the answer.
    - `tokenizer`: what the item was made with.
    - `last`: whether the last of several places is meant.

    Raises ValueError for a text that does not stand in what the item is scored on.

    >>> class Letters:
    ...     def decode(self, ids): return "".join(map(chr, ids))
    >>> ids = [*map(ord, "in art: Art")]
    >>> narrowed({"input_ids": ids, "labels": ids}, "art", Letters())["labels"][2:7]
    [-100, 97, 114, 116, -100]
    """
    labels = [int(label) for label in item["labels"]]
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    ids = [labels[place] for place in places]
    answer = tokenizer.decode(ids)
    found = _found(answer, text, last) or _found(answer, _kept(text, tokenizer), last)
    if found is None:
        raise ValueError(
            f"`text` should stand in the answer of the item, which is {answer!r}. Found {text!r}. "
            "Copy it from the answer."
        )
    start, stop = found
    kept = {
        place
        for place, (begin, end) in zip(places, _reach(ids, answer, tokenizer), strict=True)
        if begin < stop and end > start
    }
    return {
        **item,
        "labels": [label if i in kept else IGNORED for i, label in enumerate(labels)],
    }


def without_end(labels: Sequence[int], ends: set[int]) -> list[int]:
    """The labels without a token that ends the answer, where the last one scored is such.

    >>> without_end([-100, 5, 2, -100], {2})
    [-100, 5, -100, -100]
    """
    kept = list(labels)
    last = max((i for i, label in enumerate(kept) if label != IGNORED), default=-1)
    if last >= 0 and kept[last] in ends:
        kept[last] = IGNORED
    return kept


def _kept(text: str, tokenizer: Any) -> str:
    """A text as a tokenizer keeps it, such as one that knows no capitals."""
    if not callable(tokenizer):
        return text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept: str = tokenizer.decode(ids, skip_special_tokens=True)
    return kept


def _found(answer: str, text: str, last: bool) -> tuple[int, int] | None:
    """Where a text stands in an answer, both without white space, which is not counted."""
    seen = [place for place, letter in enumerate(answer) if not letter.isspace()]
    squeezed, wanted = "".join(answer.split()), "".join(text.split())
    starts = [
        i
        for i in range(len(squeezed) - len(wanted) + 1)
        if wanted and squeezed.startswith(wanted, i)
    ]

    def inside(place: int, step: int) -> bool:
        """Whether a word goes on beyond the letter at a place."""
        beyond = seen[place] + step
        return (
            0 <= beyond < len(answer) and answer[beyond].isalnum() and answer[seen[place]].isalnum()
        )

    apart = [i for i in starts if not (inside(i, -1) or inside(i + len(wanted) - 1, 1))]
    chosen = apart or starts
    if not chosen:
        return None
    start = chosen[-1 if last else 0]
    return start, start + len(wanted)


def _reach(ids: Sequence[int], answer: str, tokenizer: Any) -> list[tuple[int, int]]:
    """From which letter to which each token goes, white space not counted.

    A token that is no letter by itself, such as a byte of one, is of the letter that follows; white
    space is of none.
    """
    squeezed = "".join(answer.split())
    bounds = [0]
    for stop in range(1, len(ids) + 1):
        begun = "".join(tokenizer.decode(list(ids[:stop])).split())
        same = next(
            (i for i, (a, b) in enumerate(zip(begun, squeezed, strict=False)) if a != b),
            min(len(begun), len(squeezed)),
        )
        bounds.append(max(bounds[-1], same))
    return [
        (a, max(b, a + bool(tokenizer.decode([token]).strip())))
        for token, (a, b) in zip(ids, pairwise(bounds), strict=True)
    ]
