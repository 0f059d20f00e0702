"""Risks beside the objective: what a trainer computes of them leaves its training as it was."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, open_run
from geffect.objectives import NPO, GradientAscent, Objective
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import tiny
from tests.utils.trainers import same
from tests.utils.unlearning_runs import arguments

Item = dict[str, Tensor]


def items(count: int, seed: int) -> list[Item]:
    rows = [tiny.batch(seed + i, rows=1) for i in range(count)]
    return [{name: value[0] for name, value in row.items()} for row in rows]


FORGET, RETAIN = items(4, 0), items(6, 100)


class Norm(nn.Module):
    """Batch statistics where a Llama has its last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(16)

    def forward(self, states: Tensor) -> Tensor:
        return self.bn(states.mT).mT


def with_statistics() -> nn.Module:
    model = tiny.llama()
    model.model.norm = Norm()
    return model


def with_power_iterations() -> nn.Module:
    model = tiny.llama()
    nn.utils.parametrizations.spectral_norm(model.lm_head)
    return model


def trained(
    folder: Path, model: nn.Module, objective: Objective, recorded: bool, **data: Any
) -> UnlearningTrainer:
    trainer = UnlearningTrainer(
        model,
        arguments(folder, gradient_accumulation_steps=1, optim="adamw_torch"),
        objective=objective,
        **{"forget": FORGET, "retain": RETAIN, **data},
        recorder=partial(Recorder, path=folder / "run.h5") if recorded else None,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("make", [with_statistics, with_power_iterations])
def test_buffers_end_as_they_would_have_ended_unrecorded(make: Any, tmp_path: Path) -> None:
    ends = []
    for recorded in (False, True):
        model = make()
        start = [buffer.clone() for buffer in model.buffers()]
        trained(tmp_path, model, NPO(), recorded)
        ends.append([{**dict(model.named_parameters()), **dict(model.named_buffers())}])
        assert not all(torch.equal(a, b) for a, b in zip(start, model.buffers(), strict=True))
    assert same(*ends)
    assert open_run(tmp_path / "run.h5").sources == ("objective", "forget", "retain")


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_batch_without_answers_is_refused_alike(
    side: str, recorded: bool, tmp_path: Path
) -> None:
    model = tiny.llama()
    before = [p.detach().clone() for p in model.parameters()]
    unanswered = [
        {**item, "labels": torch.full_like(item["labels"], -100)} for item in items(6, 200)
    ]
    with pytest.raises(ValueError, match=f"`{side}` should have an answer token.*in 2 samples"):
        trained(tmp_path, model, GradientAscent(), recorded, **{side: unanswered})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_evaluated_set_without_answers_is_refused(tmp_path: Path) -> None:
    unanswered = [{**item, "labels": torch.full_like(item["labels"], -100)} for item in FORGET]
    trainer = UnlearningTrainer(
        tiny.llama(), arguments(tmp_path), objective=NPO(), forget=FORGET, retain=RETAIN
    )
    with pytest.raises(ValueError, match="should have an answer token in each set"):
        trainer.evaluate(unanswered)


def test_the_risks_of_an_encoder_decoder_are_its_own_losses(tmp_path: Path) -> None:
    rows = {name: tiny.translation(seed, rows=4) for seed, name in enumerate(("forget", "retain"))}
    sets = {
        name: [{k: v[i] for k, v in of_set.items()} for i in range(4)]
        for name, of_set in rows.items()
    }
    for of_set in sets.values():  # inputs and labels as long as each other, for the collator
        for item in of_set:
            item["labels"] = nn.functional.pad(item["labels"], (0, 3), value=-100)
    model = tiny.t5().eval()
    own = {name: model(**of_set).loss.item() for name, of_set in rows.items()}
    trainer = UnlearningTrainer(model, arguments(tmp_path), objective=NPO(), **sets)
    metrics = trainer.evaluate()
    for name, loss in own.items():
        assert metrics[f"eval_{name}_nll"] == pytest.approx(loss, rel=1e-6)
