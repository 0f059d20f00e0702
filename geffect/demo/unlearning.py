"""One unlearning run of the study: a method in a variant, recorded, up to equal forgetting."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from geffect import Recorder
from geffect.objectives import SharedForward, nll

from . import language_model as lm
from .corpus import Corpus
from .effects import keep_effects
from .methods import METHODS, VARIANTS
from .recipe import (
    CURVE_EVERY,
    FORGET_BATCH,
    MOST_STEPS,
    PLAIN_STEPS,
    RETAIN_BATCH,
    STEPS_BEYOND,
)

Measured = dict[str, float]


@dataclass(frozen=True)
class Data:
    """The encoded facts of one seed, by what they are for."""

    batches: Mapping[str, list[lm.Batch]]
    forget: lm.Batch
    retain: lm.Batch
    tokenizer: Tokenizer

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer) -> "Data":
        """All sets of a corpus."""
        sets = {
            "forget": corpus.forget,
            "retain": corpus.retain,
            "retain_heldout_authors": corpus.retain_heldout_authors,
            "world": corpus.world,
            "forget_paraphrase": corpus.forget_paraphrases,
        }
        encoded = {name: lm.encode(tokenizer, facts) for name, facts in sets.items()}
        batches = {name: lm.by_length(batch) for name, batch in encoded.items()}
        return cls(batches, encoded["forget"], encoded["retain"], tokenizer)

    def pairs(self, seed: int) -> Iterator[dict[str, lm.Batch]]:
        """Batches of both sides without end, the same for every method and variant of a seed."""
        order = torch.Generator().manual_seed(seed)
        forget, retain = (
            _draws(batch, size, order)
            for batch, size in ((self.forget, FORGET_BATCH), (self.retain, RETAIN_BATCH))
        )
        while True:
            yield {"forget": next(forget), "retain": next(retain)}


def unlearn(
    model: LlamaForCausalLM,
    data: Data,
    method: str,
    variant: str,
    seed: int,
    level: float,
    path: Path,
    report: Callable[[int, float], None],
) -> dict[str, Any]:
    """Unlearn until the forget NLL reaches `level`, recording every step into `path`.

    `report(step, forget_nll)` is called after every step. Returns what summary.json says of a run,
    with the curve of forget and retain NLL. What is measured at the level is interpolated linearly
    between the two steps around the first crossing; relearning starts from the step after it.
    """
    reference = copy.deepcopy(model)
    setup = VARIANTS[variant]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setup.learning_rate, weight_decay=0.0, fused=True
    )
    rectifier = setup.rectifier(model, optimizer)
    pairs = data.pairs(seed)
    forget = [_forget_nll(model, data)]
    curve = [{"step": 0, "forget_nll": forget[0], "retain_nll": _retain_nll(model, data)}]
    crossing: dict[str, Any] | None = None
    previous = _copied(model)
    least = PLAIN_STEPS if variant == "plain" else 0
    metadata = {"method": method, "variant": variant, "seed": seed, "level": level}
    with Recorder(model, path, metadata=metadata, update=True, overwrite=True) as recorder:
        for batch in pairs:
            shared = SharedForward(model)
            risks: dict[str, Any] = {name: nll(shared, rows) for name, rows in batch.items()}
            objective = METHODS[method](shared, batch, reference)
            recorder.backward(**objective, **risks, rectifier=rectifier)
            optimizer.step()
            optimizer.zero_grad()
            forget.append(_forget_nll(model, data))
            step = len(forget) - 1
            report(step, forget[-1])
            if crossing is None and forget[-1] >= level:
                crossing = _at_level(model, previous, data, forget, level)
                if variant == "plain":
                    keep_effects(recorder, model, data.batches, data.tokenizer)
                least = max(least, step + STEPS_BEYOND)
            last = step == MOST_STEPS or (crossing is not None and step >= least)
            if last or step % CURVE_EVERY == 0:
                retain = _retain_nll(model, data)
                curve.append({"step": step, "forget_nll": forget[-1], "retain_nll": retain})
            if last:
                break
            previous = _copied(model)
    rectifier.detach()
    return {
        "method": method,
        "variant": variant,
        "seed": seed,
        "learning_rate": setup.learning_rate,
        "steps": len(forget) - 1,
        "reached_level": crossing is not None,
        "at_level": crossing,
        "curve": {name: [point[name] for point in curve] for name in curve[0]},
    }


def measure(model: LlamaForCausalLM, data: Data) -> Measured:
    """Everything that the table of equal forgetting says of a model, but for relearning."""
    measured = {}
    for name, batches in data.batches.items():
        result = lm.evaluate(model, batches)
        measured[f"{name}_nll"] = result.nll
        if name in ("forget", "retain"):
            measured[f"{name}_es"] = result.extraction_strength
    return measured


def relearn(model: LlamaForCausalLM, data: Data) -> list[float]:
    """NLL of each half of the forget set after a few steps on the other half."""
    half = len(data.forget["input_ids"]) // 2
    first, second = lm.rows(data.forget, range(half)), lm.rows(data.forget, range(half, 2 * half))
    return list(lm.relearn_nll(model, first, second))


def _copied(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _forget_nll(model: LlamaForCausalLM, data: Data) -> float:
    return lm.nll(model, data.batches["forget"])


def _retain_nll(model: LlamaForCausalLM, data: Data) -> float:
    return lm.nll(model, data.batches["retain"])


def _at_level(
    model: LlamaForCausalLM,
    previous: dict[str, torch.Tensor],
    data: Data,
    forget: list[float],
    level: float,
) -> dict[str, Any]:
    below, above = forget[-2:]
    share = (level - below) / (above - below)
    earlier = copy.deepcopy(model)
    earlier.load_state_dict(previous)
    before, after = measure(earlier, data), measure(model, data)
    interpolated = {name: (1 - share) * before[name] + share * after[name] for name in after}
    return {
        "step": len(forget) - 2 + share,
        **interpolated,
        "relearn_nll": relearn(model, data),
    }


def _draws(batch: lm.Batch, size: int, generator: torch.Generator) -> Iterator[lm.Batch]:
    """Batches of `size` rows, without replacement until too few are left, then from the start."""
    while True:
        order = torch.randperm(len(batch["input_ids"]), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                yield lm.rows(batch, index)
