"""Controls that hide, and runs whose objective is differentiated at a relearned copy."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from geffect import open_run
from geffect.demo.columns import PROBED
from geffect.demo.data import Data
from geffect.demo.hiding import HIDING, all_trained, name_tokens
from geffect.demo.methods import EQUAL, RIVALS, RunSpec
from geffect.demo.plan import Plan
from geffect.demo.unlearning import unlearn
from tests.utils.subject import TINY

Unlearn = Callable[..., dict[str, Any]]

LEVELS = {"forget_nll": 0.0175, "value_nll": 0.0712}
"""A little above what the tiny model has; steps at a copy that knows the facts begin small."""


@pytest.fixture(scope="module")
def unlearned(
    subject: tuple[PreTrainedModel, Data], tmp_path_factory: pytest.TempPathFactory
) -> Unlearn:
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, levels: dict[str, float], **changed: Any) -> dict[str, Any]:
        model = copy.deepcopy(subject[0])
        variant = {**RIVALS, **HIDING}[name]
        config = replace(TINY.unlearning, **changed)
        spec = RunSpec(EQUAL, "wga", name, variant.learning_rates[0], 1)
        file = folder / f"{name}.h5"
        told = unlearn(model, subject[1], spec, variant, config, levels, file, lambda *_: None)
        return told | {"model": model, "file": file}

    return run


def moved(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, torch.Tensor]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name: a != b for (name, a), b in pairs if not torch.equal(a, b)}


def test_the_last_block_alone_is_trained(
    subject: tuple[PreTrainedModel, Data], unlearned: Unlearn
) -> None:
    after = unlearned("last-block", {"forget_nll": 1e3}, most_steps=2)["model"]
    names = moved(subject[0], after)
    assert names and all(name.startswith("model.layers.0.") for name in names)


def test_the_rows_of_names_alone_are_trained(
    subject: tuple[PreTrainedModel, Data], unlearned: Unlearn
) -> None:
    model, data = subject
    rows = name_tokens(data.corpus, data.tokenizer)
    words = {word for fact in data.corpus.forget for word in fact.subject.split()}
    assert rows and all(data.tokenizer.decode([row]).strip() in "".join(words) for row in rows)
    for fact in data.corpus.kept:
        ids = data.tokenizer(f"{fact.question} {fact.answer}")["input_ids"]
        assert not {*ids} & {*rows}
    found = moved(model, unlearned("name-rows", {"forget_nll": 1e3}, most_steps=2)["model"])
    ((name, where),) = found.items()
    assert name == "model.embed_tokens.weight"
    assert {*where.any(dim=1).nonzero().flatten().tolist()} == {*rows}


def test_an_attack_trains_all() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(KeyError), all_trained([*layer.parameters()]):
        assert layer.bias.requires_grad
        raise KeyError
    assert layer.weight.requires_grad and not layer.bias.requires_grad


def test_a_run_at_a_copy_is_compared_at_equal_loss_of_the_values(unlearned: Unlearn) -> None:
    told = unlearned("select-relearned", LEVELS, most_steps=12)
    assert told["at_level"]["forget_nll"] == pytest.approx(LEVELS["forget_nll"], abs=5e-4)
    assert told["at_value"]["step"] > 0
    assert all(told["at_level"][name] is not None for name in PROBED)
    run = open_run(told["file"])
    assert run.manifest["relearned"]["relearns"] == "a loss of its own"
    assert run.manifest["losses"]["objective"] == "loss"


def test_what_a_plan_probes(tmp_path: Path) -> None:
    look, named = Plan(), Plan(named=("plain", "select-relearned", "name-rows"))
    assert {look.levels(spec) for spec in look.specs()} == {("forget_nll",)}
    assert {named.levels(spec) for spec in named.specs()} == {("forget_nll", "value_nll")}
    controls = [spec for spec in Plan(controls=True).specs() if spec.part == "controls that hide"]
    assert [spec.variant for spec in controls] == [*HIDING]
    assert not any(spec.compared for spec in look.specs())
    assert all(spec.compared for spec in Plan(edits=("ssd",)).specs())
