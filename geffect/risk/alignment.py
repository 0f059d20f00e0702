"""Which label the logits at a position predict, which models do not agree on."""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from geffect.codes import coded

_OTHER_HEADS = re.compile(r"For(MaskedLM|PreTraining|TokenClassification)$|^XLNetLMHeadModel$")


def predicts_next(model: Any) -> bool:
    """Whether the logits at a position predict the label of the next one, as in a causal model.

    False for an encoder-decoder, such as T5 or BART: it shifts the labels itself, so that the
    logits at a position predict the label there. A model without a `config` counts as causal.
    Raises a ValueError for a model that sees the token it is asked for, such as BERT.

    >>> predicts_next(lambda input_ids: None)
    True
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if config is None:
        return True
    if getattr(config, "is_encoder_decoder", False):
        return False
    should = (
        "`model` should be a causal language model, or an encoder-decoder that shifts labels "
        f"itself. Found `{type(model).__name__}`,"
    )
    if _OTHER_HEADS.search(type(model).__name__):
        raise ValueError(
            f"{should} whose logits are not those of the next token. Load the checkpoint of a "
            "causal model by `AutoModelForCausalLM`, or of an encoder-decoder by "
            "`AutoModelForSeq2SeqLM`."
        )
    if _looks_ahead(model, config):
        raise ValueError(
            f"{should} whose attention looks ahead at the tokens to predict. Load a causal model, "
            "or make this one a decoder: `is_decoder=True` in its config, of XLM `causal=True`."
        )
    return True


def check_loaded(model: Any, missing: Collection[str], source: object) -> None:
    """Refuse a model whose risk is not that of what was saved.

    `missing` are the weights that the source does not hold, and that were drawn at random.

    >>> check_loaded(nn.Linear(2, 1), ["bias"], "folder")
    Traceback (most recent call last):
    ValueError: `folder` should hold every weight of `Linear`. Found none for 1 of them, ...
    """
    if missing:
        raise ValueError(
            f"`{source}` should hold every weight of `{type(model).__name__}`. Found none for "
            f"{len(missing)} of them, the first of them {sorted(missing)[:3]}: they would be "
            "random, as the head of a model that was saved without it. Save all of it, by "
            "`save_pretrained` of the model with its head, or of the adapter."
        )
    predicts_next(model)


def check_differentiable(model: nn.Module, source: object) -> None:
    """Refuse a model that is trained whole where some of its weights are codes."""
    codes = next(coded(model), None)
    if codes is not None:
        raise ValueError(
            f"`{source}` should hold weights that have gradients. Found {codes} in "
            f"`{type(model).__name__}`, which is quantised. Save it dequantised "
            "(`model.dequantize()`), or name an adapter on it."
        )


def unwrapped(model: Any) -> Any:
    """The model without what stands around it: DDP, a compiled form, an adapter, `SharedForward`.

    >>> model = nn.Linear(2, 1)
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and not hasattr(model, "config"):
            model = model.module
        else:
            return model


def _looks_ahead(model: nn.Module, config: Any) -> bool:
    """Whether the attention of a model that could be causal is not.

    A family such as BERT knows both directions, and says so in its layers; any other model of
    today's transformers can be told to look ahead by its config.
    """
    if False in (getattr(config, "is_causal", True), getattr(config, "causal", True)):
        return True
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    if getattr(config, "is_decoder", True):
        return False
    return any(vars(module).get("is_decoder") is False for module in model.modules())
