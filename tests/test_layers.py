"""Names: wrappers off, one layer a parameter, ties once."""

import pytest
import torch
from torch import nn

from geffect.layers import canonical_name, describe, layer_of, trainable
from tests.utils import tiny

WRAPPED = [
    "module.model.layers.0.mlp.up_proj.weight",
    "_orig_mod.model.layers.0.mlp.up_proj.weight",
    "module._orig_mod.model.layers.0.mlp.up_proj.weight",
    "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
    "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
    "base_model.model.model.layers.0.mlp.up_proj.weight",
    "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
]


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_leave_no_trace_in_a_name(name: str) -> None:
    assert canonical_name(name) == "model.layers.0.mlp.up_proj.weight"


def test_a_module_called_module_inside_of_a_model_stays() -> None:
    assert canonical_name("encoder.module.weight") == "encoder.module.weight"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("model.layers.11.self_attn.q_proj.weight", "layer 11"),
        ("transformer.h.3.ln_1.weight", "layer 3"),
        ("gpt_neox.layers.2.attention.dense.bias", "layer 2"),
        ("model.layers.0.input_layernorm.weight", "layer 0"),
        ("model.norm.weight", "final norm"),
        ("transformer.ln_f.bias", "final norm"),
        ("model.final_layernorm.weight", "final norm"),
        ("gpt_neox.final_layer_norm.weight", "final norm"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("vision_tower.patch.weight", "other"),
    ],
)
def test_each_name_has_its_layer(name: str, layer: str) -> None:
    assert layer_of(name)[0] == layer


@pytest.mark.parametrize(
    ("depth", "sizes"), [(1, [1, 0, 0]), (6, [2, 2, 2]), (22, [8, 7, 7]), (24, [8, 8, 8]),
                         (32, [11, 11, 10])],
)  # fmt: skip
def test_thirds_of_any_depth(depth: int, sizes: list[int]) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1, False) for _ in range(depth))})
    groups = [parameter.group for parameter in describe(model)]
    assert [groups.count(name) for name in ("shallow", "middle", "deep")] == sizes
    assert groups == sorted(groups, key=["shallow", "middle", "deep"].index)


def test_every_parameter_of_a_model_has_one_layer() -> None:
    layers = [parameter.layer for parameter in describe(tiny.llama())]
    assert set(layers) == {"embedding", *(f"layer {i}" for i in range(4)), "final norm", "head"}


def test_tied_embeddings_are_one_tensor_of_both_layers() -> None:
    rows = {row.name: row for row in describe(tiny.llama(tied=True))}
    embedding = rows["model.embed_tokens.weight"]
    assert embedding.layer == embedding.group == "embedding+head"
    assert embedding.tied_to == ("lm_head.weight",)
    assert "lm_head.weight" not in rows


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert list(trainable(model)) == ["1.weight", "1.bias"] == [p.name for p in describe(model)]


def test_compiled_and_plain_models_give_one_table() -> None:
    model = tiny.llama()
    assert describe(torch.compile(model)) == describe(model)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"should have a parameter.* Found none in Linear. Call"):
        trainable(nn.Linear(2, 2).requires_grad_(False))


class TwoAdapters(nn.Module):
    """A linear layer with two adapters, which share one canonical name."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({name: nn.Linear(2, 1, False) for name in ("one", "two")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_A["one"](x) + 2 * self.lora_A["two"](x)


def test_two_adapters_keep_their_names() -> None:
    model = nn.ModuleDict({"layer": TwoAdapters()})
    names = ["layer.lora_A.one.weight", "layer.lora_A.two.weight"]
    assert list(trainable(model)) == names == [p.name for p in describe(model)]
