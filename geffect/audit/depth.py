"""Depth: down to which layer a model has lost what the original knows.

What the blocks of a model put out is read where the tokens of an answer are predicted, and handed
to the original: to its next block (patching), or to its final norm and head (lens). Where the
original then still tells the answer, that model has kept it, whatever it says itself.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geffect.batch import Batch, on_device
from geffect.data.collate import Item
from geffect.devices import out_of_memory
from geffect.risk import undisturbed

from .blocks import blocks_of, check_tokenizers, outline
from .states import (
    BlockStates,
    ScoredItems,
    answer_log_p,
    before_scored,
    block_states,
    device_of,
    log_p_of,
    read_states,
    uncompiled,
    with_states,
)

__all__ = [
    "BlockStates",
    "DepthProbe",
    "block_states",
    "check_tokenizers",
    "unlearning_depth",
]

TAU = 0.05
"""By so many nats a token the retrained model has to fall short at a layer for that to count."""

AT_ONCE = 256
"""The tokens that are decoded at once: logits are large."""


class DepthProbe:
    """An original, asked what it still tells of its answers from the states of another model.

    It runs the original once over the items and keeps its block outputs at the scored positions,
    log p and, when asked for, log p by the lens: `nbytes` says how much memory that takes.

    - `original`: the model that knows the answers, a causal one whose layers are a list of modules.
    - `items`: questions with answers, as `geffect.data.examples.example` makes them. To score a
      part of each answer, such as a name, pass them `geffect.data.spans.narrowed`.
    - `batch_size`: the items of a forward.
    - `ends`: tokens that end an answer, and are not scored at its end; by default those of the
      model's configuration. `()` scores all labels.

    `source` is a model of the same architecture and tokenizer, or its `block_states` for the same
    items and batches. All models run in eval mode and stay as they were.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=3, n_head=1)
    >>> model = GPT2LMHeadModel(config)
    >>> probe = DepthProbe(model, [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    >>> probe.patched(model), probe.lens(model)
    (array([[0., 0., 0.]]), array([[0., 0., 0.]]))
    """

    def __init__(
        self,
        original: nn.Module,
        items: Sequence[Item],
        *,
        batch_size: int = 16,
        ends: Collection[int] | None = None,
    ) -> None:
        self.original = uncompiled(original)
        self._blocks = blocks_of(self.original)
        self._items = ScoredItems.of(self.original, items, batch_size, ends)
        self._own, self._log_p = read_states(self.original, self._items)
        self._own_lens: NDArray[np.float64] | None = None

    @property
    def nbytes(self) -> int:
        """The memory of the original's states: layers x tokens x width x bytes of a number."""
        return self._own.nbytes

    def patched(self, source: nn.Module | BlockStates) -> NDArray[np.float64]:
        """By how much the source's output of each block lowers log p, `Float64[item, layer]`.

        d(l) = log p by the original - log p by the original whose block l puts out the source's
        states where scored tokens are predicted; a mean over these, in nats. 0 at every layer for
        the original itself; NaN for an item without a scored token. A forward a layer.
        """
        states = self._states(source)
        rows = []
        with undisturbed(self.original, recompute=False), torch.no_grad():
            for layer, block in enumerate(self._blocks):
                found = [
                    self._run(block, batch, values[layer])
                    for batch, values in zip(self._items.batches, states.values, strict=True)
                ]
                rows.append(self._log_p - np.concatenate(found))
        return self._items.means(np.stack(rows))

    def lens(self, source: nn.Module | BlockStates) -> NDArray[np.float64]:
        """By how much the source's blocks tell less than the original's, `Float64[item, layer]`.

        d(l) = log p by the original's final norm and head of its own output of block l - the same
        of the source's; a mean over scored tokens, in nats. Costs one forward of the source.
        """
        states = self._states(source)
        if self._own_lens is None:
            self._own_lens = self._decoded(self._own)
            self._check_decoding(self._own_lens[-1])
        return self._items.means(self._own_lens - self._decoded(states))

    def decoder_swap(self, source: nn.Module | BlockStates) -> NDArray[np.float64]:
        """NLL by the original's final norm and head on the source's last block, `Float64[item]`.

        In nats, a mean over scored tokens. Low where a model knows the answer up to its last block,
        and has changed its head alone.
        """
        states = self._states(source)
        last = tuple(values[-1:] for values in states.values)
        own = BlockStates(tuple(v[-1:] for v in self._own.values), self._own.tokens, {})
        self._check_decoding(self._decoded(own)[0])
        return self._items.means(-self._decoded(BlockStates(last, states.tokens, {})))[:, 0]

    def _states(self, source: nn.Module | BlockStates) -> BlockStates:
        """The states of a source that fits the original."""
        own, given = self._own.outline, source
        found = given.outline if isinstance(given, BlockStates) else outline(given)
        apart = [name for name in own | found if own.get(name) != found.get(name)]
        if apart:
            raise ValueError(
                "`source` should be of the original's architecture and tokenizer, whose blocks "
                f"read its states. Found {apart[0]} {found.get(apart[0])} beside "
                f"{own.get(apart[0])}. Pass a model that was made of the original, or like it."
            )
        if not isinstance(given, BlockStates):
            return read_states(given, self._items)[0]
        if not self._items.same(given.tokens):
            raise ValueError(
                "`source` should be states of the items that the original was read on, in the same "
                "batches. Found others. Pass the same items and `batch_size` to `block_states`."
            )
        return given

    def _run(self, block: nn.Module, batch: Batch, states: Tensor) -> NDArray[np.float64]:
        """Log p of the scored tokens where a block puts out these states before them."""
        batch = on_device(batch, device_of(self.original))
        before = before_scored(batch)

        def patched(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[before] = states.to(hidden)
            return hidden

        return with_states(block, batch, patched, lambda: answer_log_p(self.original, batch))

    def _decoded(self, states: BlockStates) -> NDArray[np.float64]:
        """Log p of the tokens by the original's final norm and head, `Float64[layer, token]`."""
        with undisturbed(self.original, recompute=False), torch.no_grad():
            by_batch = [
                np.stack([self._decode(value, tokens) for value in values])
                for values, tokens in zip(states.values, states.tokens, strict=True)
            ]
        return np.concatenate(by_batch, axis=1)

    def _decode(self, states: Tensor, tokens: Tensor) -> NDArray[np.float64]:
        """What the original makes of states that stand in place of its last block's output.

        Norm and head look at each position by itself: each token is a row of one position.
        """
        tokens_in = {
            name: x[:1, :1] for name, x in self._items.batches[0].items() if name != "labels"
        }
        one = on_device(tokens_in, device_of(self.original))
        found = []
        for part, wanted in zip(states.split(AT_ONCE), tokens.split(AT_ONCE), strict=True):

            def put(hidden: Tensor, part: Tensor = part) -> Tensor:
                return part[:, None].to(hidden)

            try:
                logits = with_states(
                    self._blocks[-1], one, put, lambda: self.original(**one).logits
                )
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                raise self._no_decoder(f"`{error}`") from error
            if logits.shape[:2] != (len(part), 1):
                raise self._no_decoder(f"logits of shape {tuple(logits.shape)}")
            found.append(log_p_of(logits[:, 0], wanted))
        return np.concatenate(found) if found else np.zeros(0)

    def _check_decoding(self, last: NDArray[np.float64]) -> None:
        """The original's own last block, decoded, has to tell what the original tells."""
        dtype = next(self.original.parameters()).dtype
        bound = torch.finfo(dtype).eps ** 0.5 * np.maximum(1.0, np.abs(self._log_p))
        wrong = np.abs(last - self._log_p) > bound
        if wrong.any():
            gap = np.abs(last - self._log_p)[wrong].max()
            raise self._no_decoder(f"log p that is {gap:.3g} off")

    def _no_decoder(self, found: str) -> ValueError:
        return ValueError(
            "`original` should have a norm and a head behind its last block that look at each "
            f"position by itself. Found {found} from `{type(self.original).__name__}`. Leave the "
            "lens and the decoder swap out for it; `patched` needs none."
        )


def unlearning_depth(
    of_unlearned: NDArray[np.float64], of_retrained: NDArray[np.float64], *, tau: float = TAU
) -> NDArray[np.float64]:
    """UDS of every item, `Float64[item]`: 0 where it is intact, 1 where as gone as if never known.

    UDS = sum_l d_g clip(d_u / d_g, 0, 1) / sum_l d_g, over the layers where d_g > tau
    (arXiv 2605.24614). NaN where there is none: at no layer does the retrained model know less than
    the original; `np.isnan(...).sum()` counts these. It says nothing of a broken model, for which
    it is 1.

    - `of_unlearned`, `of_retrained`: d_u and d_g, of `DepthProbe.patched` or of `lens`.
    - `tau`: in nats a token.

    >>> of_retrained = np.array([[0.02, 0.4, 1.0, 2.0]])
    >>> of_unlearned = np.array([[0.3, 0.1, 1.5, -0.2]])
    >>> unlearning_depth(of_unlearned, of_retrained).round(6)
    array([0.323529])
    """
    u, g = np.asarray(of_unlearned, np.float64), np.asarray(of_retrained, np.float64)
    if u.shape != g.shape or g.ndim != 2:
        raise ValueError(
            "`of_unlearned` and `of_retrained` should have a row for each item and a column for "
            f"each layer, of one original. Found the shapes {u.shape} and {g.shape}. Take both "
            "from the same DepthProbe."
        )
    if not tau >= 0:
        raise ValueError(
            f"`tau` should be 0 or more, in nats a token. Found {tau}. Pass, say, {TAU}."
        )
    counted = g > tau
    share = np.divide(u, g, out=np.zeros_like(u), where=counted).clip(0, 1)
    weight = np.where(counted, g, 0.0)
    total = weight.sum(axis=1)
    found = np.divide(
        (share * weight).sum(axis=1), total, out=np.full(len(g), np.nan), where=total > 0
    )
    # A layer at which a model tells nothing that is a number is not left out in silence.
    return np.where(np.isnan(g).any(axis=1), np.nan, found)
