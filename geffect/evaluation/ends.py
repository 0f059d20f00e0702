"""Where texts end: the tokens that end an answer."""

from collections.abc import Collection
from typing import Any

from torch import nn

from geffect.risk.alignment import unwrapped


def ends_of(model: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """The tokens that end a text, as a model is configured, and a tokenizer's special ones.

    Chat templates end a turn with a token of their own, such as `<|im_end|>`, which is not always
    in the model's configuration. It is a special token of the tokenizer.

    >>> from types import SimpleNamespace
    >>> model = nn.Linear(1, 1)
    >>> model.config = SimpleNamespace(eos_token_id=[2, 7])
    >>> ends_of(model)
    (2, 7)
    """
    inner = unwrapped(model)
    configured = (getattr(inner, name, None) for name in ("generation_config", "config"))
    named = [getattr(config, "eos_token_id", None) for config in configured]
    tokens = [
        token
        for given in named
        if given is not None
        for token in (given if isinstance(given, list | tuple) else [given])
    ]
    if tokenizer is not None:
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        unknown = {tokenizer.unk_token_id, None}
        tokens += sorted({*tokenizer.all_special_ids, *marked} - unknown)
    return tuple(dict.fromkeys(tokens))


def chosen_ends(model: nn.Module, ends: Collection[int] | None) -> set[int]:
    """The tokens that end an answer: those given, or by default those of the model.

    >>> chosen_ends(nn.Linear(1, 1), [7])
    {7}
    """
    if ends is None:
        return set(ends_of(model))
    if isinstance(ends, str) or not isinstance(ends, Collection):
        raise TypeError(
            f"`ends` should be a list of tokens. Found {ends!r}. Pass, say, "
            "[tokenizer.eos_token_id]."
        )
    return set(ends)
