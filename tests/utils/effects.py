"""Small models of several families, and their gradients one by one."""

from collections.abc import Callable, Mapping, Sequence

import torch
import transformers
from torch import Tensor, nn

from geffect.layers import trainable
from tests.utils import reference, tiny

SHAPE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 1, "head_dim": 4}

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "gpt2": tiny.gpt2,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama, tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**{**GROUPED, "num_hidden_layers": 2})
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SHAPE)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHAPE)),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the family, away from the zeros and ones that it starts with."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def uneven(seed: int, rows: int = 3) -> dict[str, Tensor]:
    """Questions and answers of several lengths, padded on the right with a token that occurs."""
    batch = tiny.batch(seed, rows=rows, length=8, padding=1)
    batch["input_ids"][0, 3] = SHAPE["pad_token_id"]
    for row in range(1, rows):
        end = 8 - row
        batch["input_ids"][row, end:] = SHAPE["pad_token_id"]
        batch["attention_mask"][row, end:] = 0
        batch["labels"][row, end:] = -100
    return batch


Flat = Sequence[Tensor]


def gradients(model: nn.Module, value: Tensor) -> Flat:
    """One backward pass, by parameter, zero where it does not reach."""
    tensors = list(trainable(model).values())
    found = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def inner(a: Flat, b: Sequence[Tensor | None]) -> Tensor:
    """<a, b> of every parameter, in float64."""
    pairs = zip(a, b, strict=True)
    return torch.stack([(x.double() * (0.0 if y is None else y.double())).sum() for x, y in pairs])


def sums_of_log_p(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """log p(s) of every sample."""
    return [torch.stack(tokens).sum() for tokens in reference.token_log_p(model, batch)]
