"""Places of tensors by their names alone, in models that no table of ours knows."""

import pytest

from geffect.layers import in_tower
from geffect.places import places

MATRIX, VECTOR, CUBE, ROUTER = (4, 4), (4,), (3, 4, 4), (3, 4)


def read(text: str) -> dict[str, tuple[int, ...]]:
    """Names with their shapes, which "|" tells of a vector, "#" of a cube, "@" of a router."""
    shapes = {"|": VECTOR, "#": CUBE, "@": ROUTER}
    return {name.rstrip("|#@"): shapes.get(name[-1], MATRIX) for name in text.split()}


def layers(text: str) -> list[str]:
    """The layer of each name, with its tower."""
    return [
        in_tower(f"layer {p.index}" if p.index >= 0 else p.part, p.tower)
        for p in places(read(text)).values()
    ]


NAMES = {
    "stages of blocks": (
        "conv1.weight bn1.weight| layer1.0.conv1.weight layer1.1.conv1.weight"
        " layer2.0.conv1.weight layer2.0.downsample.0.weight fc.weight fc.bias|",
        ["embedding", "embedding", "layer 0", "layer 1", "layer 2", "layer 2", "head", "head"],
    ),
    "blocks in layers": (
        "patch_embed.proj.weight layers.0.blocks.0.qkv.weight layers.0.blocks.1.qkv.weight"
        " layers.1.downsample.reduction.weight layers.1.blocks.0.qkv.weight norm.weight|",
        ["embedding", "layer 0", "layer 1", "layer 1", "layer 2", "final norm"],
    ),
    "lists of single modules": (
        "features.0.weight features.1.weight| features.3.weight features.5.weight"
        " classifier.0.weight classifier.3.weight",
        ["layer 0", "layer 0", "layer 1", "layer 2", "head", "head"],
    ),
    "no lists": (
        "features.conv0.weight features.norm0.weight| features.conv1.weight classifier.weight",
        ["layer 0", "layer 0", "layer 1", "head"],
    ),
    "one module": ("weight bias|", ["layer 0"] * 2),
    "no modules": ("W1 b1| W2 b2|", ["layer 0", "layer 0", "layer 1", "layer 1"]),
    "down and up": (
        "time_embedding.linear_1.weight conv_in.weight down_blocks.0.resnets.0.conv1.weight"
        " mid_block.resnets.0.conv1.weight up_blocks.0.resnets.0.conv1.weight"
        " conv_norm_out.weight| conv_out.weight",
        ["embedding", "embedding", "layer 0", "layer 1", "layer 2", "final norm", "head"],
    ),
    "from the fifth layer on": (
        "layers.5.attention.wq.weight layers.6.attention.wq.weight norm.weight| output.weight",
        ["layer 5", "layer 6", "final norm", "head"],
    ),
    "text beside images": (
        "model.embed_tokens.weight model.layers.0.q.weight model.norm.weight|"
        " model.vision_tower.model.embeddings.patch.weight"
        " model.vision_tower.model.encoder.layers.0.q.weight model.mm_projector.0.weight"
        " model.mm_projector.2.weight lm_head.weight",
        ["text embedding", "text layer 0", "text final norm", "vision embedding",
         "vision layer 0", "projector", "projector", "text head"],
    ),
    "contrast of text and images": (
        "positional_embedding text_projection logit_scale| visual.proj visual.conv1.weight"
        " visual.transformer.resblocks.0.q.weight visual.ln_post.weight|"
        " transformer.resblocks.0.q.weight token_embedding.weight ln_final.weight|",
        ["text embedding", "projector", "projector", "vision head", "vision embedding",
         "vision layer 0", "vision final norm", "text layer 0", "text embedding",
         "text final norm"],
    ),
    "two of a kind": (
        "tower_a.embed.weight tower_a.blocks.0.q.weight tower_b.embed.weight"
        " tower_b.blocks.0.q.weight",
        ["tower_a embedding", "tower_a layer 0", "tower_b embedding", "tower_b layer 0"],
    ),
    "an encoder and a decoder of text": (
        "text_encoder.layers.0.q.weight text_encoder.layer_norm.weight|"
        " speech_encoder.encoder.layers.0.q.weight text_decoder.layers.0.q.weight"
        " text_decoder.layers.1.q.weight text_decoder.layer_norm.weight| lm_head.weight",
        ["text encoder layer 0", "text encoder final norm", "audio layer 0",
         "text decoder layer 0", "text decoder layer 1", "text decoder final norm",
         "text decoder head"],
    ),
    "images and videos": (
        "image_tower.layers.0.q.weight video_tower.layers.0.q.weight mm_projector.0.weight"
        " video_projector.0.weight model.layers.0.q.weight",
        ["image tower layer 0", "video tower layer 0", "projector", "projector", "text layer 0"],
    ),
    "two that listen and speak": (
        "thinker.text_model.layers.0.q.weight talker.text_model.layers.0.q.weight",
        ["thinker.text_model layer 0", "talker.text_model layer 0"],
    ),
    "two encoders": (
        "question_encoder.bert.embeddings.w.weight question_encoder.bert.encoder.layer.0.q.weight"
        " ctx_encoder.bert.embeddings.w.weight ctx_encoder.bert.encoder.layer.0.q.weight",
        ["question encoder embedding", "question encoder layer 0", "ctx encoder embedding",
         "ctx encoder layer 0"],
    ),
    "recurrent encoder and decoder": (
        "encoder.embedding.weight encoder.rnn.weight_ih_l0 encoder.rnn.weight_ih_l1_reverse"
        " decoder.rnn.weight_ih_l0 decoder.fc.weight",
        ["encoder embedding", "encoder layer 0", "encoder layer 1", "decoder layer 0",
         "decoder head"],
    ),
    "a few layers on top": (
        "backbone.model.embed_tokens.weight backbone.model.layers.0.q.weight adapter.0.weight"
        " adapter.2.weight",
        ["embedding", "layer 0", "head", "head"],
    ),
    "a small further tower": (
        "model.embed_tokens.weight model.layers.0.q.weight model.layers.1.q.weight"
        " mtp.layers.0.q.weight lm_head.weight",
        ["embedding", "layer 0", "layer 1", "mtp layer 0", "head"],
    ),
    "prompts": (
        "model.embed_tokens.weight model.layers.0.q.weight lm_head.weight"
        " prompt_encoder.default.embedding.weight",
        ["embedding", "layer 0", "head", "embedding"],
    ),
    "a network that is called as a norm is": (
        "roberta_prelayernorm.embeddings.word_embeddings.weight"
        " roberta_prelayernorm.encoder.layer.0.q.weight"
        " roberta_prelayernorm.encoder.layer.1.q.weight"
        " roberta_prelayernorm.LayerNorm.weight| lm_head.dense.weight",
        ["embedding", "layer 0", "layer 1", "final norm", "head"],
    ),
    "a list of norms": (
        "embeddings.norm.weight| encoder.layers.0.q.weight stage_norms.0.weight|"
        " head.weight",
        ["embedding", "layer 0", "final norm", "head"],
    ),
    "a norm of embeddings behind the layers": (
        "model.embed_tokens.weight model.layers.0.q.weight model.embedding_norm.weight|",
        ["embedding", "layer 0", "final norm"],
    ),
    "a norm of embeddings before the layers": (
        "model.embed_tokens.weight model.embedding_norm.weight| model.layers.0.q.weight",
        ["embedding", "embedding", "layer 0"],
    ),
    "one module alone": ("wte.weight", ["embedding"]),
    "one module alone in another": ("model.linear.weight model.linear.bias|", ["layer 0"] * 2),
    "a number beside the layers": (
        "model.layers.0.q.weight model.temperature| model.norm.weight|",
        ["layer 0", "other", "final norm"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_layers_of_names(kind: str) -> None:
    names, right = NAMES[kind]
    assert layers(names) == right


MIXTURES = {
    "apart": (
        "h.0.moe.gate.weight@ h.0.moe.experts.0.w.weight h.0.moe.experts.1.w.weight h.1.q.weight",
        [("router", 0), ("expert", 0), ("expert", 0), ("", 0)],
    ),
    "fused": (
        "h.0.mlp.gate.weight@ h.0.mlp.experts.w# h.0.mlp.experts.b@ h.1.mlp.gate.weight",
        [("router", 0), ("expert", 3), ("expert", 3), ("", 0)],
    ),
    "not called so": (
        "h.0.mlp.input_linear.weight# h.0.mlp.router.layer.weight@ h.0.mlp.bias| h.1.q.weight",
        [("expert", 3), ("router", 0), ("", 0), ("", 0)],
    ),
    "shared": (
        "h.0.mlp.router.weight@ h.0.mlp.experts.w# h.0.mlp.shared_experts.up.weight"
        " h.0.mlp.shared_expert_gate.weight",
        [("router", 0), ("expert", 3), ("shared expert", 0), ("router", 0)],
    ),
    "adapters": (
        "h.0.mlp.gate.weight@ h.0.mlp.experts.w# h.0.mlp.experts.lora_A.weight",
        [("router", 0), ("expert", 3), ("expert", 0)],
    ),
    "gated, without experts": ("h.0.mlp.gate.weight h.0.mlp.up.weight", [("", 0), ("", 0)]),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_roles_in_a_mixture(kind: str) -> None:
    names, right = MIXTURES[kind]
    assert [(p.role, p.experts) for p in places(read(names)).values()] == right
