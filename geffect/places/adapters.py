"""The tensors of adapters, by what the package peft calls them."""

import re

TENSOR = (
    r"(?:lora|adamss|boft|c3a|deft|delora|fourierft|frod|glora|gralora|hada|hira|hra|ia3|lokr"
    r"|ln_tuning|oft|osf_svd|peanut|poly_lora|psoft|pvera|randlora|shira|supertuning|tinylora"
    r"|trainable_tokens|unilora|vblora|vera|waveft)_\w+"
    # Words that others use too are known whole.
    r"|beft_bias|lily_(?:[AB]|router)|miss_block|poly_router|road_(?:theta|alpha)"
    r"|shadow_(?:up|down|update_\w+)"
)
"""What a module of an adapter is called that holds its tensors, beside a weight of the model."""

_OF_ADAPTER = re.compile(rf"(?:^|\.)(?:{TENSOR})(?=\.|$)")
_STORE = re.compile(rf"base_model\.(?:{TENSOR})(?:\..+)?")


def is_adapter(name: str) -> bool:
    """Whether a tensor is one of an adapter, from which a weight is made.

    >>> is_adapter("model.layers.0.self_attn.q_proj.lora_A.weight"), is_adapter("head.weight")
    (True, False)
    """
    return _OF_ADAPTER.search(name) is not None


def is_store(name: str) -> bool:
    """Whether it is the root's name for a tensor that the adapters of all layers share.

    >>> is_store("base_model.vblora_vector_bank.default")
    True
    """
    return _STORE.fullmatch(name) is not None
