"""What is measured of a model that unlearns: at every step, and where it reaches a level."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from geffect.devices import swap

from . import language_model as lm
from .config import UnlearningConfig
from .data import Data
from .recognised import recognised, value_nll_of

Metrics = dict[str, Any]


def measure(model: PreTrainedModel, data: Data) -> Metrics:
    """Everything that the tables say of a model, but for relearning and recognition."""
    measured = {}
    for name, batches in data.batches.items():
        result = lm.evaluate(model, batches)
        measured[f"{name}_nll"] = result.nll
        if name in ("forget", "retain"):
            measured[f"{name}_es"] = result.extraction_strength
    return measured


def relearn(model: PreTrainedModel, data: Data, config: UnlearningConfig) -> list[float]:
    """NLL of each half of the forget set after a few steps on the other half."""
    forget = data.sets["forget"]
    half = len(forget["input_ids"]) // 2
    first, second = lm.rows(forget, range(half)), lm.rows(forget, range(half, 2 * half))
    return list(
        lm.relearn_nll(
            model,
            first,
            second,
            steps=config.relearning_steps,
            learning_rate=config.relearning_rate,
        )
    )


def probe(
    model: PreTrainedModel, data: Data, config: UnlearningConfig, *, attacked: bool
) -> Metrics:
    """What is recognised; where it is attacked, also after every attack."""
    text = None
    if attacked:
        size = min(config.retain_batch, len(data.sets["retain"]["input_ids"]))
        drawn = data.draws({"retain": size})
        text = (dict(batch["retain"]) for batch in drawn)
    return {**recognised(model, data.asked, data.tokenizer, config, text)}


def forgotten(model: PreTrainedModel, data: Data, levels: Mapping[str, float]) -> Metrics:
    """What tells how near a model is to the levels."""
    result = lm.evaluate(model, data.batches["forget"])
    found = {"forget_nll": result.nll, "forget_es": result.extraction_strength}
    if "value_nll" in levels:
        found["value_nll"] = value_nll_of(model, data.asked, data.tokenizer) or 0.0
    return found


def kept(model: PreTrainedModel, data: Data, *, outside: bool) -> Metrics:
    """What is left of the facts to keep, maybe also of authors of whom none is trained on."""
    names = ("retain", "retain_heldout_authors") if outside else ("retain",)
    return {f"{name}_nll": lm.nll(model, data.batches[name]) for name in names}


def between(
    model: PreTrainedModel,
    trained: Sequence[Tensor],
    earlier: Sequence[Tensor],
    data: Data,
    share: float,
) -> Metrics:
    """What is measured a share of the way from the model with its earlier parameters to this."""
    after = measure(model, data)
    swap(trained, earlier)
    before = measure(model, data)
    swap(trained, earlier)
    return {name: (1 - share) * before[name] + share * after[name] for name in after}
