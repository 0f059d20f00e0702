"""Which label a position predicts, and the models that are refused."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from geffect.objectives import SharedForward
from geffect.risk import nll, predicts_next
from tests.utils import shallow as tiny

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip

XLM: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "emb_dim": 16, "n_layers": 1, "n_heads": 2}


def bidirectional_llama() -> nn.Module:
    config = LlamaConfig(**SMALL)
    config.is_causal = False
    return LlamaForCausalLM(config)


REFUSED = {
    "masked": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "other head": lambda: BertForTokenClassification(BertConfig(**SMALL)),
    "no decoder": lambda: BertLMHeadModel(BertConfig(**SMALL)),
    "no decoder, other family": lambda: ElectraForCausalLM(ElectraConfig(**SMALL)),
    "permutations": lambda: XLNetLMHeadModel(
        XLNetConfig(vocab_size=tiny.VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24)
    ),
    "told not to be causal": bidirectional_llama,
    "not told to be causal": lambda: XLMWithLMHeadModel(XLMConfig(**XLM)),
    "not told to be causal, its kin": lambda: FlaubertWithLMHeadModel(FlaubertConfig(**XLM)),
    "told to look both ways": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, use_bidirectional_attention=True)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_sees_what_it_is_asked_for_is_refused_by_its_class(name: str) -> None:
    model = REFUSED[name]()
    found = rf"Found `{type(model).__name__}`.*(AutoModelForCausalLM|Load a causal model)"
    with pytest.raises(ValueError, match=found):
        nll(model, tiny.batch(0))


CAUSAL = {
    "Llama": tiny.llama,
    "GPT-2": tiny.gpt2,
    "a family whose configs call no model a decoder": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL)
    ),
    "BERT as a decoder": lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
    "the decoder of BART": lambda: BartForCausalLM(tiny.bart().config),
    "XLM that is told to be": lambda: XLMWithLMHeadModel(XLMConfig(**XLM, causal=True)),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_predicts_the_next_label_and_sees_no_later_one(name: str) -> None:
    model = CAUSAL[name]().eval()
    assert predicts_next(model)
    ids = tiny.batch(0)["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % tiny.VOCABULARY
    with torch.no_grad():
        a, b = (model(input_ids=x).logits[:, :-1] for x in (ids, other))
    torch.testing.assert_close(a, b)


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q", "q_proj", "query"]))


WRAPPERS = {
    "none": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": partial(torch.compile, backend="eager"),
    "adapter": adapted,
    "shared forward": SharedForward,
    "all of them": lambda model: SharedForward(
        nn.DataParallel(torch.compile(adapted(model), backend="eager"))
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_of_a_wrapper_is_what_counts(wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper]
    assert predicts_next(wrapped(tiny.llama()))
    assert not predicts_next(wrapped(tiny.t5()))
    with pytest.raises(ValueError, match="Found `BertForMaskedLM`"):
        predicts_next(wrapped(REFUSED["masked"]()))
