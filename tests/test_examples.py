"""Every example runs: in the docstrings, and in the README."""

import doctest
import importlib
import os
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

import geffect
from geffect import Run
from geffect.analysis import conflict, cosine, g_effect, predicted_change, violation
from geffect.store import validate
from tests.utils import tiny, trainers, unlearning_trainers

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

MODULES = sorted(
    {"geffect", *(m.name for m in pkgutil.walk_packages(geffect.__path__, "geffect."))}
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, example_run: Callable[..., Run]) -> None:
    module = importlib.import_module(name)
    known = {"example_run": example_run}
    assert doctest.testmod(module, extraglobs=known, optionflags=OPTIONS).failed == 0


def test_there_are_examples_to_run() -> None:
    assert {"geffect.analysis.g_effect", "geffect.plots.heatmap"} <= set(MODULES)


def test_the_run_of_the_examples_is_a_run(example_run: Callable[..., Run]) -> None:
    run = example_run(update=True)
    assert validate(run.path).whole
    assert (abs(run.gram() - run.gram().swapaxes(-1, -2)) == 0).all()
    values = {
        "unlearning": g_effect(run, "model").query("effect == 'unlearning'"),
        "retaining": g_effect(run, "model").query("effect == 'retaining'"),
        "cosine": cosine(run, "forget", "retain", "model"),
        "conflict": conflict(run, by="model"),
        "forget": predicted_change(run, "model").query("risk == 'forget'"),
        "retain": predicted_change(run, "model").query("risk == 'retain'"),
        "violation": violation(run),
    }
    said = [-4.0, -1.0, 0.5, 1.0, -0.4, -0.1, 1.0]
    assert [table["value"].item() for table in values.values()] == pytest.approx(said)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert blocks, "README.md should have examples in Python. Found none."
    monkeypatch.chdir(tmp_path)
    model = tiny.llama()
    sides = {side: [pair[side] for pair in tiny.pairs(3)] for side in ("forget", "retain")}
    names = {
        "accelerator": Accelerator(cpu=True),
        "training_arguments": TrainingArguments(
            str(tmp_path / "our trainer"), num_train_epochs=1, use_cpu=True, report_to=[]
        ),
        "model": model,
        "batches": tiny.pairs(3),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "forget_batches": sides["forget"],
        "retain_batches": sides["retain"],
        "trainer": trainers.trainer(tmp_path / "trainer", tiny.llama()),
        "tokenizer": None,
        "unlearning_trainer": unlearning_trainers.unlearner(tmp_path / "their trainer"),
        "forget_items": trainers.samples(4),
        "retain_items": trainers.samples(6, seed=50),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert {"run.h5", "run.png", "trained.h5", "unlearned.h5"} <= set(os.listdir(tmp_path))
