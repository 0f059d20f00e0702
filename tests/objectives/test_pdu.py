"""PDU against a loop, and its dual variable step by step."""

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from geffect import Recorder, Rectifier, distributed, open_run
from geffect.objectives import PDU, named
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference, two_ranks
from tests.utils import shallow as tiny
from tests.utils.sides import items_of
from tests.utils.unlearning_runs import arguments


def test_it_is_its_formula() -> None:
    model, pair = tiny.gpt2(), tiny.pairs(1)[0]
    batch = pair["forget"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    gaps = [
        (logits[row, i - 1].max() - sum(logits[row, i - 1]) / tiny.VOCABULARY) ** 2
        for row, labels in enumerate(batch["labels"])
        for i, label in enumerate(labels)
        if i > 0 and label != -100
    ]
    expected = torch.stack(gaps).mean() + 0.7 * reference.nll(model, pair["retain"])
    loss = PDU(dual=0.7)(model, pair)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, gradient = reference.gradient(model, loss), reference.gradient(model, expected)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-14)


def test_the_numbers_of_open_unlearning() -> None:
    """An answer with p = (.9, .5, .2) among 6 words, and a uniform prediction behind it."""
    p = torch.tensor([0.9, 0.5, 0.2, 1 / 6], dtype=torch.float64)
    logits = ((1 - p) / 5).log()[None, :, None].repeat(1, 1, 6)
    logits[..., 0] = p.log()
    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, 0, 0, 0]])}

    def model(input_ids: torch.Tensor) -> object:
        return SimpleNamespace(logits=logits)

    gaps = [(5 / 6 * math.log(5 * q / (1 - q))) ** 2 for q in p.tolist()]
    for objective, value, printed in (
        (PDU(dual=0.0), sum(gaps[:3]) / 3, 3.965),
        (PDU(dual=0.0, legacy_mask=True), sum(gaps[1:]) / 3, 0.611),
    ):
        loss = objective(model, {"forget": batch, "retain": batch}).item()
        assert loss == pytest.approx(value, abs=1e-6)
        assert value == pytest.approx(printed, abs=6e-4)


def dual_of(path: Path) -> list[float]:
    """Its value in every row; the four statistics of one number are that number."""
    found = open_run(path).weights()["dual variable"]
    assert all(np.array_equal(values, found["mean"]) for values in found.values())
    return list(map(float, found["mean"]))


@pytest.mark.parametrize(
    "options",
    [{}, {"epsilon": 0.5, "step": 0.3}, {"dual": 0.0, "epsilon": 9.0}, {"warmup": 2, "rise": 0.0}],
    ids=repr,
)
def test_its_dual_variable_is_that_of_its_rule(options: dict[str, Any], tmp_path: Path) -> None:
    model, pairs = tiny.llama(), tiny.pairs(4)
    objective = named("pdu", options)
    running = objective.begin(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected, risks = [], []
    alpha = options.get("dual", 1.0)
    with Recorder(model, tmp_path / "run.h5", objective=objective) as recorder:
        for pair in pairs:
            expected.append(alpha)
            risks.append(reference.nll(model, pair["retain"]).item())
            recorder.backward(
                objective=partial(running, model, pair),
                weights=partial(running.implicit_weights, model, pair),
            )
            optimizer.step()
            optimizer.zero_grad()
            running.advance()
            bound = options.get("epsilon", risks[0] + options.get("rise", 0.1))
            if len(risks) > options.get("warmup", 0):
                alpha = max(0.0, alpha + options.get("step", 1.0) * (risks[-1] - bound))
    assert dual_of(tmp_path / "run.h5") == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_step_that_nobody_took_a_loss_for_changes_nothing() -> None:
    running = PDU(epsilon=0.0).begin(tiny.gpt2())
    running.advance()
    with torch.no_grad():
        running(tiny.gpt2(), tiny.pairs(1)[0])
    running.advance()
    assert running.of_step()["dual variable"].item() == 1.0
    assert PDU().of_step() == {} == PDU().state_dict()


def train(
    folder: Path,
    *,
    path: Path | None = None,
    steps: int = 4,
    resume: str | None = None,
) -> tuple[Any, UnlearningTrainer]:
    sets = items_of(named("pdu"), 8)
    trainer = UnlearningTrainer(
        tiny.llama(),
        arguments(
            folder, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=2,
        ),
        objective="pdu", forget=sets["forget"], retain=sets["retain"],
        recorder=None if path is None else partial(Recorder, path=path),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return copy.deepcopy(trainer.model.state_dict()), trainer


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_trainer_moves_it_once_a_step_and_goes_on_with_it(tmp_path: Path) -> None:
    plain, unwatched = train(tmp_path / "plain")
    watched, trainer = train(tmp_path / "watched", path=tmp_path / "run.h5")
    assert same(plain, watched)
    values = dual_of(tmp_path / "run.h5")
    assert len(values) == 4 and values[0] == 1.0 and len(set(values)) == 4
    assert unwatched._running.state_dict() == trainer._running.state_dict()
    resumed, again = train(
        tmp_path / "watched", path=tmp_path / "run.h5",
        resume=str(tmp_path / "watched" / "out" / "checkpoint-2"),
    )  # fmt: skip
    assert same(plain, resumed) and dual_of(tmp_path / "run.h5") == values
    assert again._running.state_dict() == trainer._running.state_dict()
    unwatched.train()  # a run of its own
    assert unwatched._running.state_dict()["pdu_dual"]["steps"] == 4
    (tmp_path / "watched" / "out" / "checkpoint-2" / "objective.pt").unlink()
    with pytest.raises(ValueError, match=r"should have `objective.pt`, what PDU had of its run"):
        train(tmp_path / "watched", resume=str(tmp_path / "watched" / "out" / "checkpoint-2"))


def test_a_trainer_takes_the_mean_risk_of_its_micro_batches(tmp_path: Path) -> None:
    _, trainer = train(tmp_path, path=tmp_path / "run.h5", steps=1)
    risk = float(open_run(tmp_path / "run.h5").losses()["retain"][0])
    state = trainer._running.state_dict()["pdu_dual"]
    assert state["bound"] == pytest.approx(risk + 0.1, rel=1e-6)
    assert state["value"] == pytest.approx(1.0 - 0.1, rel=1e-5)


def test_a_rectifier_takes_its_parts_apart(tmp_path: Path) -> None:
    model = tiny.llama()
    sets = items_of(named("pdu"), 4)
    trainer = UnlearningTrainer(
        model, arguments(tmp_path, max_steps=3), objective="pdu", forget=sets["forget"],
        retain=sets["retain"], rectifier=Rectifier(model),
        recorder=partial(Recorder, path=tmp_path / "run.h5"),
    )  # fmt: skip
    trainer.train()
    run = open_run(tmp_path / "run.h5")
    assert {"objective", "objective.forget", "objective.retain", "retain"} <= {*run.sources}
    losses = run.losses()
    expected = np.array(dual_of(tmp_path / "run.h5")) * losses["retain"]
    np.testing.assert_allclose(losses["objective.retain"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["dual", "step", "rise", "warmup", "epsilon"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much", True])
def test_a_value_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"`{name}` of PDU should be a number of 0 or more. Found"
    ):
        PDU(**{name: value})


def test_a_warm_up_of_half_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`warmup` of PDU should be a whole number of steps. Fo"):
        PDU(warmup=0.5)  # type: ignore[arg-type]


def value_of_two() -> float:
    """The dual variable of one of two processes, which see other risks."""
    running = PDU(epsilon=0.5).begin(tiny.gpt2())
    assert running.variable is not None
    for risk in (1.0, 2.0 + distributed.rank()):
        running.variable.see(torch.tensor(risk))
    running.advance()
    return running.variable.value


def test_two_processes_have_one_dual_variable() -> None:
    assert two_ranks.run(value_of_two) == [1.0 + (1.5 + 2.0) / 2 - 0.5] * 2


def test_a_state_of_another_objective_is_refused() -> None:
    running = PDU().begin(tiny.gpt2())
    with pytest.raises(
        ValueError, match=r"should be of pdu_dual. Found that of rmu_target. Resume"
    ):
        running.load_state_dict({"rmu_target": {}})


def test_a_risk_that_is_no_number_is_not_taken_for_nothing() -> None:
    running = PDU(epsilon=0.5).begin(tiny.gpt2())
    assert running.variable is not None
    running.variable.see(torch.tensor(float("nan")))
    running.advance()
    assert math.isnan(running.of_step()["dual variable"].item())
