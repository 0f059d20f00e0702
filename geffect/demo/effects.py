"""What unlearning one sample or token more does, where a run reaches the level of forgetting."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from geffect import Recorder
from geffect.analysis import SAMPLES, TOKENS, as_columns, instances, tokens
from geffect.effects import direction
from geffect.sources import FORGET, RETAIN

from . import language_model as lm

READ_OUT = 3
"""How many answers are kept token by token."""


def keep_effects(
    recorder: Recorder,
    model: PreTrainedModel,
    batches: Mapping[str, Sequence[lm.Batch]],
    tokenizer: Any,
) -> None:
    """Keep the PG-effects of all forget samples, and of the tokens of a few, with the run."""
    directions = {risk: direction(model, batches[risk]) for risk in (FORGET, RETAIN)}
    samples = instances(model, batches[FORGET], directions, by="model")
    recorder.keep_table(SAMPLES, as_columns(samples))
    few = lm.rows(batches[FORGET][0], range(READ_OUT))
    recorder.keep_table(TOKENS, as_columns(tokens(model, [few], directions, tokenizer)))
