"""States: what the blocks of a model put out where the tokens of an answer are predicted.

They are read in one forward, and put in place of what a block of another model puts out.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

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

Found = TypeVar("Found")


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
    return read_states(model, ScoredItems.of(model, items, batch_size, ends))[0]


@dataclass(frozen=True)
class ScoredItems:
    """The items in batches, with the labels that are scored."""

    batches: tuple[dict[str, Any], ...]
    owners: NDArray[np.int64]  # of each scored token the number of its item
    count: int

    @classmethod
    def of(
        cls, model: nn.Module, items: Sequence[Item], size: int, ends: Collection[int] | None
    ) -> "ScoredItems":
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
        scored = [int(n) for batch in batches for n in before_scored(batch).sum(dim=1)]
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


def read_states(model: nn.Module, asked: ScoredItems) -> tuple[BlockStates, NDArray[np.float64]]:
    """What the blocks of a model put out, and its own log p of the scored tokens."""
    model = uncompiled(model)
    blocks = blocks_of(model)
    values, log_p = [], []
    with undisturbed(model, recompute=False), torch.no_grad():
        for batch in asked.batches:
            states, own = _read_batch(model, blocks, on_device(batch, device_of(model)))
            values.append(states.cpu())
            log_p.append(own)
    tokens = tuple(_tokens(batch) for batch in asked.batches)
    return BlockStates(tuple(values), tokens, outline(model)), np.concatenate(log_p)


def _read_batch(
    model: nn.Module, blocks: Sequence[nn.Module], batch: dict[str, Tensor]
) -> tuple[Tensor, NDArray[Any]]:
    seen: list[list[Tensor]] = [[] for _ in blocks]
    before = before_scored(batch)

    def keep(layer: int, _: nn.Module, args: Any, output: Any) -> None:
        seen[layer].append(_hidden(output, batch)[before])

    hooks = Hooks()

    def run() -> NDArray[Any]:
        for layer, block in enumerate(blocks):
            hooks.add(block.register_forward_hook, partial(keep, layer))
        return answer_log_p(model, batch)

    log_p = put_back_after(run, hooks.remove)
    for block, outputs in zip(blocks, seen, strict=True):
        _check_once(block, len(outputs))
    return torch.stack([output for (output,) in seen]), log_p


def with_states(
    block: nn.Module,
    batch: Batch,
    change: Callable[[Tensor], Tensor],
    run: Callable[[], Found],
) -> Found:
    """What a run on a batch returns while the states that a block puts out are changed."""
    hooks, outputs = Hooks(), []

    def put(_: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(_like(output, change(_hidden(output, batch))))
        return outputs[-1]

    def body() -> Found:
        hooks.add(block.register_forward_hook, put)
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


def _hidden(output: Any, batch: Batch) -> Tensor:
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


def before_scored(batch: Batch) -> Tensor:
    """The positions from which scored tokens are predicted, `Bool[sample, position]`."""
    before = torch.zeros_like(batch["labels"], dtype=torch.bool)
    before[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return before


def _tokens(batch: dict[str, Tensor]) -> Tensor:
    """The scored tokens, row by row."""
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORED]


def answer_log_p(model: nn.Module, batch: Batch) -> NDArray[np.float64]:
    """A model's log p of the scored tokens, row by row."""
    logits, labels = label_logits(model, batch)
    scored = labels != IGNORED
    return log_p_of(logits[scored], labels[scored])


def log_p_of(logits: Tensor, tokens: Tensor) -> NDArray[np.float64]:
    """Log p of the tokens, in float64 from the logits on."""
    exact = in_float64(logits)
    found = exact.log_softmax(dim=-1).gather(1, tokens.to(exact.device)[:, None])
    return np.asarray(found[:, 0].cpu().numpy())


def _taken(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The batch, without a mask where the model takes none: padding is behind the answers."""
    taken = inspect.signature(unwrapped(model).forward).parameters
    named = "attention_mask" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return {name: x for name, x in batch.items() if named or name != "attention_mask"}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that was compiled, whose blocks call their hooks; any other one itself."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies."""
    return next(model.parameters()).device
