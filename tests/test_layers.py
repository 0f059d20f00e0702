"""The table of tensors: wrappers off, one layer and one tower a parameter, ties once."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from geffect.layers import (
    Parameter,
    canonical_name,
    describe,
    in_network_order,
    placed,
    trainable,
)
from tests.utils import tiny
from tests.utils.architectures import ARCHITECTURES

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


DENSE = ["embedding", "layer 0", "layer 1", "final norm", "head"]
TIED = ["embedding+head", *DENSE[1:4]]
TIED_WITH_POSITIONS = ["embedding+head", *DENSE[:4]]
VISION = [f"vision {layer}" for layer in DENSE[:3]]
TEXT = [f"text {layer}" for layer in DENSE]

LAYERS = {
    "stablelm": DENSE,
    "gemma3": TIED,
    "phi3": DENSE,
    "gptj": DENSE,
    "falcon": TIED,
    "gpt2": TIED_WITH_POSITIONS,
    "neox": DENSE,
    "opt": TIED_WITH_POSITIONS,
    "bloom": TIED_WITH_POSITIONS,  # the norm of the embedding is of the embedding
    "mixtral": DENSE,
    "qwen2 moe": DENSE,
    "qwen3 moe": DENSE,
    "mamba": TIED,
    "mamba2": DENSE,
    "llava": [*VISION, "vision final norm", "projector", *TEXT],
    "qwen2 vl": [*VISION, "projector", *TEXT],
    "t5": [
        "encoder+decoder embedding+head",
        *(f"{tower} {part}" for tower in ("encoder", "decoder") for part in DENSE[1:4]),
    ],
    "bart": [
        "encoder+decoder embedding+head",
        *(f"{tower} {part}" for tower in ("encoder", "decoder") for part in DENSE[:3]),
    ],
    "bert": ["embedding+head", *DENSE[:3], "head"],
    "vit": DENSE,
    "cnn": ["layer 0", "layer 1", "head"],
    "lstm": ["embedding", "layer 0", "layer 1", "head"],
    "nanogpt": TIED_WITH_POSITIONS,
    "llama": DENSE,
    "qwen2": TIED,
    "gemma2": TIED,
}
TOWERS = {
    "llava": ["vision", "projector", "text"],
    "qwen2 vl": ["vision", "projector", "text"],
    "t5": ["encoder+decoder", "encoder", "decoder"],
    "bart": ["encoder+decoder", "encoder", "decoder"],
}


@cache
def table(name: str) -> tuple[Parameter, ...]:
    """The table of an architecture, whose numbers take no room."""
    with torch.device("meta"):
        return describe(ARCHITECTURES[name].build())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_and_towers_of_an_architecture(name: str) -> None:
    rows = table(name)
    assert in_network_order(rows, [row.layer for row in rows]) == LAYERS[name]
    towers = in_network_order(rows, [row.tower for row in rows])
    assert towers == TOWERS.get(name, ["model"])
    for column in ("layer", "group"):
        held: dict[str, set[str]] = {}
        for row in rows:
            held.setdefault(getattr(row, column), set()).add(row.tower)
        assert all(len(towers) == 1 for towers in held.values())


def test_depth_groups_are_of_a_tower() -> None:
    rows = table("t5")
    assert in_network_order(rows, [row.group for row in rows]) == [
        "encoder+decoder embedding+head",
        "encoder shallow", "encoder middle", "encoder final norm",
        "decoder shallow", "decoder middle", "decoder final norm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "routers", "shared"),
    [("mixtral", 1, 0), ("qwen2 moe", 2, 3), ("qwen3 moe", 1, 0), ("llama", 0, 0)],
)
def test_experts_are_told_from_routers(name: str, routers: int, shared: int) -> None:
    roles = Counter(row.role for row in table(name) if row.layer == "layer 0")
    fused = {row.module: row.experts for row in table(name) if row.experts}
    assert (roles["router"], roles["shared expert"]) == (routers, shared)
    # Phi3 has the module too, and no experts.
    assert not any(row.role for row in table("phi3"))
    experts = {"mlp.experts": 4} if routers else {}
    assert fused == experts and roles["expert"] == 2 * len(experts)


def wrapped(name: str) -> dict[str, nn.Module]:
    """A model whose every tensor is trained, in the wrappers that it may come in."""
    from peft import LoraConfig, get_peft_model

    plain, compiled, adapted = (ARCHITECTURES[name].build() for _ in range(3))
    module = nn.Module()
    module.module = ARCHITECTURES[name].build()
    lora = get_peft_model(adapted, LoraConfig(target_modules="all-linear"))
    lora.requires_grad_()
    return {
        "plain": plain,
        "compiled": torch.compile(compiled, backend="eager"),
        "module": module,
        "lora": lora,
    }


@pytest.mark.parametrize("name", ["llava", "mixtral"])
def test_wrappers_leave_the_table_as_it_is(name: str) -> None:
    models = wrapped(name)
    plain = describe(models["plain"])
    assert describe(models["compiled"]) == describe(models["module"]) == plain
    places = {row.name: (row.layer, row.group, row.tower, row.role) for row in plain}
    for row in describe(models["lora"]):
        module = re.split(r"\.lora_|\.base_layer", canonical_name(row.name).rpartition(".")[0])[0]
        own = {place for name, place in places.items() if name.startswith(f"{module}.")}
        assert own == {(row.layer, row.group, row.tower, row.role)}


def test_what_is_frozen_still_counts() -> None:
    model = tiny.llama()
    whole = {row.name: row for row in describe(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".1.mlp" in name)
    rows = describe(model)
    assert len(rows) == 3 and all(row == whole[row.name] for row in rows)


def test_a_table_without_towers_gets_them_from_its_names() -> None:
    plain = [
        replace(row, tower="model", role="", layer=row.layer.removeprefix(f"{row.tower} "))
        for row in (*table("t5"), *table("mixtral"))
    ]
    for rows, name in ((plain[: len(table("t5"))], "t5"), (plain[len(table("t5")) :], "mixtral")):
        found = placed(rows)
        assert [(p.tower, p.role) for p in found] == [(p.tower, p.role) for p in table(name)]
        assert [p.layer for p in found] == [p.layer for p in rows]


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
    assert set(layers) == {"embedding", *(f"layer {i}" for i in range(2)), "final norm", "head"}


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
    assert describe(torch.compile(model, backend="eager")) == describe(model)


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


def test_parameters_that_never_have_a_gradient_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 1)
    with pytest.raises(
        ValueError, match=r"Found `weight`, which was made inside of `torch.inferen"
    ):
        trainable(model)
    model.weight, model.bias = (nn.Parameter(p.clone()) for p in model.parameters())
    assert [*trainable(model)] == ["weight", "bias"]
