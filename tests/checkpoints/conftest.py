"""Folders of checkpoints."""

import copy
from pathlib import Path

import pytest
import torch

from tests.utils import tiny


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a tiny tied Llama with dropout."""
    folder = tmp_path_factory.mktemp("run")
    for step in (5, 10, 15):
        tiny.llama(seed=step, tied=True, dropout=0.5).save_pretrained(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter as it is at the start, and one that has been trained."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny.llama(seed=1)
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.base_model.model.config._name_or_path = str(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "checkpoint-0")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "checkpoint-8")
    return folder
