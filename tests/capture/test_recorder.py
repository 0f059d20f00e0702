"""Recording: training ends as it would have ended, and the file says what happened."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import predicted_change
from geffect.objectives import NPO, FrozenModel, SharedForward, WeightedGradientAscent, nll
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.interrupts import hooks_left


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(parameters(a), parameters(b), strict=True):
        assert torch.equal(x, y)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}


# Any two of these meet in every way.
@pytest.mark.parametrize(
    ("method", "update", "optimizer"),
    [
        ("ga", False, "adamw"),
        ("ga", True, "sgd"),
        ("wga", False, "sgd"),
        ("wga", True, "adamw"),
        ("npo", False, "adamw"),
        ("npo", True, "sgd"),
    ],
)
def test_ten_watched_steps_end_bitwise_as_unwatched(
    method: str, update: bool, optimizer: str, tmp_path: Path
) -> None:
    batches = tiny.pairs(10)
    model = tiny.llama()
    objectives: dict[str, Any] = {
        "ga": lambda model, pair: -nll(model, pair["forget"]),
        "wga": WeightedGradientAscent(1.0),
        "npo": partial(NPO(0.1), reference=FrozenModel.copied(model)),
    }
    plain = reference.trained(model, batches, objectives[method], OPTIMIZERS[optimizer])
    stepper = OPTIMIZERS[optimizer](model.parameters())
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        for pair in batches:
            shared = SharedForward(model)
            losses = {"forget": nll(shared, pair["forget"]), "retain": nll(shared, pair["retain"])}
            objective = {"forget": -1.0} if method == "ga" else objectives[method](shared, pair)
            recorder.backward(objective=objective, **losses)
            stepper.step()
            stepper.zero_grad()
    assert_same(model, plain)
    assert len(open_run(tmp_path / "run.h5").steps) == 10


def test_dropout_clipping_and_random_numbers_are_undisturbed(tmp_path: Path) -> None:
    results = []
    for watched in (True, False):
        model = tiny.llama(dropout=0.3).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        recorder = Recorder(model, tmp_path / "run.h5", update=True) if watched else None
        torch.manual_seed(5)
        for pair in tiny.pairs(4):
            forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
            if recorder is None:
                (-forget).backward()
            else:
                recorder.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
            optimizer.zero_grad()
        if recorder is not None:
            recorder.close()
        results.append((model, torch.get_rng_state()))
    assert_same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_clipping_after_the_backward_does_not_reach_the_record(tmp_path: Path) -> None:
    for update in (True, False):
        model, pair = tiny.llama(), tiny.pairs(1)[0]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        exact = reference.gradient(model, -nll(model, pair["forget"]))
        path = tmp_path / f"{update}.h5"
        with Recorder(model, path, update=update) as recorder:
            recorder.backward(objective={"forget": -1.0}, forget=nll(model, pair["forget"]))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        gram = open_run(path).gram()[0].sum(axis=0)
        assert gram[0, 0] == pytest.approx(reference.inner(exact, exact), rel=1e-5)
        if update:
            assert gram[2, 2] ** 0.5 == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_what_is_recorded_of_a_step(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    rectifier = Rectifier(model, ema=0.5)
    losses = []
    with Recorder(model, tmp_path / "run.h5", metadata={"method": "ga", "n": [1]}) as recorder:
        for pair in tiny.pairs(3):
            forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
            losses.append((forget.item(), retain.item()))
            recorder.backward(
                objective={"forget": -1.0, "retain": 0.01},
                forget=forget,
                retain=retain,
                rectifier=rectifier,
            )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [0, 1, 2]
    assert run.sources == ("objective", "forget", "retain", "retain_ema", "rectified")
    assert run.state == "complete"
    assert run.metadata == {"method": "ga", "n": [1]}
    assert run.manifest["losses"]["objective"] == {"forget": -1.0, "retain": 0.01}
    assert run.manifest["rectifier"]["rule"] == "gru"
    assert run.manifest["optimizer"]["class"] == "AdamW"
    assert run.manifest["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]
    assert run.column("lr").tolist() == [1e-3, 1e-3 / 2, 1e-3 / 3]
    assert (np.diff(run.column("wall_seconds")) > 0).all()
    recorded = run.losses()
    assert np.array_equal(np.stack([recorded["forget"], recorded["retain"]], 1), losses)
    np.testing.assert_allclose(
        recorded["objective"], [-f + 0.01 * r for f, r in losses], rtol=1e-12
    )
    assert "retain_ema" not in recorded
    blocks, did = run.rectification()
    assert blocks == ("model",)
    gram = run.gram().sum(axis=1)
    # A combination is recorded in float64 and left in `.grad` in float32.
    np.testing.assert_allclose(did["norm_before"][:, 0] ** 2, gram[:, 0, 0], rtol=1e-7)
    lengths = np.sqrt(gram[:, 0, 0] * gram[:, 3, 3])
    error = np.abs(did["inner_before"][:, 0] - gram[:, 0, 3])
    assert (error <= 1e-6 * lengths).all()
    fired = gram[:, 0, 3] < 0
    assert fired.any()
    np.testing.assert_array_equal(did["fired"][:, 0], fired)
    kappa = np.where(fired, -gram[:, 0, 3] / gram[:, 3, 3], 0)
    error = np.abs(did["coefficient"][:, 0] - kappa)
    assert (error <= 1e-6 * lengths / gram[:, 3, 3]).all()
    after = gram[:, 0, 0] + 2 * kappa * gram[:, 0, 3] + kappa**2 * gram[:, 3, 3]
    np.testing.assert_allclose(did["norm_after"][:, 0] ** 2, after, rtol=1e-6)


def test_the_rectified_gradient_is_left_and_the_raw_one_recorded(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    # The forget risk against itself: the objective is all conflict, and nothing is left of it.
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(
            objective={"forget": -1.0},
            forget=nll(model, pair["forget"]),
            retain=nll(model, pair["forget"]),
            rectifier=Rectifier(model),
        )
    left = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters())
    recorded = open_run(tmp_path / "run.h5").gram()[0].sum(axis=0)
    assert left <= 1e-10 * recorded[0, 0]
    assert recorded[0, 0] == pytest.approx(recorded[1, 1], rel=1e-9)


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_the_update_is_what_the_optimizer_did_after_rectification(
    space: Any, tmp_path: Path
) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped = {"optimizer": optimizer} if space == "update" else {}
    rectifier = Rectifier(model, space=space, ema=0.5, **stepped)
    moved, lengths = [], []
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for pair in tiny.pairs(4):
            before = [p.clone() for p in parameters(model)]
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(model, pair["forget"]),
                retain=nll(model, pair["retain"]),
                rectifier=rectifier,
            )
            optimizer.step()
            optimizer.zero_grad()
            moved.append(
                sum(
                    float(((p - old).double() ** 2).sum())
                    for p, old in zip(parameters(model), before, strict=True)
                )
            )
            lengths.append([float(p.double().norm()) for p in parameters(model)])
    run = open_run(tmp_path / "run.h5")
    k = run.index("update")
    np.testing.assert_allclose(run.lengths(), lengths, rtol=1e-6)
    np.testing.assert_allclose(run.gram()[:, :, k, k].sum(axis=1), moved, rtol=1e-9)
    _, did = run.rectification()
    if space == "update":
        np.testing.assert_allclose(did["norm_after"][:, 0] ** 2, moved, rtol=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_predicted_change_is_the_measured_one_for_small_steps(
    optimizer: str, tmp_path: Path
) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for group in stepper.param_groups:
        group["lr"] *= 1e-2
    falls = []
    with Recorder(model, path, update=True) as recorder:
        for pair in tiny.pairs(5):
            before = {side: nll(model, batch).item() for side, batch in pair.items()}
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(model, pair["forget"]),
                retain=nll(model, pair["retain"]),
            )
            stepper.step()
            stepper.zero_grad()
            falls.append({s: before[s] - nll(model, b).item() for s, b in pair.items()})
    table = predicted_change(open_run(path), by="model")
    for risk in ("forget", "retain"):
        predicted = table[table["risk"] == risk]["value"].to_numpy()
        measured = np.array([fall[risk] for fall in falls])
        # A change near zero has no relative error; the run's own size is the scale.
        error = np.abs(predicted - measured) / np.maximum(np.abs(measured), np.abs(measured).mean())
        assert error.max() < 0.05, (risk, predicted, measured)


def test_an_optimizer_of_another_model_is_none_of_its_business(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    stranger = torch.optim.SGD(other.parameters(), lr=0.7)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        recorder.backward(objective=model(torch.ones(2)).sum())
        other(torch.ones(2)).sum().backward()
        stranger.step()
    run = open_run(tmp_path / "run.h5")
    assert np.isnan(run.column("lr")).all()
    assert np.isnan(run.gram()[0, 0, run.index("update")]).all()
    assert np.isfinite(run.gram()[0, 0, 0, 0])


def test_a_step_is_committed_as_soon_as_the_optimizer_has_taken_it(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, tmp_path / "run.h5")
    for count in (1, 2, 3):
        optimizer.zero_grad()
        recorder.backward(objective=model(torch.ones(2)).sum())
        optimizer.step()
        assert len(open_run(tmp_path / "run.h5").steps) == count
        assert open_run(tmp_path / "run.h5").state == "open"
    recorder.close()
    assert open_run(tmp_path / "run.h5").state == "complete"


def test_a_closed_recorder_leaves_no_hooks_behind(tmp_path: Path) -> None:
    before = hooks_left(nn.Linear(2, 1))
    with Recorder(nn.Linear(2, 1), tmp_path / "run.h5"):
        assert len(hooks_left(nn.Linear(2, 1))) == len(before) + 2
    assert hooks_left(nn.Linear(2, 1)) == before


def test_a_source_absent_at_a_step_is_nan_not_zero(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        for with_retain in (True, False):
            losses = {"objective": model(torch.ones(2)).sum()}
            if with_retain:
                losses["retain"] = model(-torch.ones(2)).sum()
            recorder.backward(**losses)
    gram = open_run(tmp_path / "run.h5").gram()
    assert np.isfinite(gram[0]).all()
    assert np.isfinite(gram[1, :, 0, 0]).all()
    assert np.isnan(gram[1, :, 1]).all() and np.isnan(gram[1, :, :, 1]).all()


def test_several_optimizers_make_one_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for _ in range(3):
            recorder.backward(objective=model(torch.ones(2)).sum())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    run = open_run(tmp_path / "run.h5")
    gram, k = run.gram(), run.index("update")
    assert len(run.steps) == 3
    np.testing.assert_allclose(gram[:, :, k, k], 0.01 * gram[:, :, 0, 0], rtol=1e-3)
    assert (gram[:, :, k, k].sum(axis=0) > 0).all()


def test_the_weights_of_a_loss_stay_those_of_the_first_step(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)

    def step(recorder: Recorder, weight: float) -> None:
        loss = model(torch.ones(2)).sum()
        recorder.backward(objective={"forget": weight}, forget=loss)

    with Recorder(model, tmp_path / "run.h5") as recorder:
        step(recorder, -1.0)
        model.zero_grad()
        with pytest.raises(ValueError, match=r"loss `objective` should stay .*-1.0.* Found .*-2.0"):
            step(recorder, -2.0)
        assert model.weight.grad is None
        step(recorder, -1.0)
    with (
        Recorder(model, tmp_path / "run.h5", resume=True) as recorder,
        pytest.raises(ValueError, match="weights of loss `objective` should stay"),
    ):
        step(recorder, 1.0)
    assert len(open_run(tmp_path / "run.h5").steps) == 2


def test_a_step_that_a_scaler_skips_has_no_update(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for factor in (1.0, float("inf")):
            recorder.backward(objective=scaler.scale(model(torch.ones(2)).sum()))
            model.weight.grad *= factor
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    run = open_run(tmp_path / "run.h5")
    k = run.index("update")
    assert np.isfinite(run.gram()[0, 0, k, k])
    assert np.isnan(run.gram()[1, 0, k, k])
    assert np.isnan(run.column("lr")).tolist() == [False, True]


def test_an_optimizer_of_a_part_is_written_at_its_step_and_a_hand_later(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for count in range(3):
            recorder.backward(objective=model(torch.ones(2)).sum())
            optimizer.step()
            with torch.no_grad():
                model[0].weight += 5  # an update is what moved, whoever moved it
            model.zero_grad()
            if count:
                assert len(open_run(tmp_path / "run.h5").steps) == count + 1
    run = open_run(tmp_path / "run.h5")
    gram, k = run.gram(), run.index("update")
    np.testing.assert_allclose(gram[:, :2, k, k], [[100.0, 0.0]] * 3, rtol=1e-6)
    assert run.stepped().tolist() == [[True, False, True, True]] * 3
    np.testing.assert_allclose(gram[:, 2:, k, k], 0.01 * gram[:, 2:, 0, 0], rtol=1e-3)


def test_a_step_that_could_not_be_rectified_is_not_recorded(tmp_path: Path) -> None:
    def broken(K: torch.Tensor) -> torch.Tensor:
        return torch.full((len(K), 2), torch.nan, dtype=K.dtype)

    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        loss = model(torch.ones(2)).sum()
        with pytest.raises(ValueError, match="finite weights"):
            recorder.backward(
                objective={"retain": -1.0}, retain=loss, rectifier=Rectifier(model, broken)
            )
        model.zero_grad()
        recorder.backward(objective=model(torch.ones(2)).sum())
    assert open_run(tmp_path / "run.h5").sources == ("objective",)


def test_an_unknown_column_is_no_damage(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=model(torch.ones(2)).sum())
    with pytest.raises(ValueError, match=r"one of request, step, batch.* Found `rate`. Choose"):
        open_run(tmp_path / "run.h5").column("rate")
