"""What `tiny` has, with models of one layer: a second one doubles what a test costs."""

from functools import partial

from tests.utils import tiny
from tests.utils.tiny import VOCABULARY, bart, batch, pairs, t5, translation

gpt2 = partial(tiny.gpt2, layers=1)
llama = partial(tiny.llama, layers=1)

__all__ = ["VOCABULARY", "bart", "batch", "gpt2", "llama", "pairs", "t5", "translation"]
