"""Adapters on models that bitsandbytes has quantised, and on dequantised copies of these."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from geffect.codes import keep_differentiable
from geffect.layers import trainable
from tests.utils import tiny

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "nf4, computes in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
    "codes in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def saved(folder: Path) -> Path:
    """A model in floating point, large enough for blocks of codes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str) -> Any:
    """The model in that folder, quantised, on a CPU of any kind multiplied in the same way."""
    config: Any = BitsAndBytesConfig(**KINDS[kind])
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    keep_differentiable(model)
    return model


def dequantised(model: Any) -> Any:
    """A copy of a quantised model in float32."""
    return copy.deepcopy(model).dequantize().float()


def adapted(model: Any) -> nn.Module:
    """The model with adapters that are away from zero, the same on every model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft: nn.Module = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(peft).values():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return peft.eval()


def flat(model: nn.Module) -> Tensor:
    """All that is trained, in one vector."""
    return torch.cat([p.detach().flatten() for p in trainable(model).values()])
