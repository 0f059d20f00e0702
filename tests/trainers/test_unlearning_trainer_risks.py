"""Risks beside the objective: what a trainer computes of them leaves its training as it was."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.objectives import NPO, GradDiff, GradientAscent, Objective, WeightedGradientAscent
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import shallow as tiny
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


# Several answers inside of a side

NESTED = [{"original": f, "alternate": a} for f, a in zip(FORGET, items(4, 300), strict=True)]


@pytest.mark.parametrize("objective", [NPO(), WeightedGradientAscent()])
def test_the_risk_of_several_answers_is_that_of_the_original(
    objective: Objective, tmp_path: Path
) -> None:
    """Training, rows, rectification and evaluation are those of the originals alone."""
    found = []
    for forget in (FORGET, NESTED):
        model = tiny.llama()
        trainer = UnlearningTrainer(
            model, arguments(tmp_path), objective=objective, forget=forget, retain=RETAIN,
            rectifier=Rectifier(model),
            recorder=partial(Recorder, path=tmp_path / "run.h5", overwrite=True),
        )  # fmt: skip
        trainer.train()
        run = open_run(tmp_path / "run.h5")
        nlls = {k: v for k, v in trainer.evaluate().items() if k.endswith("nll")}
        found.append((dict(model.named_parameters()), run.sources, run.gram(), nlls))
    (flat, *of_flat), (nested, *of_nested) = found
    assert same([flat], [nested]) and of_flat[0] == of_nested[0] and of_flat[2] == of_nested[2]
    assert (of_flat[1] == of_nested[1]).all()


def test_an_answer_inside_of_a_side_may_be_weighed(tmp_path: Path) -> None:
    """The alternate in place of the answer is the risk on it, and is recorded as that."""
    ends = []
    for forget, objective in [
        (NESTED, {"forget.alternate": 1.0}),
        ([item["alternate"] for item in NESTED], {"forget": 1.0}),
    ]:
        model = tiny.llama()
        path = tmp_path / f"{len(ends)}.h5"
        UnlearningTrainer(
            model, arguments(tmp_path), objective=objective, forget=forget, retain=RETAIN,
            recorder=partial(Recorder, path=path),
        ).train()  # fmt: skip
        run = open_run(path)
        ends.append((dict(model.named_parameters()), run))
    (nested, run), (flat, other) = ends
    assert same([nested], [flat])
    assert run.sources == ("objective", "forget.alternate", "forget", "retain")
    assert (run.gram()[:, :, 1, 1] == other.gram()[:, :, 1, 1]).all()


@pytest.mark.parametrize(
    ("forget", "objective", "says"),
    [
        (FORGET, {"forget.alternate": 1.0}, r"Items of `forget` should have the answers.*"
         r"takes forget\.alternate, and items without\. Pass items such as"),
        (NESTED, {"forget.third": 1.0}, r"takes forget\.third, and items without"),
        ([{"rejected": FORGET[0]}], NPO(), r"should have the `original` among them.*"
         r"Found forget\.rejected\. Name that answer"),
        (NESTED, {"world": 1.0}, "takes world as well"),
    ],
)  # fmt: skip
def test_answers_that_are_not_there_are_refused_at_once(
    forget: Any, objective: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        UnlearningTrainer(
            tiny.llama(), arguments(tmp_path), objective=objective, forget=forget, retain=RETAIN
        )


def test_a_reference_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    says = "`reference` of NPO should be the model as it was .* Found `LlamaForCausalLM`. Pass"
    with pytest.raises(ValueError, match=says):
        trained(tmp_path, tiny.llama(), NPO(), False, reference=tiny.llama())


@pytest.mark.parametrize("recorded", [False, True])
def test_pairs_without_a_side_that_is_taken_are_refused(recorded: bool, tmp_path: Path) -> None:
    pairs = [{"forget": item} for item in FORGET]
    data = {"train_dataset": pairs, "forget": None, "retain": None}
    says = r"of the sets forget\. Found GradDiff.*takes retain as well\. Add retain to the items of"
    with pytest.raises(ValueError, match=says):
        trained(tmp_path, tiny.llama(), GradDiff(), recorded, **data)
