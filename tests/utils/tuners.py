"""A tiny model with an adapter of every kind that the package peft has."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 64

OPTIONS: Mapping[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 1, "tfinal": 3},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 10},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 4},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {},
    "SHIRA": {"r": 4},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [4, 5, 6]},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
}
"""What each is made with, beside the linear layers of attention that most of them are on."""

PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
_OWN_TARGETS = {*PROMPTS, "ADAPTION_PROMPT", "LN_TUNING", "TRAINABLE_TOKENS"}


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
        )
    ).eval()


def config_of(kind: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS

    targets = {} if kind in _OWN_TARGETS else {"target_modules": ["q_proj", "v_proj"]}
    return KINDS[PeftType(kind)](task_type="CAUSAL_LM", **targets, **OPTIONS[kind])


def adapted(kind: str, seed: int = 0) -> nn.Module:
    """A model with an adapter of that kind that changes what it says."""
    from peft import get_peft_model

    model = get_peft_model(base(), config_of(kind))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    found: nn.Module = model.eval()
    return found
