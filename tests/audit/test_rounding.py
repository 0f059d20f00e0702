"""Rounding a model: what is rounded, what is not, and that every bit comes back."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from geffect.audit.quantisers import NF4, Q4_0, Int4, Int8, Quantiser
from geffect.audit.rounding import quantisers_for, rounded, rounding_table, same_codes
from tests.utils import tiny
from tests.utils.architectures import ARCHITECTURES
from tests.utils.models import bits

HEADS = {"lm_head.weight": "output head"}


@pytest.fixture
def lora() -> Iterator[nn.Module]:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    model = peft.get_peft_model(tiny.llama(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def linear(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers but the head, by the path of their layer."""
    return {
        path: m.weight.detach().clone()
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and path != "lm_head" and "lora" not in path
    }


@pytest.mark.parametrize("quantiser", [Int8(), Int4(32), NF4()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear_layers_are_rounded_and_the_rest_stays(
    quantiser: Quantiser, dtype: torch.dtype
) -> None:
    model = tiny.llama().to(dtype)
    before, rest = linear(model), bits(model)
    with rounded(model, quantiser) as it:
        assert it is model
        for path, weight in linear(model).items():
            assert torch.equal(weight, quantiser(before[path]).values.to(dtype))
            assert not torch.equal(weight, before[path])
        inside = bits(model)
        same = {name for name in rest if inside[name] == rest[name]}
        assert same == rest.keys() - {f"{path}.weight" for path in before}
    assert bits(model) == rest


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_everything_is_as_it_was(error: type[BaseException] | None) -> None:
    model = tiny.llama(tied=True, dropout=0.5).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model(**tiny.batch(0)).loss.backward()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :2] = torch.tensor([-0.0, 0.0])
    grads = {name: p.grad for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    before, drawn = bits(model), torch.get_rng_state()

    def attack() -> None:
        with rounded(model, Int4(32)) as it:
            it(**tiny.batch(1))
            if error is not None:
                raise error

    if error is None:
        attack()
    else:
        with pytest.raises(error):
            attack()
    assert bits(model) == before and model.training
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    if error is not None:
        torch.set_rng_state(drawn)


@pytest.mark.parametrize("place", [0, 3, 11])
def test_an_error_while_weights_are_written(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    before, count, whole = bits(model), iter(range(10**6)), Tensor.copy_

    def failing(self: Tensor, *args: object) -> Tensor:
        if next(count) == place:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(KeyboardInterrupt), rounded(model, Int8()):
        pass
    assert bits(model) == before


def test_the_linear_layers_of_gpt2_have_their_inputs_first() -> None:
    model = tiny.gpt2()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with rounded(model, NF4()):
        for name, p in model.named_parameters():
            if "attn" in name or "mlp" in name:
                right = NF4()(before[name].T).values.T if p.ndim == 2 else before[name]
                assert torch.equal(p, right.double())
            else:
                assert torch.equal(p, before[name])
    reasons = rounding_table(model, NF4()).set_index("weight")["reason"]
    assert reasons["transformer.wte.weight"] == "embedding and output head"


ROUNDED = {
    "mixtral": [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.self_attn.q_proj.weight",
    ],
    "qwen2 moe": ["model.layers.0.mlp.shared_expert.up_proj.weight"],
    "mamba": ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.dt_proj.weight"],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "bart": ["model.decoder.layers.1.fc2.weight"],
    "llava": ["model.multi_modal_projector.linear_1.weight"],
}
STAY = {
    "mixtral": ["model.layers.0.mlp.gate.weight", "lm_head.weight"],
    "qwen2 moe": ["lm_head.weight", "model.norm.weight"],
    "mamba": ["backbone.layers.0.mixer.conv1d.weight", "backbone.layers.0.mixer.A_log"],
    "t5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    "bart": ["model.shared.weight"],
    "llava": ["lm_head.weight"],
}


@pytest.mark.parametrize("name", ROUNDED)
def test_architectures(name: str) -> None:
    model = ARCHITECTURES[name].build()
    before = bits(model)
    table = rounding_table(model, Int8()).set_index("weight")
    assert table["rounded"][ROUNDED[name]].all() and not table["rounded"][STAY[name]].any()
    assert table.index.is_unique
    assert table["numbers"].sum() == sum(p.numel() for p in model.parameters())
    with rounded(model, Int8()):
        inside = bits(model)
        moved = {n for n, p in model.named_parameters() if inside[n] != before[n]}
        alone = {n for n, p in model.named_parameters() if p.shape[-1] == 1}  # w / |w| is +-1
        assert moved | alone == set(table.index[table["rounded"]]) | alone
    assert bits(model) == before


def test_experts_in_one_tensor_are_rounded_each_by_itself() -> None:
    model = ARCHITECTURES["mixtral"].build()
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    for turned in (False, True):
        experts.is_transposed = turned
        with rounded(model, Int4(32)):
            for expert, found in zip(before, experts.gate_up_proj, strict=True):
                right = Int4(32)(expert.T).values.T if turned else Int4(32)(expert).values
                assert torch.equal(found, right)
    del experts.is_transposed
    with pytest.raises(ValueError, match="Experts that lie in one tensor should say which"):
        rounding_table(model, Int8())


def test_an_adapter_is_merged_or_stays_beside_what_is_rounded(lora: nn.Module) -> None:
    before, batch = bits(lora), tiny.batch(0)
    merged = copy.deepcopy(lora).merge_and_unload()
    with rounded(lora, Int4(32)) as found, rounded(merged, Int4(32)) as right, torch.no_grad():
        assert torch.equal(found(**batch).logits, right(**batch).logits)
    base = copy.deepcopy(lora)
    for layer in (m for m in base.modules() if hasattr(m, "merged_adapters")):
        weight = layer.get_base_layer().weight
        weight.data = Int4(32)(weight).values
    plain = {n for n, p in base.named_parameters() if "_proj" in n and "lora" not in n}
    with rounded(lora, Int4(32), adapter="base") as found, torch.no_grad():
        assert found is lora
        moved = {n for n, p in found.named_parameters() if bits(found)[n] != before[n]}
        assert moved == plain
        for name, weight in base.named_parameters():
            if "base_layer" in name:
                assert torch.equal(dict(found.named_parameters())[name], weight)
    assert bits(lora) == before
    reasons = rounding_table(lora, Int8(), adapter="base").set_index("weight")["reason"]
    assert {r for n, r in reasons.items() if "lora" in n} == {"adapter"}
    lora.merge_adapter()
    with pytest.raises(ValueError, match="The adapter should stand beside the weights"):
        rounding_table(lora, Int8(), adapter="base")


def test_layers_that_an_adapter_replaces_are_rounded_with_it() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["down_proj"])
    model = peft.get_peft_model(tiny.llama(), config)
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(p, std=0.1)
    before = bits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    table = rounding_table(model, Int8()).set_index("weight")["rounded"]
    assert table["model.layers.0.mlp.down_proj.weight"] and table.sum() == 14
    with rounded(model, Int4(32)) as found:
        for path, weight in linear(merged).items():
            assert torch.equal(found.get_submodule(path).weight, Int4(32)(weight).values)
    beside = rounding_table(model, Int8(), adapter="base")
    kept = beside[beside["weight"].str.contains("modules_to_save")]
    assert set(kept["reason"]) == {"adapter"} and len(kept) == 2
    assert bits(model) == before
    model.disable_adapter_layers()
    with rounded(model, Int4(32)) as found, torch.no_grad():
        plain = tiny.llama()
        with rounded(plain, Int4(32)) as right:
            batch = tiny.batch(0)
            assert torch.equal(found(**batch).logits, right(**batch).logits)


def test_adapters_inside_of_a_model() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    model = tiny.llama()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    weights = [layer.self_attn.q_proj.get_base_layer().weight for layer in model.model.layers]
    deltas = [layer.self_attn.q_proj.get_delta_weight("default") for layer in model.model.layers]
    with rounded(model, Int4(32)) as found:
        assert found is not model
        for layer, weight, delta in zip(found.model.layers, weights, deltas, strict=True):
            right = Int4(32)((weight + delta).detach()).values
            assert torch.equal(layer.self_attn.q_proj.get_base_layer().weight, right)
    whole = tiny.llama()
    whole.add_adapter(
        peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["down_proj"])
    )
    with pytest.raises(ValueError, match="should be one of the package peft where it replaces"):
        rounding_table(whole, Int8())


def test_two_parameters_of_one_memory_are_rounded_once() -> None:
    memory = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(8, 3))
    model[0].weight, model[1].weight = nn.Parameter(memory), nn.Parameter(memory)
    model.get_output_embeddings = lambda: model[2]  # type: ignore[assignment]
    before = memory.clone()
    with rounded(model, Int4()):
        assert torch.equal(model[1].weight, Int4()(before).values)
    assert torch.equal(model[0].weight, before)


def test_inputs_that_make_no_blocks_stay() -> None:
    model = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 64), nn.Linear(64, 3))
    model.get_output_embeddings = lambda: model[2]  # type: ignore[assignment]
    table = rounding_table(model, Q4_0()).set_index("weight")
    assert table["rounded"].to_dict() == {n: n == "0.weight" for n, _ in model.named_parameters()}
    assert table["reason"]["1.weight"] == "24 inputs are no multiple of 32"
    refused = pytest.raises(ValueError, match=r"weights that gguf_q4_0 takes\. Found none")
    with refused, rounded(tiny.llama(), Q4_0()):
        pass


def test_same_codes() -> None:
    one = tiny.llama()
    assert same_codes(one, copy.deepcopy(one), Int4(32)) == 1.0
    other = copy.deepcopy(one)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.002 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    same = [
        (Int4(32)(a).codes == Int4(32)(b).codes).flatten()
        for a, b in zip(linear(one).values(), linear(other).values(), strict=True)
    ]
    share = same_codes(one, other, Int4(32))
    assert share == pytest.approx(torch.cat(same).double().mean().item())
    assert 0.5 < share < 1
    with pytest.raises(ValueError, match="should have the weights of `original`"):
        same_codes(one, tiny.gpt2(), Int4(32))


def test_an_edit_inside_of_the_cells_is_undone_by_its_quantiser_alone() -> None:
    original, hidden, quantiser = tiny.llama(), tiny.llama(), Int4(32)
    draw = torch.Generator().manual_seed(4)
    for path, weight in linear(original).items():
        found = quantiser(weight)
        within = found.scale * 0.4 * (2 * torch.rand(weight.shape, generator=draw) - 1)
        largest = found.codes.abs() == 7  # one of them is the scale, which has to stay
        moved = torch.where(largest, weight, found.values + within)
        hidden.get_submodule(path).weight.data = moved
    assert same_codes(original, hidden, quantiser) == 1.0
    assert same_codes(original, hidden, Int8()) < 0.5
    with rounded(original, quantiser), rounded(hidden, quantiser):
        assert bits(original) == bits(hidden)
    with rounded(original, Int8()), rounded(hidden, Int8()):
        assert bits(original) != bits(hidden)


def test_small_models_have_small_groups() -> None:
    assert [q.name for q in quantisers_for(tiny.llama())] == ["int8", "int4", "nf4", "gguf_q4_0"]
    assert Int4(32) in quantisers_for(tiny.llama())
    wide = nn.Sequential(nn.Linear(512, 2), nn.Linear(2, 3))
    wide.get_output_embeddings = lambda: wide[1]  # type: ignore[assignment]
    assert Int4(128) in quantisers_for(wide)


def test_a_layer_that_stands_twice_is_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model.get_output_embeddings = lambda: model[2]  # type: ignore[assignment]
    before = model[0].weight.detach().clone()
    with rounded(model, Int4()):
        assert torch.equal(model[1].weight, Int4()(before).values)
    assert torch.equal(model[0].weight, before)


def test_models_that_have_no_weights_to_round_are_refused() -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        torch.ones(24, 16, dtype=torch.uint8), requires_grad=False
    )
    refused = pytest.raises(ValueError, match=r"Found `[\w.]*up_proj\.weight` of torch\.uint8")
    with refused, rounded(model, Int8()):
        pass
    codes = tiny.llama()
    codes.model.layers[0].mlp.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"qweight` of torch\.int32"):
        same_codes(codes, codes, Int8())
    with pytest.raises(ValueError, match="should tell which layer is its output head"):
        rounding_table(nn.Sequential(nn.Linear(2, 2)), Int8())
    dynamic = tiny.llama()  # as of torch.ao.quantization.quantize_dynamic
    dynamic.model.layers[1].mlp.up_proj = nn.Module()
    dynamic.model.layers[1].mlp.up_proj._packed_params = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Found `model\.layers\.1\.mlp\.up_proj` of `torch"):
        rounding_table(dynamic, Int8())
    with pytest.raises(TypeError, match="should be of a model"):
        rounding_table(lambda input_ids: None, Int8())  # type: ignore[arg-type]
    computed = nn.utils.parametrizations.weight_norm(tiny.llama().model.layers[0].mlp.up_proj)
    holder = tiny.llama()
    holder.model.layers[0].mlp.up_proj = computed
    with pytest.raises(ValueError, match="hold their weight as a parameter"):
        rounding_table(holder, Int8())
    with pytest.raises(ValueError, match='`adapter` should be "merged" or "base"'):
        rounding_table(tiny.llama(), Int8(), adapter="both")  # type: ignore[arg-type]
    infinite = tiny.llama()
    nn.init.constant_(infinite.model.layers[1].mlp.up_proj.weight, float("inf"))
    with pytest.raises(ValueError, match="Weights should be finite") as caught:
        same_codes(infinite, infinite, Int8())
    assert caught.value.__notes__ == ["It was found in `model.layers.1.mlp.up_proj.weight`."]
