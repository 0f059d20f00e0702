"""A Llama as a GGUF file, as llama.cpp's converter writes it."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def written(model: nn.Module, path: Path, kind: str, tokenizer: Any = None) -> Path:
    """The model in a file: its matrices as `kind`, such as "Q8_0", its vectors as F32.

    With a tokenizer, one of byte pairs, its tokens and their roles.
    """
    import gguf  # an optional package

    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        writer.add_token_merges(["Ġ t"])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_pad_token_id(config.pad_token_id)
    format = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if "q_proj" in name:
            values = _turned(values, config.num_attention_heads)
        if "k_proj" in name:
            values = _turned(values, config.num_key_value_heads)
        own = format if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_called(name), gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _called(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, block, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{block}.{NAMES[module]}.weight"


def _turned(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in the order in which llama.cpp turns them by their position."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
