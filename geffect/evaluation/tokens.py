"""The token record: what a model says to every scored token of every item, read in one pass.

Metrics of answers, and of membership, are sums over the rows of this table.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geffect.batch import IGNORED, check_one_answer, on_device
from geffect.data.collate import NEEDED, Item, check_length, check_tokens, collate
from geffect.risk import label_logits, predicts_next, undisturbed
from geffect.risk.alignment import unwrapped
from geffect.risk.limits import positions_of, vocabulary_of

from .ends import chosen_ends

Floats = NDArray[np.float64]

NEAR = 1e-4
"""Two logits that are closer are nearly tied: padding or a kernel may decide which is larger."""

TIE = 1e-5
"""Answers whose log p is closer, in nats, are as likely: rounding may decide which is larger."""

_AT_ONCE = 2**24
"""How many logits are looked at in float64 at a time."""

_SMALLEST = 1e-12
"""The variance of log p that z is divided by, at least: that of a uniform model is 0."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Every scored token of some items, and what a model says to it.

    - `tokens`: a row a token, in the order of the items, with the columns
      `item` and `subject`; `position`, its place in the labels of the item;
      `is_end`, whether it is the last of its item and ends an answer; `token` and `argmax_token`;
      `right`, whether they are the same;
      `logprob`, log p of the token in nats;
      `entropy`, -sum_v p_v log p_v of all that the model could say there;
      `z`, (log p - mu) / sigma, with mu and sigma of log p_v under p;
      `el2n`, |p - onehot(token)|, the length of the gradient at the logits; and
      `near_tie`, whether the two largest logits are within 1e-4 of each other.
    - `subjects`: what each item is about, one an item.
    - `vocabulary`: how many tokens the model could say.
    - `include_end`: whether tokens that end an answer count, in all metrics alike.

    `dataclasses.replace(table, include_end=True)` counts them too.
    """

    tokens: pd.DataFrame = field(repr=False)
    subjects: tuple[Hashable, ...] = field(repr=False)
    vocabulary: int
    include_end: bool = False

    @property
    def items(self) -> int:
        """How many items were asked for, those without a counted token among them."""
        return len(self.subjects)

    @property
    def counted(self) -> pd.DataFrame:
        """The rows that metrics are of."""
        return self.tokens if self.include_end else self.tokens[~self.tokens["is_end"]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many counted tokens each item has."""
        return np.bincount(self.counted["item"], minlength=self.items)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The items without a counted token, whose metrics are NaN."""
        return tuple(np.flatnonzero(self.lengths == 0).tolist())

    @property
    def near_ties(self) -> int:
        """At how many counted tokens another kernel, or other padding, may find another argmax."""
        return int(self.counted["near_tie"].sum())

    def mean(self, column: str) -> Floats:
        """The mean of a column over the counted tokens of each item; NaN where there are none."""
        rows = self.counted
        weights = rows[column].to_numpy(np.float64)
        sums = np.bincount(rows["item"], weights=weights, minlength=self.items)
        with np.errstate(invalid="ignore"):
            means: Floats = sums / self.lengths
        return means

    def of_items(self, column: str) -> list[NDArray[Any]]:
        """The values of a column at the counted tokens of each item, in their order."""
        rows = self.counted
        return np.split(rows[column].to_numpy(), np.cumsum(self.lengths)[:-1])

    def is_of_the_tokens_of(self, other: "TokenTable") -> bool:
        """Whether both are records of the same tokens, of which the same count."""
        of = ["item", "position", "token"]
        mine, others = (table.counted[of].to_numpy() for table in (self, other))
        return self.items == other.items and np.array_equal(mine, others)

    def tidy(self, values: Mapping[str, Floats], name: str = "metric") -> pd.DataFrame:
        """A value an item for each name, one below the other: columns item, subject, `name`, value.

        `item` and `subject` are those of this table.
        """
        each = {"item": np.arange(self.items), "subject": list(self.subjects)}
        tables = [pd.DataFrame({**each, name: key, "value": of}) for key, of in values.items()]
        return pd.concat(tables, ignore_index=True)


def evaluate_tokens(
    model: nn.Module,
    items: Sequence[Item],
    *,
    batch: int = 32,
    subjects: Sequence[Hashable] | None = None,
    ends: Collection[int] | None = None,
    include_end: bool = False,
    pad_token_id: int = 0,
) -> TokenTable:
    """What a model says to each scored token, from one forward a batch, teacher forced.

    - `items`: questions with their answers, as `geffect.data.examples.example` makes them. Scored
      are the labels that are not -100. Padding at the ends of an item is left out.
    - `batch`: the items of a forward, which are as long as each other as far as possible.
    - `subjects`: what each item is about; each is its own if left out.
    - `ends`: tokens that end an answer where they are its last; by default those that
      `geffect.evaluation.ends_of` finds in the model's configuration.
    - `include_end`: whether those count in the metrics.
    - `pad_token_id`: what stands where a batch is padded.

    Numbers are in float64, from logits of the model's own type. Neither the order of the items, nor
    their batches, nor padding changes them by more than rounding. In eval mode; the model stays as
    it was. Raises ValueError for items of which none has a scored token, for a mask with gaps, for
    scored tokens that the mask hides, and for logits that are not numbers.

    >>> from types import SimpleNamespace
    >>> class Next(nn.Module):  # a token is followed by the next one
    ...     def forward(self, input_ids, attention_mask=None):
    ...         return SimpleNamespace(logits=nn.functional.one_hot(input_ids + 1, 10).float())
    >>> items = [{"input_ids": [1, 2, 3, 8], "labels": [-100, 2, 3, 8]},
    ...          {"input_ids": [5, 8], "labels": [-100, 8]}]
    >>> table = evaluate_tokens(Next(), items, ends=[8])
    >>> table.counted[["item", "position", "token", "right"]]
       item  position  token  right
    0     0         1      2   True
    1     0         2      3   True
    >>> table.skipped
    (1,)
    """
    check_items(items)
    of = list(range(len(items)) if subjects is None else subjects)
    if len(of) != len(items):
        raise ValueError(
            f"`subjects` should be one for each item. Found {len(of)} for {len(items)} items. Pass "
            "them in the order of the items."
        )
    found: list[pd.DataFrame] = []
    vocabulary = 0
    with undisturbed(model), torch.no_grad():
        for chosen, collated in alike(model, items, batch, pad_token_id):
            part, vocabulary = said_to(model, collated)
            found.append(part.assign(item=chosen[part["item"]]))
    tokens = pd.concat(found).sort_values(["item", "position"], ignore_index=True)
    ended = chosen_ends(model, ends)
    is_last = ~tokens["item"].duplicated(keep="last")
    tokens.insert(1, "subject", [of[item] for item in tokens["item"]])
    tokens.insert(3, "is_end", is_last & tokens["token"].isin(ended))
    return TokenTable(tokens, tuple(of), vocabulary, include_end)


def alike(
    model: nn.Module, items: Sequence[Item], size: int, pad_token_id: int = 0
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    """The items with something scored in batches of one length, as far as possible.

    Each with the numbers of its items.
    """
    if size < 1:
        raise ValueError(f"`batch` should be at least 1. Found {size}. Pass, say, 32.")
    is_next, positions = predicts_next(model), positions_of(model)
    rows = unpadded(model, items)
    scored = [index for index, row in enumerate(rows) if _is_scored(row, is_next)]
    if not scored:
        raise ValueError(
            "`items` should have an answer token: a label that is not -100, beyond the first "
            f"position where a causal model is asked. Found none in {len(items)} items. Mark the "
            "answers in the labels."
        )
    for index in scored if is_next else ():
        check_length(len(rows[index]["input_ids"]), positions, f"Item {index}")
    known = vocabulary_of(model)
    for index in scored:
        check_tokens(rows[index]["input_ids"], known, f"Item {index}")
    order = sorted(scored, key=lambda index: len(rows[index]["input_ids"]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = collate([rows[index] for index in chosen], pad_token_id=pad_token_id)
        yield np.array(chosen), batch


def counted_labels(model: nn.Module, item: Item, ended: Collection[int]) -> list[int] | None:
    """The labels of an item without a token at its end that is one of `ended`.

    None where then nothing is scored.

    >>> item = {"input_ids": [4, 5, 2], "labels": [-100, 5, 2]}
    >>> counted_labels(nn.Linear(1, 1), item, {2})
    [-100, 5, -100]
    """
    labels = _array(item["labels"]).tolist()
    first = int(predicts_next(model))
    scored = [i for i, label in enumerate(labels) if label != IGNORED and i >= first]
    if scored and labels[scored[-1]] in ended:
        labels[scored.pop()] = IGNORED
    return labels if scored else None


def said_to(model: nn.Module, batch: Mapping[str, Any]) -> tuple[pd.DataFrame, int]:
    """The tokens of one batch, `item` being its row, and how many tokens the model could say."""
    check_one_answer(batch, "a record of its tokens")
    device = next(model.parameters(), torch.empty(0)).device
    logits, labels = label_logits(model, on_device(batch, device))
    places = torch.nonzero(labels != IGNORED)
    row, column = places.unbind(1)
    vocabulary = logits.shape[-1]
    token = labels[row, column]
    if bool(((token < 0) | (token >= vocabulary)).any()):
        raise ValueError(
            f"Labels should be -100, or tokens of the model's {vocabulary}. Found "
            f"{int(token.min())} to {int(token.max())}. Pass the tokenizer of the model."
        )
    at_once = max(1, _AT_ONCE // vocabulary)
    parts = []
    for i in range(0, len(token), at_once):
        of_some = logits[row[i : i + at_once], column[i : i + at_once]]
        check_numbers(model, of_some)
        parts.append(_columns(of_some, token[i : i + at_once]))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    before = batch["labels"].shape[1] - labels.shape[1]  # a causal model predicts not the first
    named = {"item": row, "position": column + before, "token": token, **columns}
    return pd.DataFrame({name: value.cpu().numpy() for name, value in named.items()}), vocabulary


def _columns(logits: Tensor, token: Tensor) -> dict[str, Tensor]:
    """What is told of some tokens by the logits at their places, `Float[token, vocabulary]`."""
    largest = logits.argmax(dim=-1)
    exact = in_float64(logits)
    token = token.to(exact.device)
    log_p = exact.log_softmax(dim=-1)
    p = log_p.exp()
    likely = log_p.where(p > 0, torch.zeros_like(log_p))  # 0 log 0 = 0
    mean = (p * likely).sum(-1)
    variance = (p * (likely - mean[:, None]).square()).sum(-1)
    own = log_p.gather(1, token[:, None]).squeeze(1)
    others = p.scatter(1, token[:, None], 0.0)
    first, second = exact.topk(min(2, exact.shape[-1])).values[:, [0, -1]].unbind(1)
    return {
        "logprob": own,
        "argmax_token": largest,
        "right": largest.to(token.device) == token,
        "entropy": -mean,
        "z": (own - mean) / variance.clamp(min=_SMALLEST).sqrt(),
        "el2n": torch.hypot(torch.expm1(own), torch.linalg.vector_norm(others, dim=-1)),
        "near_tie": (first - second < NEAR) & (exact.shape[-1] > 1),
    }


def check_numbers(model: nn.Module, logits: Tensor) -> None:
    """Refuse logits of which no probability follows: NaN, infinite, or all of them minus infinity.

    >>> check_numbers(nn.Linear(1, 1), torch.tensor([[0.0, torch.nan]]))
    Traceback (most recent call last):
    ValueError: `Linear` should return logits that are numbers. Found ... leaves such.
    """
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise ValueError(
            f"`{type(unwrapped(model)).__name__}` should return logits that are numbers. Found "
            "some that are NaN or infinite. Look at its parameters: a training that diverged "
            "leaves such."
        )


def in_float64(logits: Tensor) -> Tensor:
    """The logits in float64, on the CPU where their device has no such type."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def check_items(items: Sequence[Item]) -> None:
    """Refuse what is no list of items, such as texts, or a batch."""
    is_list = hasattr(items, "__len__") and not isinstance(items, Mapping | str)
    if not is_list or not all(isinstance(i, Mapping) and i.keys() >= {*NEEDED} for i in items):
        raise TypeError(
            "`items` should be a list of items with `input_ids` and `labels`. Found "
            f"`{type(items).__name__}`{' of something else' * is_list}. Make them of texts by "
            "`geffect.data.examples`, or take a batch apart."
        )


def unpadded(model: nn.Module, items: Sequence[Item]) -> list[Item]:
    """The items of a causal model without padding at their ends; those of any other as they are.

    So the first token of an item is scored in no pass, wherever its padding stands.
    """
    return [*map(bare, items, count())] if predicts_next(model) else [*items]


def bare(item: Item, index: int) -> Item:
    """An item without the padding at its ends."""
    mask = item.get("attention_mask")
    if mask is None or np.ndim(_array(mask)) != 1 or len(mask) != len(item["input_ids"]):
        return item
    seen = np.flatnonzero(_array(mask))
    start, stop = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    hidden = np.setdiff1d(np.flatnonzero(_array(item["labels"]) != IGNORED), seen)
    if len(seen) < stop - start or len(hidden):
        found = "gaps" if len(seen) < stop - start else "scored tokens that it hides"
        raise ValueError(
            f"`attention_mask` should be 1 from the first to the last token of an item. Found "
            f"{found} in item {index}. Make the mask from lengths, not from the pad token, which "
            "may end an answer too; or leave it out."
        )
    return {
        name: value[start:stop] if _length(value) == len(mask) else value
        for name, value in item.items()
    }


def _is_scored(item: Item, is_next: bool) -> bool:
    return bool((_array(item["labels"])[int(is_next) :] != IGNORED).any())


def _array(values: Iterable[int] | Tensor) -> NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError:  # a number
        return -1
