"""Depth against a Llama that is written out, and what it must not depend on."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geffect.audit.blocks import blocks_of
from geffect.audit.depth import DepthProbe, block_states, check_tokenizers, unlearning_depth
from tests.utils import architectures, tiny

Item = dict[str, list[int]]


def items(count: int = 5, seed: int = 3) -> list[Item]:
    """Questions of three tokens, answers of unequal lengths."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for row in range(count):
        ids = torch.randint(3, 20, (5 + row % 3,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, -100, *ids[3:]]})
    return found


def changed(model: nn.Module, seed: int = 5, by: float = 0.1) -> nn.Module:
    """A copy with other parameters."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=draw)
    return other


# A Llama written out: its blocks, one row at a time.


def normed(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def turned(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions of `Float[head, position, width]`."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), theta ** (-torch.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def block_out(layer: Any, x: Tensor, heads: int) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    before = normed(x, layer.input_layernorm)
    q, k, v = (
        (before @ part.weight.T).unflatten(-1, (heads, -1)).transpose(0, 1)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = turned(q) @ turned(k).transpose(1, 2) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1:]).triu(1).bool()
    mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    x = x + mixed.transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
    before = normed(x, layer.post_attention_layernorm)
    gated = F.silu(before @ mlp.gate_proj.weight.T) * (before @ mlp.up_proj.weight.T)
    return x + gated @ mlp.down_proj.weight.T


def naive(original: Any, source: Any, item: Item) -> tuple[list[float], list[float], float]:
    """Drops by patching and by the lens at each layer, and the NLL by the decoder."""
    ids = torch.tensor(item["input_ids"])
    places = [i - 1 for i, label in enumerate(item["labels"]) if label != -100]
    wanted = ids[[place + 1 for place in places]]
    heads = original.config.num_attention_heads

    def tell(x: Tensor) -> Tensor:
        logits = normed(x[places], original.model.norm) @ original.lm_head.weight.T
        return logits.double().log_softmax(-1).gather(1, wanted[:, None]).mean()

    def through(model: Any, patch: int = -1, states: Tensor | None = None) -> list[Tensor]:
        x, outputs = model.model.embed_tokens.weight[ids], []
        for index, layer in enumerate(model.model.layers):
            x = block_out(layer, x, heads)
            if index == patch and states is not None:
                x = x.clone()
                x[places] = states[places]
            outputs.append(x)
        return outputs

    own, other = through(original), through(source)
    layers = range(len(own))
    patched = [tell(own[-1]) - tell(through(original, at, other[at])[-1]) for at in layers]
    lens = [tell(own[at]) - tell(other[at]) for at in layers]
    return [*map(float, patched)], [*map(float, lens)], -float(tell(other[-1]))


def test_depth_is_that_of_a_llama_written_out() -> None:
    original, given = tiny.llama(0), items()
    source = changed(original)
    probe = DepthProbe(original, given, batch_size=2)
    with torch.no_grad():
        patched, lens, swap = zip(*(naive(original, source, item) for item in given), strict=True)
    assert np.abs(patched).max() > 0.05
    np.testing.assert_allclose(probe.patched(source), patched, atol=1e-5)
    np.testing.assert_allclose(probe.lens(source), lens, atol=1e-5)
    np.testing.assert_allclose(probe.decoder_swap(source), swap, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "neox", "opt", "gemma3", "qwen2 moe", "mamba", "llava", "nanogpt"]
)
def test_a_model_patched_with_itself_changes_nothing_at_any_layer(name: str) -> None:
    model, given = architectures.made(name), items(2)
    probe = DepthProbe(model, given, batch_size=2)
    for found in (probe.patched(model), probe.lens(copy.deepcopy(model))):
        assert found.shape == (2, len(blocks_of(model)))
        assert (found == 0).all()
    other = changed(model)
    assert (probe.patched(other) != 0).all()
    # Behind the last block there is nothing left to change.
    np.testing.assert_allclose(probe.patched(other)[:, -1], probe.lens(other)[:, -1], atol=2e-6)


def test_neither_batches_nor_order_nor_padding_change_it() -> None:
    original, given = tiny.llama(0), items(5)
    source = changed(original)
    alone = DepthProbe(original, given, batch_size=1)
    for found in (DepthProbe(original, given, batch_size=5), DepthProbe(original, given)):
        for name in ("patched", "lens", "decoder_swap"):
            np.testing.assert_allclose(
                getattr(found, name)(source), getattr(alone, name)(source), atol=1e-6
            )
    back = DepthProbe(original, given[::-1], batch_size=2)
    np.testing.assert_allclose(back.patched(source)[::-1], alone.patched(source), atol=1e-6)
    padded = [
        {
            "input_ids": [0, 0, *item["input_ids"], 0],
            "labels": [-100, -100, *item["labels"], -100],
            "attention_mask": [0, 0, *[1] * len(item["input_ids"]), 0],
        }
        for item in given
    ]
    found = DepthProbe(original, padded).patched(source)
    np.testing.assert_allclose(found, alone.patched(source), atol=1e-6)


def test_a_source_may_be_read_before_the_original() -> None:
    original, given = tiny.llama(0), items(4)
    source = changed(original)
    states = block_states(source, given, batch_size=3)
    assert states.nbytes == 2 * sum(len(item["labels"]) - 3 for item in given) * 16 * 4
    probe = DepthProbe(original, given, batch_size=3)
    assert probe.nbytes == states.nbytes
    for name in ("patched", "lens", "decoder_swap"):
        assert (getattr(probe, name)(states) == getattr(probe, name)(source)).all()
    with pytest.raises(ValueError, match="states of the items that the original was read on"):
        probe.patched(block_states(source, given[1:], batch_size=3))


def test_the_end_of_an_answer_counts_where_it_is_asked_for() -> None:
    original = tiny.llama(0)
    source = changed(original)
    given = [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}]  # 2 ends a text
    cut = [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, -100]}]
    found = DepthProbe(original, given).patched(source)
    assert (found == DepthProbe(original, cut).patched(source)).all()
    assert (found != DepthProbe(original, given, ends=()).patched(source)).any()
    only_end = [*given, {"input_ids": [5, 6, 2], "labels": [-100, -100, 2]}]
    last = DepthProbe(original, only_end)
    assert np.isnan(last.patched(source)[1]).all() and np.isnan(last.decoder_swap(source)[1])
    np.testing.assert_allclose(last.patched(source)[0], found[0], atol=1e-6)


def test_a_head_that_alone_was_changed_hides_what_is_known() -> None:
    original, given = tiny.llama(0), items(3)
    hidden: Any = copy.deepcopy(original)
    with torch.no_grad():
        hidden.lm_head.weight.mul_(-1)
    probe = DepthProbe(original, given)
    assert (probe.patched(hidden) == 0).all() and (probe.lens(hidden) == 0).all()
    np.testing.assert_array_equal(probe.decoder_swap(hidden), probe.decoder_swap(original))


def test_the_models_stay_as_they_were() -> None:
    original, given = tiny.llama(0, dropout=0.5).train(), items(2)
    source = changed(original).train()
    bits = [copy.deepcopy(model.state_dict()) for model in (original, source)]
    state = torch.get_rng_state()
    probe = DepthProbe(original, given)
    probe.patched(source), probe.lens(source), probe.decoder_swap(source)
    assert torch.equal(state, torch.get_rng_state())
    for model, before in zip((original, source), bits, strict=True):
        assert model.training and not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_hooks_are_gone_after_an_error() -> None:
    original = tiny.llama(0)
    probe = DepthProbe(original, items(2))
    states = block_states(changed(original), items(2))
    broken = type(states)(tuple(v[..., :2] for v in states.values), states.tokens, states.outline)
    with pytest.raises(RuntimeError):
        probe.patched(broken)
    assert not any(m._forward_hooks for m in original.modules())


@pytest.mark.parametrize(
    ("of_unlearned", "of_retrained", "expected"),
    [
        ([0.3, 0.1, 1.5, -0.2], [0.02, 0.4, 1, 2], 1.1 / 3.4),
        ([0, 0, 0, 0], [0.02, 0.4, 1, 2], 0),
        ([9, 9, 9, 9], [0.02, 0.4, 1, 2], 1),
        ([1, 1, 1, 1], [0.05, 0.01, -3, 0], np.nan),
        ([1, 1, 1, 1], [0.4, np.nan, 1, 1], np.nan),
        ([1, np.nan, 1, 1], [0.4, 1, 1, 1], np.nan),
        ([np.inf, 0, 0, 0], [1, 1, 1, 1], 0.25),
    ],
)
def test_unlearning_depth(
    of_unlearned: list[float], of_retrained: list[float], expected: float
) -> None:
    found = unlearning_depth(np.array([of_unlearned]), np.array([of_retrained]))
    np.testing.assert_allclose(found, [expected], atol=1e-12)


def test_unlearning_depth_refuses_what_is_not_of_one_original() -> None:
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 3\)"):
        unlearning_depth(np.zeros((1, 2)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="`tau` should be 0 or more"):
        unlearning_depth(np.zeros((1, 2)), np.zeros((1, 2)), tau=-1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "encoder-decoder `T5ForConditionalGeneration`"),
        ("bert", "logits are not those of the next token"),
        ("lstm", "layers in a list of modules. Found none in `Recurrent`"),
    ],
)
def test_models_without_blocks_from_question_to_answer_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthProbe(architectures.made(name), items(2))


def test_sources_of_another_kind_are_refused() -> None:
    probe = DepthProbe(tiny.llama(0), items(2))
    for other in (tiny.gpt2(), architectures.made("llama"), architectures.made("qwen2")):
        with pytest.raises(ValueError, match="`source` should be of the original's architecture"):
            probe.patched(other)


def test_a_block_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.head = nn.Linear(4, 20)

        def forward(self, input_ids: Tensor) -> Any:
            x = self.embed(input_ids)
            for layer in (*self.layers, *self.layers):
                x = layer(x)
            return SimpleNamespace(logits=self.head(x))

    with pytest.raises(ValueError, match=r"Found `Linear`, which did so 2 times"):
        DepthProbe(Twice(), items(2))


def test_a_head_that_looks_at_other_positions_is_refused() -> None:
    class Summed(architectures.NanoGPT):
        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids).logits.cumsum(1))

    torch.manual_seed(0)
    model = Summed()
    probe = DepthProbe(model, items(2))
    assert (probe.patched(model) == 0).all()
    with pytest.raises(ValueError, match=r"look at each position by itself. Found log p that is"):
        probe.decoder_swap(model)


def test_where_memory_runs_out_no_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    model = tiny.llama(0)
    probe = DepthProbe(model, items(2))
    monkeypatch.setattr("geffect.audit.depth.with_states", fails)
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        probe.decoder_swap(model)


def test_adapters_and_wrappers_have_the_blocks_of_their_model() -> None:
    peft = pytest.importorskip("peft")
    original, given = architectures.made("llama"), items(3)
    adapted = peft.get_peft_model(
        copy.deepcopy(original), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    probe = DepthProbe(original, given)
    found = probe.patched(adapted)
    assert (found != 0).all()
    merged = copy.deepcopy(adapted).merge_and_unload()
    np.testing.assert_allclose(found, probe.patched(merged), atol=1e-6)
    assert (DepthProbe(nn.DataParallel(original), given).patched(original) == 0).all()


def test_of_a_compiled_model_what_was_compiled_is_run() -> None:
    class Compiled(nn.Module):
        """As torch.compile makes it: hooks inside are not called."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    original, given = tiny.llama(0), items(2)
    source = changed(original)
    probe = DepthProbe(Compiled(original), given)
    assert (probe.patched(original) == 0).all()
    assert (probe.patched(Compiled(source)) == probe.patched(source)).all()


def test_tokenizers() -> None:
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1})
    check_tokenizers(tokenizer, tokenizer)
    with pytest.raises(ValueError, match="Found 1 tokens"):
        check_tokenizers(SimpleNamespace(get_vocab=lambda: {"a": 0}), tokenizer)
