"""What a batch is, what a pair of batches is, and where its answers are."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask`, `labels`, each (sample, position); label -100 is not scored."""

Pair = Mapping[str, Batch]
"""A batch of each side: {"forget": Batch, "retain": Batch}. A side may hold a batch of each of
several answers, {"original": Batch, "alternate": Batch}: its risk is that of the original."""

IGNORED = -100

_ENDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
"""What kernels for rows without padding call the ends of the texts in all rows."""

ORIGINAL = "original"
"""Of several answers in a side the one whose risk is that of the side."""


def original_of(batch: Mapping[str, Any]) -> Batch:
    """The batch that the risk of a side is of: itself, or the original of several answers.

    >>> original_of({"original": {"labels": 1}, "alternate": {"labels": 2}})
    {'labels': 1}
    """
    found: Batch = batch.get(ORIGINAL, batch)
    return found


def batches_in(side: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Batch]]:
    """The batches of a side or a pair by their names; one inside of a side is `forget.alternate`.

    >>> pair = {"forget": {"original": {"labels": 1}, "alternate": {"labels": 2}}}
    >>> dict(batches_in(pair))
    {'forget.original': {'labels': 1}, 'forget.alternate': {'labels': 2}}
    """
    # What is by names inside of a batch is a mask for each kind of layer.
    if "labels" in side or not any(isinstance(inside, Mapping) for inside in side.values()):
        yield name, side
        return
    for inner, inside in side.items():
        yield from batches_in(inside, f"{name}.{inner}" if name else inner)


def side_of(pair: Mapping[str, Any], name: str) -> Batch:
    """The batch of a side, or of one inside of a side, `forget.alternate`.

    >>> pair = {"forget": {"original": {"labels": 1}, "alternate": {"labels": 2}}}
    >>> side_of(pair, "forget.alternate")
    {'labels': 2}
    """
    outer, _, inner = name.partition(".")
    found = pair.get(name, pair.get(outer, {}).get(inner))
    if not isinstance(found, Mapping):
        sides = ", ".join(side or "one batch" for side, _ in batches_in(pair)) if pair else "none"
        raise ValueError(
            f"The batches should be of the sides that are asked for, `{name}` among them. Found "
            f"{sides}. Pass a batch of each side by its name; a side with several "
            f'answers is such as {{"{ORIGINAL}": ..., "{inner or "alternate"}": ...}}.'
        )
    return found


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch, or pair, with its tensors on a device; what is no tensor stays as it is."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return on_device(value, device)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in batch.items()}


def labels_of(batch: Batch) -> Tensor:
    """The labels `Int64[sample, position]`; an error if there are none.

    >>> labels_of({"labels": torch.tensor([[-100, 5]], dtype=torch.int32)}).dtype
    torch.int64
    """
    batch = original_of(batch)
    if "labels" not in batch:
        raise ValueError(
            "`batch` should have the key `labels`, with -100 where a token is not scored, or "
            f"several answers, one of them the `{ORIGINAL}`. Found the keys {', '.join(batch)}. "
            "Add labels that mark the answer tokens."
        )
    labels = batch["labels"]
    is_whole = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex()
    )
    if not is_whole or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else f"`{type(labels).__name__}`"
        raise TypeError(
            "`labels` should be a tensor of whole numbers, a token for each position. Found "
            f"{kind}. Pass `input_ids` with -100 where a token is not scored, padded to one length."
        )
    return labels.long()


def masks_in(batch: Mapping[str, Any], name: str = "attention_mask") -> Iterator[Tensor]:
    """The masks of a batch: one, or one for each kind of layer by its name, or none.

    >>> full, sliding = torch.ones(2)
    >>> [*masks_in({"attention_mask": {"full_attention": full, "sliding_attention": sliding}})]
    [tensor(1.), tensor(1.)]
    """
    found = batch.get(name)
    for mask in found.values() if isinstance(found, Mapping) else [found]:
        if isinstance(mask, Tensor):
            yield mask
        elif mask is not None:
            raise TypeError(
                f"`{name}` should be a tensor, or a tensor for each kind of layer. Found "
                f"`{type(mask).__name__}`, which does not tell where texts begin. Leave it out, "
                "and pass `position_ids` that begin anew where texts are packed."
            )


def begins_anew(positions: Tensor) -> Tensor:
    """Where positions that count the tokens of a text fall back, `Bool[..., position]`.

    >>> begins_anew(torch.tensor([0, 1, 2, 0, 1]))
    tensor([False, False, False,  True, False])
    """
    fallen = positions[..., 1:] < positions[..., :-1]
    return torch.cat([torch.zeros_like(fallen[..., :1]), fallen], dim=-1)


def texts_in(batch: Mapping[str, Any]) -> Tensor:
    """The number of the text that each token is of, in its row, `Int[sample, position]`.

    Texts are told by `position_ids` that begin anew, by their numbers in `seq_idx` or in the mask,
    by a mask of (.., position, position) in which a token sees none before it, or by their ends in
    `cu_seq_lens_q`; a row without any of these is one text.

    >>> two_texts = {"position_ids": torch.tensor([[0, 1, 0, 1]])}
    >>> texts_in({"labels": torch.tensor([[5, 6, 7, 8]]), **two_texts})
    tensor([[0, 0, 1, 1]])
    """
    return _begins(original_of(batch)).cumsum(dim=-1)


def first_in_text(batch: Mapping[str, Any]) -> Tensor:
    """The first token of each text, `Bool[sample, position]`: no token of its text predicts it.

    Of a row that is padded on the left it is the first one that its mask shows.

    >>> labels, mask = torch.tensor([[-100, 6, 7]]), torch.tensor([[0, 1, 1]])
    >>> first_in_text({"labels": labels, "attention_mask": mask})
    tensor([[ True,  True, False]])
    """
    batch = original_of(batch)
    first = _begins(batch)
    first[:, :1] = True
    for mask in masks_in(batch):
        if mask.shape == first.shape:
            shown = mask > 0
            first |= (shown & (shown.cumsum(dim=1) == 1)).to(first.device)
    return first


def _begins(batch: Batch) -> Tensor:
    """Where a text begins behind another one in its row, `Bool[sample, position]`."""
    labels = labels_of(batch)
    begins = torch.zeros_like(labels, dtype=torch.bool)
    masks = [*masks_in(batch)]
    flat = [mask.to(labels.device) for mask in masks if mask.shape == labels.shape]
    positions = batch.get("position_ids")
    if positions is not None and positions.shape[-1] == labels.shape[-1]:
        # Of several counts, as for images, the first is that of the text or of time.
        counts = (positions[0] if positions.ndim > 2 else positions).to(labels.device)
        begins |= begins_anew(counts)
        if positions.ndim <= 2 and not masks:  # then attention goes by them: a text counts by one
            begins[:, 1:] |= counts[..., 1:] != counts[..., :-1] + 1
        for mask in flat:
            begins &= mask > 0  # padding has positions too
    for mask in flat:
        before = _last_positive(mask)[:, :-1]
        begins[:, 1:] |= (mask[:, 1:] > 0) & (before > 0) & (mask[:, 1:] != before)
    numbers = batch.get("seq_idx")
    if numbers is not None and numbers.shape == labels.shape:
        begins[:, 1:] |= (numbers[:, 1:] != numbers[:, :-1]).to(labels.device)
    of_pairs = [x for x in masks if x.ndim > 2 and x.shape[-2:] == labels.shape[-1:] * 2]
    if of_pairs:
        # Layers that see a window or a chunk of the text have masks of their own.
        alone = [_sees_none_before(mask)[:, 1:].to(labels.device) for mask in of_pairs]
        begins[:, 1:] |= torch.stack(torch.broadcast_tensors(*alone)).all(dim=0)
    for ends in (batch[name] for name in _ENDS if batch.get(name) is not None):
        inner = ends.flatten().long().to(labels.device)
        begins.view(-1)[inner[(inner > 0) & (inner < labels.numel())]] = True
    return begins


def _last_positive(numbers: Tensor) -> Tensor:
    """The last number above zero up to each position: padding may lie between two texts."""
    places = torch.arange(numbers.shape[1], device=numbers.device)
    last = torch.where(numbers > 0, places, 0).cummax(dim=1).values
    return numbers.gather(1, last)


def behind_first(scored: Tensor, batch: Mapping[str, Any], count: int) -> Tensor:
    """Which scored tokens stand behind the first `count` of their answer.

    - `scored`: `Bool[sample, position]`; its last position is that of the labels.

    >>> batch = {"labels": torch.tensor([[-100, 5, 6, 7]])}
    >>> behind_first(batch["labels"] != -100, batch, 1)
    tensor([[False, False,  True,  True]])
    """
    if not count:
        return scored
    text = texts_in(batch)[:, -scored.shape[1] :]
    so_far = scored.cumsum(dim=1)
    begins = torch.ones_like(scored)
    begins[:, 1:] = text[:, 1:] != text[:, :-1]
    of_earlier = (so_far - scored.long()).masked_fill(~begins, 0).cummax(dim=1).values
    return scored & (so_far - of_earlier > count)


def _sees_none_before(mask: Tensor) -> Tensor:
    """Where the mask of a token hides all before it, `Bool[sample, position]`, in the first head.

    What is added to scores hides by large negative numbers.
    """
    seen = mask > -1000 if mask.is_floating_point() else mask != 0
    first = seen.reshape(len(seen), -1, *seen.shape[-2:])[:, 0]
    return ~first.tril(-1).any(dim=-1)


TOLD_BY = "positions that begin anew, numbers or ends of texts, or the mask"
"""How `texts_in` tells texts, for errors."""


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a row holds several answers, as rows without padding do.

    >>> labels, positions = torch.tensor([[-100, 5, -100, 6]]), torch.tensor([[0, 1, 0, 1]])
    >>> is_packed({"labels": labels}), is_packed({"labels": labels, "position_ids": positions})
    (False, True)
    """
    text, scored = texts_in(batch), labels_of(batch) != IGNORED
    last = text.masked_fill(~scored, -1).amax(dim=-1)
    first = text.masked_fill(~scored, text.shape[-1]).amin(dim=-1)
    return bool((first < last).any())


def check_one_answer(batch: Mapping[str, Any], whose: str) -> None:
    """Refuse rows of several answers where each row counts as one."""
    if is_packed(batch):
        raise ValueError(
            f"A batch should have one answer a row for {whose}. Found rows with several, told "
            f"apart by {TOLD_BY}. Pass an answer a row, padded as `geffect.data.collate.collate` "
            "does it; means over tokens, such as `nll`, GA, WGA and TNPO, take packed rows."
        )
