"""Random models and batches small enough for a naive loop."""

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 23


def gpt2(seed: int = 0, *, layers: int = 2) -> nn.Module:
    """A tied GPT-2 in float64, which it computes throughout: checks reach 1e-10."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def llama(seed: int = 0, *, tied: bool = False, dropout: float = 0.0, layers: int = 2) -> nn.Module:
    """A Llama in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
        attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def t5(seed: int = 0) -> nn.Module:
    """An encoder-decoder in float64."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def bart(seed: int = 0) -> nn.Module:
    """Another one, whose head has a bias."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=32, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).double()


def translation(seed: int, rows: int = 3, length: int = 9, answer: int = 6) -> dict[str, Tensor]:
    """Inputs and answers of an encoder-decoder, of unequal lengths; the first label is scored."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
    labels = torch.randint(3, VOCABULARY, (rows, answer), generator=draw)
    for row, words in enumerate(labels):
        words[answer - row % answer :] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batch(seed: int, rows: int = 3, length: int = 9, padding: int = 0) -> dict[str, Tensor]:
    """Random tokens; the labels leave out a question of random length, and padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=draw)
    labels = ids.clone()
    for row in labels:
        row[: int(torch.randint(1, length - 2, (), generator=draw))] = -100
    pad = torch.zeros(rows, padding, dtype=torch.long)
    return {
        "input_ids": torch.cat([ids, pad], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), pad], dim=1),
        "labels": torch.cat([labels, pad - 100], dim=1),
    }


def pairs(count: int, seed: int = 44) -> list[dict[str, dict[str, Tensor]]]:
    """Batches of both sides; a fresh Llama finds some in conflict and some not."""
    seeds = range(seed, seed + 2 * count, 2)
    return [{"forget": batch(s), "retain": batch(s + 1, rows=4)} for s in seeds]
