"""The likelihood of the tokens that are scored, and the risk that is a mean of it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geffect.batch import (
    IGNORED,
    Batch,
    Pair,
    batches_in,
    first_in_text,
    is_packed,
    labels_of,
    masks_in,
    original_of,
)
from geffect.beside import random_numbers_kept

from .alignment import predicts_next, unwrapped
from .dependence import look_at, without_cache
from .packing import look_apart
from .unseen import look_unseen


def token_log_probabilities(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p of every label, `Float[sample, position]`, and the mask of what is scored.

    Positions are those of the labels that the model predicts: all but the first for a causal model,
    which is not told what comes before it, and all for an encoder-decoder. In float32, or float64
    where the logits are, from the logits on; 0 where nothing is scored.

    - `model`: returns `.logits` of shape (sample, position, token) for `inputs_of` the batch.
    - `batch`: labels are -100 where a token is not scored. Of several answers it is the original.
    """
    logits, labels = label_logits(model, batch)
    return log_likelihood(logits, labels), labels != IGNORED


def label_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits for every label, `Float[sample, position, token]`, and the labels.

    Positions, `model` and `batch` are those of `token_log_probabilities`; the logits are in the
    type that the model returns.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> ids = torch.tensor([[0, 1, 2]])
    >>> logits, labels = label_logits(uniform, {"input_ids": ids, "labels": ids})
    >>> logits.shape, labels
    (torch.Size([1, 2, 4]), tensor([[1, 2]]))
    """
    labels = _predicted(model, batch, predicts_next(model))
    largest = _largest(labels)  # asked before the forward, which an accelerator is not waited for
    inputs = inputs_of(model, batch)
    unseen, apart = partial(look_unseen, labels=labels), partial(look_apart, batch=batch)
    look_at(unwrapped(model), inputs, unseen, apart)
    try:
        logits = getattr(model(**inputs), "logits", None)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        _check_runs_without_labels(model, inputs, batch, error)
        raise
    if logits is None:
        raise ValueError(
            f"`model` should return `.logits` of shape (sample, position, token). Found none from "
            f"`{type(unwrapped(model)).__name__}`. Pass a language model, or let yours return "
            "types.SimpleNamespace(logits=logits)."
        )
    logits = for_labels(model, logits)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            "`model` should return logits for each position of `labels`. Found them for "
            f"{tuple(logits.shape[:-1])} positions of {tuple(labels.shape)} that are predicted. "
            "Pass labels as long as the inputs, and a language model that puts no tokens of its "
            "own before them, as prompt tuning does; prefix tuning and other adapters do not."
        )
    if largest >= logits.shape[-1]:
        raise ValueError(
            f"`labels` should be tokens that the model knows, below {logits.shape[-1]}. Found "
            f"{largest}. Put {IGNORED} where a token is not scored; read the data with the "
            "tokenizer of the model."
        )
    return logits, labels


def for_labels(model: Any, logits: Tensor) -> Tensor:
    """Of logits at all positions, such as those of a reference, those that predict a label."""
    return logits[:, :-1] if predicts_next(model) else logits


def scored_tokens(model: Any, batch: Batch) -> Tensor:
    """Which tokens the model is scored on, the mask of `token_log_probabilities`, not run for it.

    >>> batch = {"labels": torch.tensor([[3, 5, -100]])}
    >>> scored_tokens(lambda input_ids: None, batch)  # nothing predicts the first
    tensor([[ True, False]])
    """
    return _predicted(model, batch, predicts_next(model)) != IGNORED


def inputs_of(model: Any, batch: Batch) -> dict[str, Any]:
    """What a model is called with: the batch without labels.

    An encoder-decoder makes the inputs of its decoder from the labels, where they are not given.
    Packed rows are run without a cache: with one, transformers lets an answer see those before it.
    """
    batch = original_of(batch)
    shape = tuple(labels_of(batch).shape)
    if not shape[0]:
        raise ValueError(
            f"A batch should have a row at least. Found none, in `labels` of shape {shape}. See "
            "whether a filter left nothing, and leave the batch out."
        )
    keeps_labels = not ("decoder_input_ids" in batch or predicts_next(model))
    further = without_cache(unwrapped(model)) if is_packed(batch) else {}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {**further, **inputs, **({"labels": labels_of(batch)} if keeps_labels else {})}


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label under the logits at its place, in float32 or finer; 0 for -100.

    >>> log_likelihood(torch.zeros(2, 4).bfloat16(), torch.tensor([3, -100]))
    tensor([-1.3863, -0.0000])
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2).to(at_least_float32(logits)),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return -losses.view_as(labels)


def token_mean(values: Tensor, scored: Tensor) -> Tensor:
    """The mean over all scored tokens of the batch: a long answer weighs more than a short one."""
    _check_scored(scored)
    return values.where(scored, torch.zeros_like(values)).sum() / scored.sum()


def sequence_sum(values: Tensor, scored: Tensor) -> Tensor:
    """The sum over the scored tokens of every sample, `Float[sample]`."""
    return values.where(scored, torch.zeros_like(values)).sum(dim=1)


def sequence_nll(model: Any, batch: Batch) -> Tensor:
    """The NLL of every answer, the sum over its tokens, in nats, `Float[sample]`.

    0 where a sample has none; a ValueError for a batch in which nothing is scored.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> ids = torch.tensor([[0, 1, 2]])
    >>> sequence_nll(uniform, {"input_ids": ids, "labels": ids})  # 2 log 4
    tensor([2.7726])
    """
    log_p, scored = token_log_probabilities(model, batch)
    _check_scored(scored)
    return -sequence_sum(log_p, scored)


def nll(model: Any, batch: Batch) -> Tensor:
    """The risk R: negative log-likelihood of the scored tokens, token mean, in nats per token.

    R = -(1/N) sum_i log p_i over the N labels that are not -100, in float32 or finer. For an
    encoder-decoder such as T5 that is the model's own loss; what others add to theirs, as
    ProphetNet does, is no part of it. Raises a ValueError for a model that is neither causal nor an
    encoder-decoder, for a batch in which nothing is scored, and for labels that are shifted.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> ids = torch.tensor([[0, 1, 2]])
    >>> nll(uniform, {"input_ids": ids, "labels": ids})  # log 4
    tensor(1.3863)
    """
    log_p, scored = token_log_probabilities(model, batch)
    return -token_mean(log_p, scored)


def check_answers(model: Any, pair: Pair) -> None:
    """Refuse a pair that has nothing to score on one of its sides, by the name of the side.

    >>> ids = torch.tensor([[1, 2]])
    >>> batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    >>> check_answers(lambda input_ids: None, {"forget": batch})
    Traceback (most recent call last):
    ValueError: `forget` should have an answer token: a label that is not -100, beyond the first ...
    """
    for side, batch in batches_in(pair):
        scored = scored_tokens(model, batch)
        if not scored.any():
            raise _without_answer(side, len(scored))


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The type of a tensor, or float32 if that is finer."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_runs_without_labels(
    model: Any, inputs: Mapping[str, Any], batch: Batch, error: Exception
) -> None:
    """Say so where labels are all that the forward which failed was missing."""
    given = {**inputs, "labels": labels_of(batch)}
    if not _runs(model, given) or _runs(model, inputs):
        return
    raise ValueError(
        "`model` should return logits without being given `labels`: the risk takes likelihoods "
        f"from them itself. Found `{type(unwrapped(model)).__name__}`, whose forward fails without "
        f"labels, by {type(error).__name__}, and not with them. Let it take labels=None, and leave "
        "its own loss out then."
    ) from error


def _runs(model: Any, inputs: Mapping[str, Any]) -> bool:
    try:
        with torch.no_grad(), random_numbers_kept():
            model(**inputs)
    except Exception:
        return False
    return True


def _predicted(model: Any, batch: Batch, is_next: bool) -> Tensor:
    batch = original_of(batch)
    labels = labels_of(batch)
    if labels.ndim != 2:
        raise ValueError(
            "`labels` should be tokens of shape (sample, position). Found shape "
            f"{tuple(labels.shape)} for `{type(unwrapped(model)).__name__}`. The risk of other "
            "models than language models is yours to compute: pass it as a loss."
        )
    others = labels[(labels < 0) & (labels != IGNORED)]
    if len(others):
        raise ValueError(
            f"`labels` should be tokens, and {IGNORED} where a token is not scored. Found "
            f"{int(others[0])}, as in code that passes it as `ignore_index`. Put {IGNORED} there."
        )
    name = "attention_mask" if is_next else "decoder_attention_mask"
    _check_read(labels, batch, name)
    if batch.get(name) is None:
        _check_unpadded(labels, name, _padding_token(model))
    if not is_next:
        return labels
    if _are_shifted(labels, batch.get("input_ids")):
        raise ValueError(
            "`labels` should stand at their own tokens, as in `input_ids`: the risk shifts them. "
            "Found labels that are each the next token, shifted already. Pass a copy of "
            "`input_ids` with -100 where a token is not scored."
        )
    return labels.masked_fill(first_in_text(batch), IGNORED)[:, 1:]


def _check_read(labels: Tensor, batch: Batch, name: str) -> None:
    """Refuse labels in padding: where a mask hides both a token and the one that predicts it.

    One hidden token behind an answer may be its end, where a tokenizer pads with that.
    """
    for mask in masks_in(batch, name):
        if mask.shape != labels.shape:
            continue
        hidden = (mask == 0).to(labels.device)
        padding = (labels != IGNORED)[:, 1:] & hidden[:, 1:] & hidden[:, :-1]
        if padding.any():
            raise ValueError(
                f"`labels` should be {IGNORED} where `{name}` hides the tokens: padding is no "
                f"answer. Found {int(padding.sum())} labels in padding. Put {IGNORED} there, as "
                "`geffect.data.collate.collate` does."
            )


def _check_unpadded(labels: Tensor, name: str, token: int | None) -> None:
    """Refuse labels that are the token of padding, next to another one up to an end of the row.

    A single one may be the end of an answer, where a tokenizer pads with that.
    """
    if token is None:
        return
    is_token = (labels == token).long()
    behind, before = is_token.flip(1).cumprod(1).flip(1), is_token.cumprod(1)
    padding = behind[:, :-1] & behind[:, 1:] | before[:, :-1] & before[:, 1:]
    if padding.any():
        raise ValueError(
            f"`labels` should be {IGNORED} in padding, which is no answer. Found "
            f"{int(padding.sum())} that are its token, {token}, next to another one at an end of "
            f"their row, and no `{name}`. Put {IGNORED} there, as `geffect.data.collate.collate` "
            f"does; or pass a `{name}` of ones, if they are answers."
        )


def _padding_token(model: Any) -> int | None:
    config = getattr(unwrapped(model), "config", None)
    of_text = getattr(config, "get_text_config", lambda: config)()
    return getattr(of_text, "pad_token_id", None)


def _largest(labels: Tensor) -> int:
    return int(labels.max()) if labels.numel() else IGNORED


def _are_shifted(labels: Tensor, tokens: Tensor | None) -> bool:
    """Whether every label is the next token, and one of them not its own."""
    if tokens is None or tokens.shape != labels.shape:
        return False
    scored = labels[:, :-1] != IGNORED
    own, following = labels[:, :-1] == tokens[:, :-1], labels[:, :-1] == tokens[:, 1:]
    return bool((scored & ~own).any() & (following | ~scored).all())


def _check_scored(scored: Tensor) -> None:
    if not scored.any():
        raise _without_answer("batch", len(scored))


def _without_answer(name: str, samples: int) -> ValueError:
    return ValueError(
        f"`{name}` should have an answer token: a label that is not -100, beyond the first "
        f"position where a causal model is asked. Found none in {samples} samples. Mark the "
        "answers in the labels; see whether they were cut off."
    )
