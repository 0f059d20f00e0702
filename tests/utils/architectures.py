"""Tiny random models of many architectures, a batch for each, and its loss by plain torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, POSITIONS, CLASSES = 40, 16, 6, 5
IMAGE, PATCH, IMAGE_TOKEN = 8, 4, 39

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """How to build a model, a batch of some rows that it takes, and what it is trained on."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def made(name: str) -> nn.Module:
    """The model of that name in eval mode, away from the zeros and ones that it starts with."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def batch_for(name: str, seed: int, rows: int = 3) -> Batch:
    """A batch for the model of that name."""
    return ARCHITECTURES[name].batch(seed, rows)


def loss_of(name: str, model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of what the model of that name predicts."""
    return ARCHITECTURES[name].loss(model, batch)


def _text(seed: int, rows: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (rows, POSITIONS), generator=draw)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, -1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _plain_text(seed: int, rows: int) -> Batch:
    """Without a mask, which hand-written models do not take."""
    return {name: x for name, x in _text(seed, rows).items() if name != "attention_mask"}


def _translation(seed: int, rows: int) -> Batch:
    return _text(seed, rows) | {"labels": _text(seed + 1000, rows)["labels"][:, 1:].contiguous()}


def _images(seed: int, rows: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=draw)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(0, CLASSES, (rows,), generator=draw),
    }


def _captions(seed: int, rows: int) -> Batch:
    """Text after an image of four patches, which stand for four tokens."""
    text = _text(seed, rows)
    places = torch.full((rows, (IMAGE // PATCH) ** 2), IMAGE_TOKEN)
    ids = torch.cat([places, text["input_ids"]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full_like(places, -100), text["labels"]], dim=1),
        "pixel_values": _images(seed, rows)["pixel_values"],
    }


def _next_token(model: Any, batch: Batch) -> Tensor:
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def _same_token(model: Any, batch: Batch) -> Tensor:
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _own(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _class(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])


class NanoGPT(nn.Module):
    """A GPT as it is written by hand: positions are embedded once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(POSITIONS, WIDTH),
                "h": nn.ModuleList(_Block() for _ in range(2)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        nn.init.normal_(self.lm_head.weight, std=0.1)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        parts = self.transformer
        x = parts["wte"](input_ids) + parts["wpe"](torch.arange(input_ids.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(parts["ln_f"](x)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(WIDTH, WIDTH)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 2 * WIDTH), "c_proj": nn.Linear(2 * WIDTH, WIDTH)}
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Recurrent(nn.Module):
    """A language model on an LSTM of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.decoder(self.rnn(self.encoder(input_ids))[0]))


class Convolutional(nn.Module):
    """An image classifier with a running mean and variance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Linear(8 * 4, CLASSES)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.features(pixel_values).flatten(1)))


def _of_transformers(model: str, config: str, **options: Any) -> nn.Module:
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made


SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 1}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {
    **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip
GPT = {
    "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STATES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PICTURE = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": IMAGE, "patch_size": PATCH,
}  # fmt: skip
ROTARY_IN_THREE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
SEQUENCES = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def _causal(family: str, *, config: str | None = None, **options: Any) -> Architecture:
    named = (f"{family}ForCausalLM", config or f"{family}Config")
    return Architecture(partial(_of_transformers, *named, **options), _text, _next_token)


def _llava() -> nn.Module:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            image_token_index=IMAGE_TOKEN,
            vision_config=transformers.CLIPVisionConfig(**PICTURE, projection_dim=WIDTH),
            text_config=transformers.LlamaConfig(**GROUPED),
        )
    )


def _qwen2_vl() -> nn.Module:
    text = {**GROUPED, "rope_parameters": ROTARY_IN_THREE}
    vision = {
        "depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "patch_size": PATCH,
        "mlp_ratio": 2,
    }  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN,
            video_token_id=2, vision_start_token_id=1, vision_end_token_id=0,
        )
    )  # fmt: skip


def _patches(seed: int, rows: int) -> Batch:
    """Text after an image of one token, whose 2 x 2 patches come flat and in two frames."""
    text = _text(seed, rows)
    places = torch.tensor([[1, IMAGE_TOKEN]]).repeat(rows, 1)
    ids = torch.cat([places, text["input_ids"]], dim=1)
    draw = torch.Generator().manual_seed(seed)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "labels": torch.cat([torch.full_like(places, -100), text["labels"]], dim=1),
        "pixel_values": torch.randn(rows * 4, 3 * 2 * PATCH * PATCH, generator=draw),
        "image_grid_thw": torch.tensor([[1, 2, 2]]).repeat(rows, 1),
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "stablelm": _causal("StableLm", **GROUPED),
    "gemma3": _causal("Gemma3", config="Gemma3TextConfig", **HEADS),
    "phi3": _causal("Phi3", **GROUPED),
    "gptj": _causal("GPTJ", **GPT, rotary_dim=4),
    "falcon": _causal("Falcon", **SHAPE),
    "gpt2": Architecture(
        partial(_of_transformers, "GPT2LMHeadModel", "GPT2Config", **GPT), _text, _next_token
    ),
    "neox": _causal("GPTNeoX", **SHAPE),
    "opt": _causal("OPT", **SHAPE, ffn_dim=24, word_embed_proj_dim=WIDTH),
    "bloom": _causal("Bloom", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=2),
    "mixtral": _causal("Mixtral", **GROUPED, num_local_experts=4),
    "qwen2 moe": _causal("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=12),
    "qwen3 moe": _causal("Qwen3Moe", **EXPERTS, head_dim=8),
    "mamba": _causal("Mamba", **STATES),
    "mamba2": _causal("Mamba2", **STATES, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    "llava": Architecture(_llava, _captions, _next_token),
    "qwen2 vl": Architecture(_qwen2_vl, _patches, _next_token),
    "t5": Architecture(
        partial(
            _of_transformers, "T5ForConditionalGeneration", "T5Config",
            **SEQUENCES, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        ),
        _translation,
        _own,
    ),
    "bart": Architecture(
        partial(
            _of_transformers, "BartForConditionalGeneration", "BartConfig",
            **SEQUENCES, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_position_embeddings=32, forced_eos_token_id=2,
        ),
        _translation,
        _own,
    ),
    "bert": Architecture(
        partial(_of_transformers, "BertForMaskedLM", "BertConfig", **SHAPE), _text, _same_token
    ),
    "vit": Architecture(
        partial(
            _of_transformers, "ViTForImageClassification", "ViTConfig",
            **PICTURE, num_labels=CLASSES,
        ),
        _images,
        _class,
    ),
    "cnn": Architecture(Convolutional, _images, _class),
    "lstm": Architecture(Recurrent, _plain_text, _next_token),
    "nanogpt": Architecture(NanoGPT, _plain_text, _next_token),
    "llama": _causal("Llama", **GROUPED),
    "qwen2": _causal("Qwen2", **GROUPED, tie_word_embeddings=True),
    "gemma2": _causal("Gemma2", **HEADS),
}  # fmt: skip
"""By name: models of 2 layers a stack, whose largest tensor has some hundreds of numbers."""
