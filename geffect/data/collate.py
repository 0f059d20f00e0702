"""From items to the batches that a model is called with: the one place where data is padded."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import IGNORED, Batch, batches_in

Item = Mapping[str, Any]
"""One sample: `input_ids`, `labels` and further columns, as lists, arrays or tensors. Or a sample
of each side by its name, {"forget": item, "retain": item}."""

PaddingSide = Literal["right", "left"]

NEEDED = ("input_ids", "labels")


def collate(
    items: Sequence[Item], *, pad_token_id: int = 0, padding_side: PaddingSide = "right"
) -> dict[str, Any]:
    """Items as one batch; items with sides as a batch of each side, at any depth.

    A column that is as long as `input_ids` in every item is padded to the longest: `input_ids` with
    the pad token, `labels` with -100, any other with 0. So is one as long as `labels`, where these
    have a length of their own, as encoder-decoders take them. A column of one shape is stacked. The
    mask follows the lengths of the items, never the tokens, so that a pad token that is also the
    end token is seen and scored where it ends an answer.

    - `items`: samples with the same columns, `input_ids` and `labels` among them. Without
      `attention_mask` every token of an item is attended.
    - `pad_token_id`: what stands in `input_ids` where nothing is attended or scored.
    - `padding_side`: "right" or "left". On the left `position_ids` are added where there are none,
      which count the attended tokens from 0, and the first token of an item is not scored. The left
      is for causal models: a decoder with labels of their own begins with the first of them.

    Returns tensors whose first dimension is the item. Raises ValueError for a column that it cannot
    place, and names it.

    >>> short = {"input_ids": [5], "labels": [5], "pixel_values": [0.5, 0.5]}
    >>> long = {"input_ids": [6, 7], "labels": [-100, 7], "pixel_values": [0.0, 1.0]}
    >>> for column, values in collate([short, long]).items():
    ...     print(column, values.tolist())
    input_ids [[5, 0], [6, 7]]
    labels [[5, -100], [-100, 7]]
    pixel_values [[0.5, 0.5], [0.0, 1.0]]
    attention_mask [[1, 0], [1, 1]]
    >>> pairs = [{"forget": {"original": short, "alternate": long}, "retain": long}]
    >>> collate(pairs)["forget"]["alternate"]["labels"]
    tensor([[-100,    7]])
    """
    if padding_side not in ("right", "left"):
        raise ValueError(
            f'`padding_side` should be "right" or "left". Found {padding_side!r}. Pass one of them.'
        )
    fills = {"input_ids": pad_token_id, "labels": IGNORED}

    def batch_of(items: Sequence[Item], name: str) -> dict[str, Any]:
        columns = _columns(items, name)
        if all(isinstance(value, Mapping) for item in items for value in item.values()):
            return {
                side: batch_of([item[side] for item in items], f"{name}.{side}".lstrip("."))
                for side in columns
            }
        rows = [_row(item, name, padding_side) for item in items]
        return {
            column: _placed(rows, column, fills.get(column, 0), padding_side, _told(column, name))
            for column in rows[0]
        }

    return batch_of(items, "")


def batched(
    items: Sequence[Item],
    size: int,
    *,
    seed: int | None = None,
    least: int = 1,
    even: bool = False,
    pad_token_id: int = 0,
) -> list[Batch]:
    """All items once, in batches of at most `size` that differ by one item at most.

    - `items`, `pad_token_id`: as for `collate`; a batch is as wide as its own longest item.
    - `size`: the items of a batch, at most.
    - `seed`: shuffles the items before; None keeps their order.
    - `least`: how many batches there are, at least, as far as there are items.
    - `even`: whether their number is even, as far as there are items.

    >>> three = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [5], [8, 9])]
    >>> [batch["labels"].tolist() for batch in batched(three, 2)]
    [[[5, 6, 7]], [[5, -100], [8, 9]]]
    """
    if size < 1:
        raise ValueError(
            f"`batch_size` should be at least 1. Found {size}. Pass how many examples the memory "
            "holds at a time."
        )
    order = list(range(len(items)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    count = max(-(-len(order) // size), min(least, len(order)))
    count += even and count % 2 and count < len(order)
    bounds = [len(order) * i // count for i in range(count + 1)]
    return [
        collate([items[i] for i in order[start:stop]], pad_token_id=pad_token_id)
        for start, stop in pairwise(bounds)
    ]


def check_length(length: int, positions: int | None, where: str) -> None:
    """Refuse a row of more tokens than the model has positions for; None is no limit."""
    if positions is not None and length > positions:
        raise ValueError(
            f"{where} should have at most {positions} tokens in a row, for which the model has "
            f"positions. Found {length}. Leave it out, or cut such rows off: a file is read with "
            f"max_length={positions}, on the command line with --max-length {positions}."
        )


def check_tokens(ids: Any, vocabulary: int | None, where: str) -> None:
    """Refuse tokens that the model does not know; None is no limit.

    >>> check_tokens([1, 9], 9, "Item 0")
    Traceback (most recent call last):
    ValueError: Item 0 should have tokens of the model, 0 to 8. Found 9. Pass the tokenizer of ...
    """
    tokens = torch.as_tensor(ids)
    if vocabulary is None or not tokens.numel():
        return
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{where} should have tokens of the model, 0 to {vocabulary - 1}. Found {token}. "
                "Pass the tokenizer of the model, or a model that was made for this one."
            )


def pad_token_of(tokenizer: Any) -> int:
    """The pad token of a tokenizer, else its end token, else 0: any token that the model knows."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def lengths_of(batch: Mapping[str, Any]) -> Iterator[int]:
    """How many tokens the rows of a batch have, padding included, a number a side."""
    for _, side in batches_in(batch):
        if "input_ids" in side:
            yield side["input_ids"].shape[1]


def _columns(items: Sequence[Item], name: str) -> list[str]:
    """The columns that all items have."""
    for item in items:
        if not isinstance(item, Mapping) or not item:
            raise _no_item(f"{item!r:.60} of type {type(item).__name__}", name)
        if item.keys() != items[0].keys():
            apart = sorted(item.keys() ^ items[0].keys())
            raise ValueError(
                f"The items{_of(name)} of a batch should have the same columns. Found "
                f"{', '.join(apart)} in some of them alone. Add what is missing, or leave it out "
                "everywhere."
            )
    return [*items[0]]


def _row(item: Item, name: str, side: PaddingSide) -> dict[str, Tensor]:
    """The columns of an item as tensors, with a mask, and with the positions that a side needs."""
    if not item.keys() >= {*NEEDED}:
        raise _no_item(", ".join(item), name)
    row = {column: _tensor(value, _told(column, name)) for column, value in item.items()}
    for column in NEEDED:
        tokens = row[column]
        if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point():
            raise ValueError(
                f"{_told(column, name)} should be a row of token numbers, one or more. Found "
                f"{tokens.dtype} of shape {tuple(tokens.shape)}. Tokenize the sample, one an item."
            )
        row[column] = tokens.long()
    mask = row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    if mask.shape[:1] != row["input_ids"].shape:
        raise ValueError(
            f"{_told('attention_mask', name)} should be as long as `input_ids`. Found shape "
            f"{tuple(mask.shape)} beside {len(row['input_ids'])} tokens. Mark every token, or "
            "leave the mask out."
        )
    if side == "left":
        row.setdefault("position_ids", (mask.long().cumsum(0) - 1).clamp(min=0))
        if row["labels"].shape != row["input_ids"].shape:
            raise ValueError(
                f'`padding_side` should be "right" where `labels`{_of(name)} have a length of '
                "their own, as those of an encoder-decoder, whose decoder begins with the first "
                f'of them. Found "left", and {len(row["labels"])} labels beside '
                f"{len(row['input_ids'])} tokens. Leave `padding_side` out."
            )
        # Nothing predicts the first token, least of all the padding that is put before it.
        row["labels"] = row["labels"].clone()
        row["labels"][0] = IGNORED
    return row


def _tensor(value: Any, told: str) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{told} should be numbers: a list, an array or a tensor. Found "
            f"{value!r:.60} of type {type(value).__name__}. Encode the column, or leave it out."
        ) from error


def _placed(
    rows: Sequence[Mapping[str, Tensor]], column: str, fill: int, side: PaddingSide, told: str
) -> Tensor:
    """A column of a batch: padded if it is as long as the tokens or the labels, and stacked."""
    values = [row[column] for row in rows]
    shapes = [tuple(value.shape) for value in values]
    for lengths in ([row[needed].shape for row in rows] for needed in NEEDED):
        if all(shape[:1] == length for shape, length in zip(shapes, lengths, strict=True)):
            values = [_padded(value, max(lengths)[0], fill, side) for value in values]
            break
    if any(value.shape != values[0].shape for value in values):
        tokens = ", ".join(str(len(row["input_ids"])) for row in rows)
        raise ValueError(
            f"{told} should be as long as `input_ids` or `labels` in every item, or have one shape "
            f"in all of them. Found the shapes {', '.join(map(str, shapes))} beside {tokens} "
            "tokens. Bring it to one shape, leave it out, or pass a `data_collator` of your own."
        )
    return torch.stack(values)


def _padded(value: Tensor, length: int, fill: int, side: PaddingSide) -> Tensor:
    missing = length - len(value)
    ends = (0, missing) if side == "right" else (missing, 0)
    return F.pad(value, (*(0, 0) * (value.ndim - 1), *ends), value=fill)


def _no_item(found: str, name: str) -> ValueError:
    return ValueError(
        f"An item{_of(name)} should have {' and '.join(NEEDED)}, or be a pair of such items by the "
        f"names forget and retain. Found {found}. Tokenize the data, with labels that are "
        f"{IGNORED} outside of the answer; or pass a `data_collator` of your own."
    )


def _told(column: str, name: str) -> str:
    return f"`{column}`{_of(name)}"


def _of(name: str) -> str:
    return f" of `{name}`" if name else ""
