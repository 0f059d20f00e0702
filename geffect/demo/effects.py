"""What unlearning one sample or token more does, where a run reaches the level of forgetting."""

from typing import TYPE_CHECKING

from transformers import LlamaForCausalLM

from geffect import Recorder
from geffect.analysis import SAMPLES, TOKENS, as_columns, instances, tokens
from geffect.effects import direction
from geffect.sources import FORGET, RETAIN

from . import language_model as lm

if TYPE_CHECKING:
    from .unlearning import Data

READ_OUT = 3
"""How many answers are kept token by token."""


def keep_effects(recorder: Recorder, model: LlamaForCausalLM, data: "Data") -> None:
    """Keep the PG-effects of all forget samples, and of the tokens of a few, with the run."""
    directions = {risk: direction(model, data.batches[risk]) for risk in (FORGET, RETAIN)}
    samples = instances(model, data.batches[FORGET], directions, by="model")
    recorder.keep(SAMPLES, as_columns(samples))
    few = lm.rows(data.forget, range(READ_OUT))
    recorder.keep(TOKENS, as_columns(tokens(model, [few], directions, data.tokenizer)))
