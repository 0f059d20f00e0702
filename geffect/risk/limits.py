"""What a model can read: so many tokens in a row, and so many different ones."""

import sys
from typing import Any

from .alignment import unwrapped

POSITIONS, VOCABULARY = "max_position_embeddings", "vocab_size"
"""What a configuration calls the limits."""


def positions_of(model: Any) -> int:
    """How many tokens a model can read in a row, as far as its configuration limits them.

    >>> positions_of(lambda input_ids: None) == sys.maxsize
    True
    """
    return limit_in(getattr(unwrapped(model), "config", None), POSITIONS) or sys.maxsize


def vocabulary_of(model: Any) -> int:
    """How many tokens a model knows, as far as its configuration tells.

    >>> vocabulary_of(lambda input_ids: None) == sys.maxsize
    True
    """
    return limit_in(getattr(unwrapped(model), "config", None), VOCABULARY) or sys.maxsize


def limit_in(config: Any, name: str) -> int | None:
    """A limit in a configuration, of a multimodal model in that of its text; None if it has none.

    >>> from types import SimpleNamespace
    >>> limit_in(SimpleNamespace(vocab_size=9), VOCABULARY)
    9
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, name, None)
    return limit if isinstance(limit, int) else None
