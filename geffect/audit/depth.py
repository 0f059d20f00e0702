"""Depth: down to which layer a model has lost what the original knows.

What the blocks of a model put out is read where the tokens of an answer are predicted, and handed
to the original: to its next block (patching), or to its final norm and head (lens). Where the
original then still tells the answer, that model has kept it, whatever it says itself.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geffect.batch import IGNORED, Batch, check_one_answer, on_device
from geffect.data.collate import Item, batched
from geffect.data.spans import without_end
from geffect.evaluation.ends import chosen_ends
from geffect.evaluation.tokens import bare, in_float64
from geffect.hooks import Hooks
from geffect.interrupts import put_back_after
from geffect.risk import label_logits, undisturbed
from geffect.risk.alignment import unwrapped

from .blocks import blocks_of, outline

TAU = 0.05
"""By so many nats a token the retrained model has to fall short at a layer for that to count."""

AT_ONCE = 256
"""The tokens that are decoded at once: logits are large."""


@dataclass(frozen=True)
class BlockStates:
    """What each block of a model puts out where scored tokens are predicted.

    - `values`: of each batch `Float[layer, token, width]`, on the CPU, in the type of the model.
    - `tokens`: of each batch the tokens that are predicted, `Int[token]`.
    - `outline`: what another model should have in common with this one.
    """

    values: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    outline: dict[str, object]

    @property
    def nbytes(self) -> int:
        """The memory that they take: layers x tokens x width x bytes of a number."""
        return sum(value.nbytes for value in self.values)


def block_states(
    model: nn.Module,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    ends: Collection[int] | None = None,
) -> BlockStates:
    """What the blocks of a model put out for the answers: one forward.

    So the model need not be in memory beside the original, whose `DepthProbe` takes the states. The
    parameters are those of `DepthProbe`.
    """
    return _read(model, _Spans.of(model, items, batch_size, ends))[0]


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
        self.original = _eager(original)
        self._blocks = blocks_of(self.original)
        self._spans = _Spans.of(self.original, items, batch_size, ends)
        self._own, self._log_p = _read(self.original, self._spans)
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
                    for batch, values in zip(self._spans.batches, states.values, strict=True)
                ]
                rows.append(self._log_p - np.concatenate(found))
        return self._spans.means(np.stack(rows))

    def lens(self, source: nn.Module | BlockStates) -> NDArray[np.float64]:
        """By how much the source's blocks tell less than the original's, `Float64[item, layer]`.

        d(l) = log p by the original's final norm and head of its own output of block l - the same
        of the source's; a mean over scored tokens, in nats. Costs one forward of the source.
        """
        states = self._states(source)
        if self._own_lens is None:
            self._own_lens = self._decoded(self._own)
            self._check_decoding(self._own_lens[-1])
        return self._spans.means(self._own_lens - self._decoded(states))

    def decoder_swap(self, source: nn.Module | BlockStates) -> NDArray[np.float64]:
        """NLL by the original's final norm and head on the source's last block, `Float64[item]`.

        In nats, a mean over scored tokens. Low where a model knows the answer up to its last block,
        and has changed its head alone.
        """
        states = self._states(source)
        last = tuple(values[-1:] for values in states.values)
        own = BlockStates(tuple(v[-1:] for v in self._own.values), self._own.tokens, {})
        self._check_decoding(self._decoded(own)[0])
        return self._spans.means(-self._decoded(BlockStates(last, states.tokens, {})))[:, 0]

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
            return _read(given, self._spans)[0]
        if not self._spans.same(given.tokens):
            raise ValueError(
                "`source` should be states of the items that the original was read on, in the same "
                "batches. Found others. Pass the same items and `batch_size` to `block_states`."
            )
        return given

    def _run(self, block: nn.Module, batch: dict[str, Tensor], states: Tensor) -> NDArray[Any]:
        """Log p of the scored tokens where a block puts out these states before them."""
        batch = on_device(batch, _device(self.original))
        before = _before(batch)

        def patch(_: nn.Module, args: Any, output: Any) -> Any:
            hidden = _hidden(output, batch).clone()
            hidden[before] = states.to(hidden)
            return _like(output, hidden)

        found: NDArray[Any] = _hooked(block, patch, lambda: _log_p(*_scored(self.original, batch)))
        return found

    def _decoded(self, states: BlockStates) -> NDArray[np.float64]:
        """Log p of the tokens by the original's final norm and head, `Float64[layer, token]`."""
        with undisturbed(self.original, recompute=False), torch.no_grad():
            by_batch = [
                np.stack([self._decode(value, tokens) for value in values])
                for values, tokens in zip(states.values, states.tokens, strict=True)
            ]
        return np.concatenate(by_batch, axis=1)

    def _decode(self, states: Tensor, tokens: Tensor) -> NDArray[Any]:
        """What the original makes of states that stand in place of its last block's output.

        Norm and head look at each position by itself: each token is a row of one position.
        """
        tokens_in = {
            name: x[:1, :1] for name, x in self._spans.batches[0].items() if name != "labels"
        }
        one = on_device(tokens_in, _device(self.original))
        found = []
        for part, wanted in zip(states.split(AT_ONCE), tokens.split(AT_ONCE), strict=True):

            def put(_: nn.Module, args: Any, output: Any, part: Tensor = part) -> Any:
                return _like(output, part[:, None].to(_hidden(output, one)))

            try:
                logits = _hooked(self._blocks[-1], put, lambda: self.original(**one).logits)
            except RuntimeError as error:
                raise self._no_decoder(f"`{error}`") from error
            if logits.shape[:2] != (len(part), 1):
                raise self._no_decoder(f"logits of shape {tuple(logits.shape)}")
            found.append(_log_p(logits[:, 0], wanted))
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


def check_tokenizers(source: Any, original: Any) -> None:
    """Refuse a source whose tokenizer numbers its tokens otherwise than that of the original.

    >>> class Words:
    ...     def __init__(self, *words): self.words = words
    ...     def get_vocab(self): return {word: i for i, word in enumerate(self.words)}
    >>> check_tokenizers(Words("a", "b"), Words("a", "c"))
    Traceback (most recent call last):
    ValueError: `source` should have the tokenizer of the original. ... Found 2 tokens ...
    """
    known, other = original.get_vocab(), source.get_vocab()
    if known != other:
        apart = {word for word in known.keys() | other.keys() if known.get(word) != other.get(word)}
        raise ValueError(
            "`source` should have the tokenizer of the original. Their states can be exchanged "
            f"where both read the same numbers. Found {len(apart)} tokens that only one has, or "
            "with another number. Leave depth out for this model."
        )


@dataclass(frozen=True)
class _Spans:
    """The items in batches, with the labels that are scored."""

    batches: tuple[dict[str, Any], ...]
    owners: NDArray[np.int64]  # of each scored token the number of its item
    count: int

    @classmethod
    def of(
        cls, model: nn.Module, items: Sequence[Item], size: int, ends: Collection[int] | None
    ) -> "_Spans":
        if not items:
            raise ValueError("`items` should be one or more. Found none. Pass some.")
        ended = chosen_ends(model, ends)
        kept = [
            {**item, "labels": without_end([int(x) for x in item["labels"]], ended)}
            for item in map(bare, items, count())
        ]
        batches = tuple(_taken(model, batch) for batch in batched(kept, size))
        for batch in batches:
            check_one_answer(batch, "a depth")
        scored = [int(n) for batch in batches for n in _before(batch).sum(dim=1)]
        return cls(batches, np.repeat(np.arange(len(items)), scored), len(items))

    def same(self, tokens: Sequence[Tensor]) -> bool:
        """Whether these are the tokens that are scored."""
        own = [_tokens(batch) for batch in self.batches]
        return len(own) == len(tokens) and all(map(torch.equal, own, tokens))

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of values `Float64[layer, token]` the mean of each item, `Float64[item, layer]`."""
        numbers = np.bincount(self.owners, minlength=self.count).astype(np.float64)
        sums = np.stack(
            [np.bincount(self.owners, weights=row, minlength=self.count) for row in values], axis=1
        )
        there = numbers[:, None] > 0
        return np.divide(sums, numbers[:, None], out=np.full_like(sums, np.nan), where=there)


def _read(model: nn.Module, spans: _Spans) -> tuple[BlockStates, NDArray[np.float64]]:
    """What the blocks of a model put out, and its own log p of the scored tokens."""
    model = _eager(model)
    blocks = blocks_of(model)
    values, log_p = [], []
    with undisturbed(model, recompute=False), torch.no_grad():
        for batch in spans.batches:
            states, own = _read_batch(model, blocks, on_device(batch, _device(model)))
            values.append(states.cpu())
            log_p.append(own)
    tokens = tuple(_tokens(batch) for batch in spans.batches)
    return BlockStates(tuple(values), tokens, outline(model)), np.concatenate(log_p)


def _read_batch(
    model: nn.Module, blocks: Sequence[nn.Module], batch: dict[str, Tensor]
) -> tuple[Tensor, NDArray[Any]]:
    seen: list[list[Tensor]] = [[] for _ in blocks]
    before = _before(batch)

    def keep(layer: int, _: nn.Module, args: Any, output: Any) -> None:
        seen[layer].append(_hidden(output, batch)[before])

    hooks = Hooks()

    def run() -> NDArray[Any]:
        for layer, block in enumerate(blocks):
            hooks.add(block.register_forward_hook, partial(keep, layer))
        return _log_p(*_scored(model, batch))

    log_p = put_back_after(run, hooks.remove)
    for block, outputs in zip(blocks, seen, strict=True):
        _check_once(block, len(outputs))
    return torch.stack([output for (output,) in seen]), log_p


def _hooked(block: nn.Module, hook: Callable[..., Any], run: Callable[[], Any]) -> Any:
    """What a run returns while a hook changes the output of a block, once."""
    hooks, outputs = Hooks(), []

    def counted(*call: Any) -> Any:
        outputs.append(hook(*call))
        return outputs[-1]

    def body() -> Any:
        hooks.add(block.register_forward_hook, counted)
        return run()

    found = put_back_after(body, hooks.remove)
    _check_once(block, len(outputs))
    return found


def _check_once(block: nn.Module, times: int) -> None:
    if times != 1:
        raise ValueError(
            "Each block of a model should run once in a forward, and call its hooks. Found "
            f"`{type(block).__name__}`, which did so {times} times. Leave depth out for this "
            "model; of a compiled one, pass the model that was compiled."
        )


def _hidden(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The states in the output of a block: it, or the first of several."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor) or hidden.shape[:-1] != batch["input_ids"].shape:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            "The output of a block should be states of shape (sample, position, width), or begin "
            f"with such. Found {shape} for {tuple(batch['input_ids'].shape)} tokens. Leave depth "
            "out for this model."
        )
    return hidden


def _like(output: Any, hidden: Tensor) -> Any:
    """The output of a block with other states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _before(batch: dict[str, Tensor]) -> Tensor:
    """The positions from which scored tokens are predicted, `Bool[sample, position]`."""
    before = torch.zeros_like(batch["labels"], dtype=torch.bool)
    before[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return before


def _tokens(batch: dict[str, Tensor]) -> Tensor:
    """The scored tokens, row by row."""
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORED]


def _scored(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and tokens of what is scored, row by row."""
    logits, labels = label_logits(model, batch)
    scored = labels != IGNORED
    return logits[scored], labels[scored]


def _log_p(logits: Tensor, tokens: Tensor) -> NDArray[Any]:
    """Log p of the tokens, in float64 from the logits on."""
    exact = in_float64(logits)
    found = exact.log_softmax(dim=-1).gather(1, tokens.to(exact.device)[:, None])
    return np.asarray(found[:, 0].cpu().numpy())


def _taken(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The batch, without a mask where the model takes none: padding is behind the answers."""
    taken = inspect.signature(unwrapped(model).forward).parameters
    named = "attention_mask" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return {name: x for name, x in batch.items() if named or name != "attention_mask"}


def _eager(model: nn.Module) -> nn.Module:
    """The model that was compiled, whose blocks call their hooks; any other one itself."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
