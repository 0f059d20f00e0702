"""The models of an audit: what is given, and what is loaded when it is asked for."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from geffect.audit.auditing import audit
from geffect.audit.models import AuditModels, form_of, kind_of, named
from tests.utils import tiny
from tests.utils.audits import BUDGET, items
from tests.utils.gguf_files import written


def test_models_are_listed_in_one_order_and_loaded_when_asked(tmp_path: Path) -> None:
    original = tiny.llama(0)
    original.save_pretrained(tmp_path / "original")
    models = AuditModels(unlearned=tiny.llama(1), original=tmp_path / "original")
    assert [*models] == ["original", "unlearned"]
    assert models.loaded("unlearned") is models["unlearned"]
    loaded = models.loaded("original")
    assert not loaded.training
    assert all(
        torch.equal(one, other)
        for one, other in zip(loaded.parameters(), original.parameters(), strict=True)
    )
    assert (kind_of(tmp_path / "original"), named(tmp_path / "original")) == ("folder", "original")
    with pytest.raises(KeyError):
        models["retrained"]


def test_several_retrained_models_have_a_role_each() -> None:
    one, two, original, unlearned = (nn.Linear(1, 1) for _ in range(4))
    models = AuditModels(unlearned, original, (one, two))
    assert dict(models) == {
        "original": original, "retrained 1": one, "retrained 2": two, "unlearned": unlearned,
    }  # fmt: skip
    assert dict(AuditModels(unlearned, original, [one])) == dict(
        AuditModels(unlearned, original, one)
    )
    for wrong, said in (([], "Found none"), ([one, one], "Found the same one twice")):
        with pytest.raises(ValueError, match=said):
            AuditModels(unlearned, original, wrong)
    with pytest.raises(ValueError, match="`retrained 2` should be a model"):
        AuditModels(unlearned, original, [one, 2])  # type: ignore[list-item]


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny.llama(0)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny.llama(0), config)
    adapted.save_pretrained(tmp_path / "adapter")
    models = AuditModels(tmp_path / "adapter", tmp_path / "base", base=tmp_path / "base")
    loaded = models.loaded("unlearned")
    batch = tiny.batch(0)["input_ids"]
    torch.testing.assert_close(loaded(batch).logits, adapted(batch).logits, rtol=1e-5, atol=1e-5)
    assert kind_of(tmp_path / "adapter") == "adapter"
    assert "lora" not in " ".join(name for name, _ in loaded.named_parameters())


def small() -> LlamaForCausalLM:
    """A Llama whose matrices have inputs in whole blocks of 32, and fewer keys than queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_the_model_in_its_own_rounding(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = small()
    path = written(model, tmp_path / "model.gguf", kind)
    loaded = AuditModels(path, model).loaded("unlearned")
    own, format = dict(loaded.named_parameters()), gguf.GGMLQuantizationType[kind]
    assert not loaded.training and [*own] == [n for n, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim > 1:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, format), format)
        np.testing.assert_array_equal(own[name].detach().numpy(), values, err_msg=name)
    assert (kind_of(path), form_of(path)) == ("gguf", f"gguf, {kind}")


def test_where_memory_runs_out_no_gguf_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    path = written(small(), tmp_path / "model.gguf", "F32")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        AuditModels(path, small()).loaded("unlearned")


def test_an_audit_of_gguf_files_is_that_of_what_they_hold(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = small()
    path = written(model, tmp_path / "model.gguf", "F32")
    sets = {"forget": items(0), "retain": items(1), "holdout": items(2)}
    found = [
        audit(source, small(), sets=sets, budget=BUDGET, learning_rate=1e-3)
        for source in (path, model)
    ]
    pd.testing.assert_frame_equal(found[0].table, found[1].table)
    assert found[0].manifest["models"]["unlearned"]["kind"] == "gguf, F32"
    assert "rounding to int4" in {*found[0].table["metric"]}


def test_a_file_that_is_no_gguf_is_refused_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="A GGUF file should hold a causal language model"):
        AuditModels(path, nn.Linear(1, 1)).loaded("unlearned")


def test_what_is_no_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"`original` should be a model.*Found int"):
        AuditModels(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`unlearned` should be a model.*Found NoneType"):
        AuditModels(None, model)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="A checkpoint should be a folder"):
        AuditModels(model, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="should be a file that exists"):
        AuditModels(model, tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="`base` should go with an adapter"):
        AuditModels(model, model, base=tmp_path)
