"""Windows of micro-batches, steps that are left out, and what else a step is told."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.capture import at, every, logspaced
from geffect.objectives import nll
from tests.utils import reference
from tests.utils import shallow as tiny

WINDOWS = [[0, 1, 2], [3, 4]]  # the last one is partial


def watched_windows(model: nn.Module, recorder: Recorder) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pairs = tiny.pairs(5)
    for window in WINDOWS:
        for i in window:
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(model, pairs[i]["forget"]) / len(window),
                retain=nll(model, pairs[i]["retain"]) / len(window),
                accumulate=i != window[-1],
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


def plain_windows(model: nn.Module) -> list[dict[str, Tensor]]:
    """The same unwatched; the exact objective gradient of each window."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pairs, exact = tiny.pairs(5), []
    for window in WINDOWS:
        for i in window:
            loss = -(nll(model, pairs[i]["forget"]) / len(window))
            nll(model, pairs[i]["retain"])  # its dropout draws random numbers too
            loss.backward()
        exact.append({n: p.grad.clone() for n, p in model.named_parameters()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return exact


@pytest.mark.parametrize("update", [False, True])
def test_a_window_is_one_row_of_the_gradient_that_is_stepped(update: bool, tmp_path: Path) -> None:
    start = tiny.llama(dropout=0.2).train()
    plain, watched = copy.deepcopy(start), copy.deepcopy(start)
    torch.manual_seed(3)
    exact = plain_windows(plain)
    torch.manual_seed(3)
    with Recorder(watched, tmp_path / "run.h5", update=update) as recorder:
        watched_windows(watched, recorder)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [0, 1]
    assert run.column("n_micro").tolist() == [3, 2]
    for step, gradient in enumerate(exact):
        squared = run.gram()[step, :, 0, 0].sum()
        assert squared == pytest.approx(reference.inner(gradient, gradient), rel=1e-6)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("objective", [{"forget": -1.0}, {"forget": -1.0, "retain": 0.5}])
def test_a_window_that_streams_is_that_of_whole_gradients(
    objective: dict[str, float], asked: bool, tmp_path: Path
) -> None:
    grams, grads = [], []
    for update in (False, True):
        model, pairs = tiny.llama(), tiny.pairs(3)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        with Recorder(model, tmp_path / f"{update}.h5", update=update) as recorder:
            for i, pair in enumerate(pairs):
                losses: dict[str, Any] = {s: partial(nll, model, b) for s, b in pair.items()}
                if not asked:
                    losses = {side: ask() for side, ask in losses.items()}
                recorder.backward(objective=objective, **losses, accumulate=i < 2)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # is none of the record's
        grads.append([p.grad for p in model.parameters()])
        grams.append(open_run(tmp_path / f"{update}.h5").gram()[0, :, :3, :3])
    exact = {
        side: [reference.gradient(model, nll(model, pair[side])) for pair in pairs]
        for side in ("forget", "retain")
    }
    for index, name in enumerate(exact["forget"][0]):
        f, r = (sum(g[name].double() for g in exact[side]).flatten() for side in exact)
        o = sum(w * v for w, v in zip(objective.values(), (f, r), strict=False))
        rows = torch.stack([o, f, r])
        np.testing.assert_allclose(grams[0][index], rows @ rows.T, rtol=1e-4, atol=1e-9)
    assert np.array_equal(*grams)
    assert all(map(torch.equal, *grads))


def test_a_rectifier_sees_the_whole_window(tmp_path: Path) -> None:
    start = tiny.llama()
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    pairs = tiny.pairs(3)
    losses = {
        side: sum(nll(whole, pair[side]) for pair in pairs) / 3 for side in ("forget", "retain")
    }
    Rectifier(whole).backward(objective=-losses["forget"], retain=losses["retain"])
    rectifier = Rectifier(parts)
    with Recorder(parts, tmp_path / "run.h5") as recorder:
        for i, pair in enumerate(pairs):
            recorder.backward(
                objective={"forget": -1.0},
                forget=nll(parts, pair["forget"]) / 3,
                retain=nll(parts, pair["retain"]) / 3,
                rectifier=rectifier,
                accumulate=i < 2,
            )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    assert open_run(tmp_path / "run.h5").column("n_micro").tolist() == [3]


def test_the_micro_batches_of_a_step_have_the_same_losses(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(
            objective=-nll(model, pair["forget"]),
            retain=nll(model, pair["retain"]),
            accumulate=True,
        )
        with pytest.raises(ValueError, match=r"same losses, .* Found objective, retain and then"):
            recorder.backward(objective=-nll(model, pair["forget"]))


@pytest.mark.parametrize("update", [False, True])
def test_steps_that_are_not_captured_train_alike_and_leave_no_row(
    update: bool, tmp_path: Path
) -> None:
    start, pairs = tiny.llama(), tiny.pairs(7)
    plain = reference.trained(
        start,
        pairs,
        lambda model, pair: -nll(model, pair["forget"]),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
    )
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    due = []
    with Recorder(model, tmp_path / "run.h5", when=every(3), update=update) as recorder:
        for pair in pairs:
            due.append(recorder.due)
            risks = {"retain": nll(model, pair["retain"])} if recorder.due else {}
            recorder.backward(
                objective={"forget": -1.0}, forget=nll(model, pair["forget"]), **risks
            )
            optimizer.step()
            optimizer.zero_grad()
        assert recorder.next_step == 7
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [step for step, is_due in enumerate(due) if is_due] == [0, 3, 6]
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [0, 3, 6]
    assert np.isfinite(run.gram()).all()


def test_a_risk_that_is_not_due_costs_no_pass(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    passes = []
    with Recorder(model, tmp_path / "run.h5", when=at(1)) as recorder:
        for _ in range(2):
            losses = {name: nll(model, pair[name]) for name in ("forget", "retain")}
            for name, loss in losses.items():
                loss.register_hook(lambda grad, name=name: passes.append(name))
            recorder.backward(objective={"forget": -1.0}, **losses)
    assert passes == ["forget", "forget", "retain"]


def test_schedules_are_asked_for_what_can_be_had() -> None:
    assert [s for s in range(1000) if logspaced(4, 1000)(s)] == [0, 1, 10, 100]
    for wrong in (lambda: every(0), lambda: logspaced(1, 10), lambda: logspaced(3, 0)):
        with pytest.raises(ValueError, match=r"should be at least .* Found .* Pass"):
            wrong()


def test_weights_are_recorded_over_the_window(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    with Recorder(model, tmp_path / "run.h5") as recorder:
        for values in ([0.0, 1.0], [2.0]):
            recorder.backward(
                objective=-nll(model, pair["forget"]),
                weights={"npo": torch.tensor(values)},
                accumulate=len(values) == 2,
            )
        recorder.backward(objective=-nll(model, pair["forget"]))
        with pytest.raises(ValueError, match=r"weights .* among those .*: npo\. Found wga as"):
            recorder.backward(objective=-nll(model, pair["forget"]), weights={"wga": torch.ones(1)})
    found = open_run(tmp_path / "run.h5").weights()["npo"]
    assert found["mean"][0] == 1.0
    assert found["median"][0] == 1.0
    assert found["max"][0] == 2.0
    assert np.isnan(found["mean"][1])


def squared_norm(path: Path, row: int = 0) -> float:
    run = open_run(path)
    return float(run.gram()[row, :, 0, 0].sum())


def test_a_window_that_fails_is_over(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    exact = reference.gradient(model, -nll(model, pair["forget"]))
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=-nll(model, pair["forget"]), accumulate=True)
        with pytest.raises(ValueError, match="should be finite"):
            recorder.backward(objective=nll(model, pair["forget"]) * float("nan"))
        model.zero_grad()
        recorder.backward(objective=-nll(model, pair["forget"]))
    assert open_run(tmp_path / "run.h5").column("n_micro").tolist() == [1]
    expected = reference.inner(exact, exact)
    assert squared_norm(tmp_path / "run.h5") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("to_none", [True, False], ids=["to none", "to zero"])
@pytest.mark.parametrize("further", [True, False], ids=["a step follows", "closed"])
def test_a_window_whose_gradients_are_cleared_is_no_step(
    further: bool, to_none: bool, update: bool, tmp_path: Path
) -> None:
    """As where a loop catches an error, clears what it has and goes on with the next batch."""
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    exact = reference.gradient(model, -nll(model, pair["forget"]))
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        recorder.backward(objective=-nll(model, pair["forget"]))
        model.zero_grad(to_none)
        for _ in range(2):
            recorder.backward(objective=-nll(model, pair["forget"]), accumulate=True)
        model.zero_grad(to_none)
        if further:
            recorder.backward(objective=-nll(model, pair["forget"]), accumulate=True)
            recorder.backward(objective=-nll(model, pair["forget"]))
    run = open_run(tmp_path / "run.h5")
    assert run.column("n_micro").tolist() == ([1, 2] if further else [1])
    assert run.steps.tolist() == ([0, 1] if further else [0])
    for row, micro in enumerate(run.column("n_micro")):
        expected = micro**2 * reference.inner(exact, exact)
        assert squared_norm(tmp_path / "run.h5", row) == pytest.approx(expected, rel=1e-5)


def halve(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)


def replace(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 0.5


def clear_the_first(model: nn.Module) -> None:
    next(model.parameters()).grad = None


def zero_the_first(model: nn.Module) -> None:
    model.get_submodule("lm_head").zero_grad(set_to_none=False)


def clip(model: nn.Module, to: float = 1e-3) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), to)


@pytest.mark.parametrize("change", [halve, replace, clear_the_first, zero_the_first, clip])
@pytest.mark.parametrize("update", [False, True])
def test_gradients_that_are_changed_inside_of_a_window_are_refused(
    change: Callable[[nn.Module], None], update: bool, tmp_path: Path
) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    losses = {
        "objective": {"forget": -1.0, "retain": 1.0},
        "forget": lambda: nll(model, pair["forget"]),
        "retain": lambda: nll(model, pair["retain"]),
    }
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        recorder.backward(**losses, accumulate=True)
        change(model)
        with pytest.raises(RuntimeError, match=r"left alone .* Found .* 1 micro-batches .* Clip"):
            recorder.backward(**losses)
        model.zero_grad()
        recorder.backward(**losses)
    assert open_run(tmp_path / "run.h5").column("n_micro").tolist() == [1]


def test_a_clip_that_is_of_no_effect_is_no_change(tmp_path: Path) -> None:
    """Such a clip multiplies by one."""
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    exact = reference.gradient(model, -nll(model, pair["forget"]))
    with Recorder(model, tmp_path / "run.h5") as recorder:
        for accumulate in (True, True, False):
            loss = -nll(model, pair["forget"]) / 3
            recorder.backward(objective=loss, accumulate=accumulate, scaler=scaler)
            clip(model, to=1e9)
    expected = reference.inner(exact, exact)
    assert squared_norm(tmp_path / "run.h5") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [False, True])
def test_an_optimizer_that_steps_ends_the_window(update: bool, tmp_path: Path) -> None:
    """The last window of a loader whose length nobody knows."""
    model, pairs = tiny.llama(), tiny.pairs(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact = []
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        for pair in pairs:
            exact.append(reference.gradient(model, -nll(model, pair["forget"])))
            recorder.backward(objective=-nll(model, pair["forget"]), accumulate=True)
            optimizer.step()
            optimizer.zero_grad()
        recorder.backward(objective=-nll(model, pairs[0]["forget"]), accumulate=True)
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [0, 1, 2]
    assert run.column("n_micro").tolist() == [1, 1, 1]
    for row, gradient in enumerate(exact):
        expected = reference.inner(gradient, gradient)
        assert squared_norm(tmp_path / "run.h5", row) == pytest.approx(expected, rel=1e-5)
        if update:
            moved = run.gram()[row, :, -1, -1].sum()
            assert moved == pytest.approx(0.01 * expected, rel=1e-3)


def test_a_rectified_window_says_which_micro_batch_is_the_last(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(
            objective=-nll(model, pair["forget"]),
            retain=nll(model, pair["retain"]),
            rectifier=Rectifier(model),
            accumulate=True,
        )
        with pytest.raises(RuntimeError, match=r"accumulate=False.* Found .* Tell the last one"):
            optimizer.step()


def test_a_run_of_some_steps_is_continued_at_the_right_one(tmp_path: Path) -> None:
    model, pair, path = tiny.llama(), tiny.pairs(1)[0], tmp_path / "run.h5"
    with Recorder(model, path, when=every(5)) as recorder:
        for _ in range(9):
            recorder.backward(objective=-nll(model, pair["forget"]))
    with pytest.raises(ValueError, match=r"`next_step` should be given .* Found None. Pass"):
        Recorder(model, path, when=every(5), resume=True)
    with Recorder(model, path, when=every(5), resume=True, next_step=9) as recorder:
        assert recorder.next_step == 9
        for _ in range(2):
            recorder.backward(objective=-nll(model, pair["forget"]))
    assert open_run(path).steps.tolist() == [0, 5, 10]
    with Recorder(model, tmp_path / "fresh.h5", resume=True, next_step=7) as recorder:
        recorder.backward(objective=-nll(model, pair["forget"]))
    assert open_run(tmp_path / "fresh.h5").steps.tolist() == [7]


def test_an_optimizer_that_leaves_a_step_out_is_waited_for_again(tmp_path: Path) -> None:
    model, pairs = tiny.llama(), tiny.pairs(4)
    first, *others = model.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.SGD(others, lr=0.1)]
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for step, pair in enumerate(pairs):
            recorder.backward(objective=-nll(model, pair["forget"]))
            for which, optimizer in enumerate(optimizers):
                if (step, which) != (1, 1):
                    optimizer.step()
                optimizer.zero_grad()
    moved = open_run(tmp_path / "run.h5").gram()[:, :, -1, -1]
    assert (moved[:, 0] > 0).all()
    assert [(row[1:] > 0).any() for row in moved] == [True, False, True, True]


def test_an_optimizer_inside_of_the_backward_pass_is_refused(tmp_path: Path) -> None:
    model, pair = tiny.llama(), tiny.pairs(1)[0]

    def step(parameter: Tensor) -> None:
        parameter.data.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with (
        Recorder(model, tmp_path / "run.h5") as recorder,
        pytest.raises(RuntimeError, match=r"No hook should run .* Found .* Step after"),
    ):
        recorder.backward(objective=-nll(model, pair["forget"]))
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)
