"""The models of checkpoints: weights, half precision, and adapters of peft."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from geffect import open_run
from geffect.analysis import cosine, predicted_change
from geffect.checkpoints import loading
from geffect.checkpoints.estimators import full, same_batch
from geffect.checkpoints.folders import base_of, tokenizer_of
from geffect.checkpoints.loading import Loader, whole_of
from geffect.checkpoints.replay import replay
from geffect.objectives import NPO
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.chat import without
from tests.utils.checkpoints import FORGET, GA, RETAIN, digests, effects, loaded, naive


def test_one_model_is_made_and_the_weights_of_each_are_read(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(loading, "_model_of", lambda path: made.append(path) or loaded(path))
    replay(
        [run_folder / f"checkpoint-{step}" for step in (5, 10, 15)], tmp_path / "run.h5",
        objective=NPO(), forget=FORGET, retain=RETAIN, estimator=full,
        update=True,
    )  # fmt: skip
    assert made == [run_folder / "checkpoint-5"]


def test_the_model_holds_exactly_the_weights_of_the_checkpoint(run_folder: Path) -> None:
    loader = Loader()
    for step in (5, 15, 10):
        model = loader.load(run_folder / f"checkpoint-{step}")
        there = loaded(run_folder / f"checkpoint-{step}").state_dict()
        assert all(torch.equal(there[name], here) for name, here in model.state_dict().items())
        assert not model.training and all(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())


def test_a_checkpoint_that_was_loaded_in_part_is_not_taken_for_the_one_before(
    run_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_folder / "checkpoint-10", tmp_path / "diverged")
    weights = load_file(tmp_path / "diverged" / "model.safetensors")
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"] * torch.nan},
        tmp_path / "diverged" / "model.safetensors",
    )
    loader = Loader()
    loader.load(run_folder / "checkpoint-5")
    with pytest.raises(ValueError, match="should hold finite weights"):
        loader.load(tmp_path / "diverged")
    model = loader.load(run_folder / "checkpoint-5")
    there = loaded(run_folder / "checkpoint-5").state_dict()
    assert all(torch.equal(there[name], here) for name, here in model.state_dict().items())


def test_weights_in_several_files_and_under_other_names(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny.gpt2(seed).save_pretrained(tmp_path / str(seed), max_shard_size="5KB")
    assert (tmp_path / "1" / "model.safetensors.index.json").is_file()
    # The base alone, whose names lack a prefix that those of the whole model have.
    tiny.gpt2(2).transformer.save_pretrained(tmp_path / "2")
    loader = Loader()
    for seed in (0, 1, 2):
        model, expected = loader.load(tmp_path / str(seed)), tiny.gpt2(seed)
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), (seed, name)


def test_half_precision_stays_as_it_was_saved(tmp_path: Path) -> None:
    tiny.llama().bfloat16().save_pretrained(tmp_path / "half")
    model = Loader().load(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# LoRA


def test_adapters(adapters: Path, tmp_path: Path) -> None:
    before = digests(adapters)
    run = replay(
        [adapters / "checkpoint-0", adapters / "checkpoint-8"], tmp_path / "run.h5",
        objective=GA, forget=FORGET, retain=RETAIN, estimator=same_batch,
        update=True,
    )  # fmt: skip
    assert run.steps.tolist() == [0, 8]
    assert all(p.module.endswith(("lora_A", "lora_B")) for p in run.layers)
    import peft

    for step in (0, 8):
        model = peft.PeftModel.from_pretrained(
            loaded(adapters / "base"), adapters / f"checkpoint-{step}", is_trainable=True
        ).eval()
        rows = [naive(model, GA, f, r) for f, r in zip(FORGET, RETAIN, strict=True)]
        expected = np.mean([reference.inner(g["objective"], g["retain"]) for g in rows])
        assert effects(run)[step, "retaining"] == pytest.approx(expected, rel=1e-4)
    # With B at zero nothing reaches A: no length, no angle.
    norm = run.gram()[0, :, 1, 1]
    angle = cosine(run, "forget", "retain", by="parameter").query("step == 0")
    for parameter, squared, row in zip(run.layers, norm, angle["value"], strict=True):
        at_start = parameter.module.endswith("lora_A")
        assert (squared == 0) == at_start == np.isnan(row)
    assert predicted_change(run, by="model").query("step == 0")["value"].notna().all()
    assert digests(adapters) == before


def test_a_base_that_has_moved(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "base", tmp_path / "elsewhere")
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-8")
    config = tmp_path / "checkpoint-8" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "base_model_name_or_path": "gone/away"}))
    model = Loader(base=tmp_path / "elsewhere").load(tmp_path / "checkpoint-8")
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 8


@pytest.mark.parametrize("said", ["{", "[]", "{}", "7"])
def test_an_adapter_that_names_no_base_is_named(tmp_path: Path, said: str) -> None:
    (tmp_path / "adapter_config.json").write_text(said)
    with pytest.raises(
        ValueError, match=r"adapter_config\.json` should say as .* Found: .*\. Copy"
    ):
        base_of(tmp_path)


@pytest.mark.parametrize("said", ["{", ""])
def test_a_tokenizer_that_is_cut_off_is_named(tmp_path: Path, said: str) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text(said)
    (tmp_path / "tokenizer_config.json").write_text(said)
    with pytest.raises(ValueError, match=r"should hold a whole tokenizer\. Found: .*\. Copy"):
        tokenizer_of([tmp_path])


def test_a_base_that_an_adapter_is_not_for(adapters: Path, tmp_path: Path) -> None:
    """Of another width it is refused in a sentence; of the same it is warned of."""
    folder = adapters / "checkpoint-0"
    for name, change in (("narrow", {"hidden_size": 8}), ("other", {})):
        config = tiny.llama(7).config
        config.update(change)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="should be an adapter for the model in") as refused:
        Loader(base=tmp_path / "narrow").load(folder)
    assert "size mismatch" in str(refused.value) and str(refused.value).count("\n") == 0
    with pytest.warns(UserWarning, match="`base` should be the model .* `.*base`, which is there"):
        Loader(base=tmp_path / "other").load(folder)


@pytest.mark.parametrize("of", ["PeftModel.from_pretrained", "LoraModel.merge_and_unload"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), MemoryError(), RuntimeError()])
def test_where_memory_runs_out_no_adapter_is_refused(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, of: str, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"peft.{of}", fails)
    refuses = type(error) is RuntimeError
    with pytest.raises(ValueError if refuses else type(error)) as raised:
        whole_of(adapters / "checkpoint-0", None, "cpu")
    assert (raised.value is error) != refuses
    assert not refuses or "Found: RuntimeError" in str(raised.value)


def test_adapters_of_another_set_up_are_refused(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-9")
    config = tmp_path / "checkpoint-9" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    loader = Loader()
    loader.load(adapters / "checkpoint-8")
    for other in (tmp_path / "checkpoint-9", adapters / "base"):
        with pytest.raises(ValueError, match="set up in another way"):
            loader.load(other)


def test_peft_is_named_where_it_is_missing(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", without("peft"))
    with pytest.raises(ImportError, match="pip install peft"):
        Loader().load(adapters / "checkpoint-0")


@pytest.mark.parametrize(
    "options",
    [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
    ids=str,
)
def test_the_base_of_adapters_that_change_it_is_read_from_its_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    how = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", **options)
    trained = peft.get_peft_model(loaded(tmp_path / "base"), how)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "checkpoint-2")
    run = replay(
        tmp_path / "checkpoint-2", tmp_path / "run.h5", objective=NPO(beta=0.5),
        forget=FORGET[:2], retain=RETAIN[:2], estimator=same_batch,
        base=tmp_path / "base",
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(
        loaded(tmp_path / "base"), tmp_path / "checkpoint-2", is_trainable=True
    ).eval()
    original = loaded(tmp_path / "base")
    rows = [
        naive(model, NPO(beta=0.5), f, r, original)
        for f, r in zip(FORGET[:2], RETAIN[:2], strict=True)
    ]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[2, "unlearning"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "v_proj"]], ids=str)
def test_adapters_on_head_and_embedding_are_rows_of_one_run(
    targets: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    tiny.llama(seed=1).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(loaded(tmp_path / "base"), config)
    expected = []
    for step in (1, 2):
        torch.manual_seed(step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        rows = [naive(model, GA, f, r) for f, r in zip(FORGET, RETAIN, strict=True)]
        expected.append(np.mean([reference.inner(g["objective"], g["retain"]) for g in rows]))
    run = replay(
        [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], tmp_path / "run.h5",
        objective=GA, forget=FORGET, retain=RETAIN, estimator=same_batch,
        base=tmp_path / "base",
    )  # fmt: skip
    assert run.steps.tolist() == [1, 2]
    for step, value in zip((1, 2), expected, strict=True):
        assert effects(run)[step, "retaining"] == pytest.approx(value, rel=1e-4)


# Not whole


def test_weights_that_a_checkpoint_lacks_are_named(adapters: Path, tmp_path: Path) -> None:
    tiny.llama().model.save_pretrained(tmp_path / "headless")
    says = r"headless` should hold every weight of `LlamaForCausalLM`. Found none .*lm_head.weight"
    with pytest.raises(ValueError, match=says):
        Loader().load(tmp_path / "headless")
    with pytest.raises(ValueError, match=says):  # as the model that adapters are for
        Loader(base=tmp_path / "headless").load(adapters / "checkpoint-8")
    with pytest.raises(ValueError, match=says):
        loading.model_of(tmp_path / "headless")


def test_factors_that_an_adapter_lacks_are_named(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-8")
    file = tmp_path / "checkpoint-8" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers.0" in name and "lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"checkpoint-8` should hold every .*layers.0.*lora_B"):
        Loader(base=adapters / "base").load(tmp_path / "checkpoint-8")


def test_a_model_that_looks_ahead_is_refused_as_it_is_loaded(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"Found `BertLMHeadModel`, whose attention looks ahead"):
        Loader().load(tmp_path / "bert")


def test_weights_that_are_codes_are_refused_and_not_under_an_adapter(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coded(source: object) -> nn.Module:
        model = loaded(adapters / "base")
        norm = model.get_submodule("model.norm")
        norm.codes = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
        return model

    monkeypatch.setattr(loading, "_model_of", coded)
    with pytest.raises(ValueError, match=r"Found `model.norm.codes` .* quantised. Save it deq"):
        Loader().load(adapters / "base")
    Loader(base=adapters / "base").load(adapters / "checkpoint-8")


def in_pieces(folder: Path, seed: int) -> Path:
    tiny.llama(seed=seed).save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("first", [True, False], ids=["first", "behind another"])
def test_the_index_of_an_earlier_save_counts_for_nothing(first: bool, tmp_path: Path) -> None:
    """A model saved whole where one in pieces was: transformers leaves the index there."""
    folder, loader = in_pieces(tmp_path / "checkpoint-2", 1), Loader()
    expected = tiny.llama(seed=2)
    expected.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
    if not first:
        loader.load(in_pieces(tmp_path / "checkpoint-1", 3))
    state = loader.load(folder).state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def without_a_piece(pieces: list[Path]) -> None:
    pieces[1].unlink()


def cut_off(pieces: list[Path]) -> None:
    pieces[1].write_bytes(pieces[1].read_bytes()[:-10])


def exchanged(pieces: list[Path]) -> None:
    """Not those of the index: the second piece holds what the first does."""
    shutil.copy(pieces[0], pieces[1])


@pytest.mark.parametrize("damage", [without_a_piece, cut_off, exchanged])
@pytest.mark.parametrize("first", [True, False], ids=["first", "behind another"])
def test_weights_that_are_not_whole_are_one_error(
    damage: Callable[[list[Path]], None], first: bool, tmp_path: Path
) -> None:
    folder, loader = in_pieces(tmp_path / "checkpoint-2", 1), Loader()
    damage(sorted(folder.glob("*.safetensors")))
    if not first:
        loader.load(in_pieces(tmp_path / "checkpoint-1", 3))
    with pytest.raises(ValueError, match=r"checkpoint-2` should .* Found.*[Ss]ave"):
        loader.load(folder)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_named(
    value: float, adapters: Path, tmp_path: Path
) -> None:
    """Of a checkpoint, the one after it, a reference, a base and an adapter."""
    for seed in (1, 2):
        tiny.llama(seed=seed).save_pretrained(tmp_path / f"checkpoint-{seed}")
    model = tiny.llama(seed=3)
    model.model.norm.weight.data[1] = value
    model.save_pretrained(tmp_path / "checkpoint-3")
    model.save_pretrained(tmp_path / "base")
    says = r"checkpoint-3` should hold finite weights. Found .* `model.norm.weight`.* Leave it out"
    loader = Loader()
    with pytest.raises(ValueError, match=says):
        loader.load(tmp_path / "checkpoint-3")
    loader.load(tmp_path / "checkpoint-1")
    for read in (loader.change, loader.load):
        with pytest.raises(ValueError, match=says):
            read(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=says):
        loading.model_of(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="base` should hold finite weights"):
        Loader(base=tmp_path / "base").load(adapters / "checkpoint-8")
    shutil.copytree(adapters / "checkpoint-8", tmp_path / "checkpoint-8")
    file = tmp_path / "checkpoint-8" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"checkpoint-8` should hold finite weights.* `.*lora_"):
        Loader(base=adapters / "base").load(tmp_path / "checkpoint-8")


def test_a_loss_that_is_not_finite_names_its_checkpoint(tmp_path: Path) -> None:
    """Of finite weights, that no training stands behind whose learning rate could be lowered."""
    for step, scale in ((1, 1.0), (2, 1e38)):
        model = tiny.llama(seed=step, layers=2)
        model.lm_head.weight.data *= scale
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"checkpoint-2` should have finite losses. Found .* out"):
        replay(
            [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], tmp_path / "run.h5",
            objective=GA, forget=FORGET, retain=RETAIN, estimator=same_batch,
        )  # fmt: skip
    assert open_run(tmp_path / "run.h5").state == "open"
