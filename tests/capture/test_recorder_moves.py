"""What a step moves is recorded, whatever moves it: against theta after minus theta before."""

import copy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from geffect import Recorder, open_run
from geffect.analysis import conflict, cosine, g_effect, predicted_change
from geffect.store import validate

STEPS = 5
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=chance), torch.randn(8, 1, generator=chance)


def risk(model: nn.Module, of: tuple[Tensor, Tensor]) -> Tensor:
    x, y = of
    return ((model(x) - y) ** 2).mean()


Back = Callable[[], Tensor]
Loop = Callable[[nn.Sequential], Callable[[int, Back], None]]
"""A way to train: from a model to a step of it, given what takes the gradient."""


def closure(make: Callable[[list[nn.Parameter]], Any]) -> Loop:
    def loop(model: nn.Sequential) -> Callable[[int, Back], None]:
        optimizer = make([*model.parameters()])
        return lambda _, back: optimizer.step(back)

    return loop


def by_hand(model: nn.Sequential) -> Callable[[int, Back], None]:
    def step(_: int, back: Back) -> None:
        back()
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.05)

    return step


def alternating(model: nn.Sequential) -> Callable[[int, Back], None]:
    first, second = SGD(model[0].parameters(), lr=0.05), AdamW(model[2].parameters(), lr=0.01)

    def step(i: int, back: Back) -> None:
        back()
        first.step()
        if i % 2:
            second.step()

    return step


def half_by_hand(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = SGD(model[0].parameters(), lr=0.05)

    def step(_: int, back: Back) -> None:
        back()
        optimizer.step()
        for parameter in model[2].parameters():
            parameter.data.sub_(parameter.grad, alpha=0.1)

    return step


def decayed(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = SGD(model.parameters(), lr=0.05)

    def step(_: int, back: Back) -> None:
        back()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)

    return step


def averaged(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = AdamW(model.parameters(), lr=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def step(i: int, back: Back) -> None:
        back()
        optimizer.step()
        average.update_parameters(model)
        if i == 2:
            model.load_state_dict(average.module.state_dict())

    return step


class Lookahead(torch.optim.Optimizer):
    """A wrapper that pulls what another optimizer has moved halfway back."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        own = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in own]
        self.inner.step()
        with torch.no_grad():
            for p, old in zip(own, before, strict=True):
                p.lerp_(old, 0.5)


def wrapped(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = Lookahead(AdamW(model.parameters(), lr=0.05))

    def step(_: int, back: Back) -> None:
        back()
        optimizer.step()

    return step


def scheduled(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)  # 0 at first

    def step(_: int, back: Back) -> None:
        back()
        optimizer.step()
        schedule.step()

    return step


def seldom(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = SGD(model.parameters(), lr=0.05)

    def step(i: int, back: Back) -> None:
        back()
        if i % 2 == 0:
            optimizer.step()

    return step


def frozen_part(model: nn.Sequential) -> Callable[[int, Back], None]:
    optimizer = torch.optim.Adam(model[2].parameters(), lr=0.05)

    def step(_: int, back: Back) -> None:
        back()
        optimizer.step()

    return step


LOOPS: dict[str, Loop] = {
    "closure": closure(lambda p: SGD(p, lr=0.05)),
    "closure of adamw": closure(lambda p: AdamW(p, lr=0.01)),
    "by hand": by_hand,
    "alternating": alternating,
    "half by hand": half_by_hand,
    "decayed": decayed,
    "averaged": averaged,
    "wrapped": wrapped,
    "scheduled": scheduled,
    "seldom": seldom,
    "frozen part": frozen_part,
}


def trained(loop: Loop, recorder: Recorder | None, model: nn.Sequential) -> dict[str, Any]:
    """What a naive look finds: gradients and parameters before and after each step."""
    step = loop(model)
    seen: dict[str, Any] = {"retain": [], "before": [], "after": []}
    parameters = [*model.parameters()]

    def back(i: int) -> Tensor:
        model.zero_grad()
        forget = risk(model, batch(i))
        if recorder is None:
            (-forget).backward()
        else:
            recorder.backward(
                objective={"forget": -1.0}, forget=forget, retain=risk(model, batch(i + 50))
            )
        return forget.detach()

    for i in range(STEPS):
        gradient = torch.autograd.grad(risk(model, batch(i + 50)), parameters)
        seen["retain"].append([g.clone() for g in gradient])
        seen["before"].append([p.detach().clone() for p in parameters])
        step(i, lambda i=i: back(i))
        seen["after"].append([p.detach().clone() for p in parameters])
    return seen


@cache
def unwatched(name: str) -> list[Tensor]:
    """What a training leaves that nobody records."""
    plain = network()
    trained(LOOPS[name], None, plain)
    return [*plain.parameters()]


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("name", LOOPS)
def test_what_is_moved_is_recorded_whoever_moves_it(
    name: str, update: bool, tmp_path: Path
) -> None:
    model = network()
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        seen = trained(LOOPS[name], recorder, model)
    assert all(map(torch.equal, unwatched(name), model.parameters()))
    run = open_run(tmp_path / "run.h5")
    assert run.steps.tolist() == [*range(STEPS)]
    assert validate(run.path).whole
    moves = [
        [a - b for a, b in zip(after, before, strict=True)]
        for after, before in zip(seen["after"], seen["before"], strict=True)
    ]
    moved = [[bool(m.any()) for m in step] for step in moves]
    # Where nothing moves, all count; and a learning rate of zero does not unstep anything.
    expected = [flags if any(flags) else [True] * 4 for flags in moved]
    assert run.stepped().tolist() == expected
    if not update:
        return
    changes = [
        [-float((g.double() * m.double()).sum()) for g, m in zip(*pair, strict=True)]
        for pair in zip(seen["retain"], moves, strict=True)
    ]
    table = predicted_change(run, by="parameter")
    found = table[table["risk"] == "retain"]["value"].to_numpy().reshape(STEPS, 4)
    np.testing.assert_allclose(found, changes, rtol=1e-6, atol=1e-12)
    k = run.index("update")
    lengths = [[float((m.double() ** 2).sum()) for m in step] for step in moves]
    np.testing.assert_allclose(run.gram()[:, :, k, k], lengths, rtol=1e-6)


def test_every_gradient_in_the_closure_of_lbfgs_is_a_step(tmp_path: Path) -> None:
    model, seen = network(), []
    parameters = [*model.parameters()]
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:

        def back() -> Tensor:
            seen.append([p.detach().clone() for p in parameters])
            model.zero_grad()
            loss = risk(model, batch(0))
            recorder.backward(objective=loss)
            return loss

        optimizer.step(back)
        optimizer.step(back)
        seen.append([p.detach().clone() for p in parameters])
    run = open_run(tmp_path / "run.h5")
    assert len(run.steps) == len(seen) - 1 > 4
    k = run.index("update")
    lengths = [
        [float(((b - a).double() ** 2).sum()) for a, b in zip(*pair, strict=True)]
        for pair in pairwise(seen)
    ]
    np.testing.assert_allclose(run.gram()[:, :, k, k], lengths, rtol=1e-6)
    assert run.stepped().all()


@pytest.mark.parametrize("told", [True, False])
def test_a_window_of_micro_batches_is_one_step(told: bool, tmp_path: Path) -> None:
    model, moved = network(), []
    optimizer = AdamW(model.parameters(), lr=0.01)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for step in range(3):
            before = copy.deepcopy(model)
            for micro in range(2):
                last = told and micro == 1
                recorder.backward(
                    objective=risk(model, batch(2 * step + micro)), accumulate=not last
                )
            optimizer.step()
            optimizer.zero_grad()
            pairs = zip(model.parameters(), before.parameters(), strict=True)
            moved.append(sum(float(((p - q).detach().double() ** 2).sum()) for p, q in pairs))
    run = open_run(tmp_path / "run.h5")
    k = run.index("update")
    assert run.column("n_micro").tolist() == [2, 2, 2]
    np.testing.assert_allclose(run.gram()[:, :, k, k].sum(axis=1), moved, rtol=1e-6)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("through_data", [False, True])
def test_a_step_by_hand_after_a_window_that_was_never_ended_is_refused(
    update: bool, through_data: bool, tmp_path: Path
) -> None:
    model = network()

    def step() -> None:
        for p in model.parameters():
            (p.data if through_data else p.detach()).sub_(0.1 * p.grad)
            p.grad = None

    def window(recorder: Recorder, ends: bool) -> None:
        for micro in range(2):
            recorder.backward(objective=risk(model, batch(micro)), accumulate=not (ends and micro))

    refused = pytest.raises(RuntimeError, match=r"before the parameters move. Found them moved aft")
    with Recorder(model, tmp_path / "told.h5", update=update) as recorder:
        window(recorder, True)
        step()
        window(recorder, True)
    with refused, Recorder(model, tmp_path / "next.h5", update=update) as recorder:
        window(recorder, False)
        step()
        window(recorder, True)
    with refused, Recorder(model, tmp_path / "closed.h5", update=update) as recorder:
        window(recorder, False)
        step()
    assert open_run(tmp_path / "told.h5").steps.tolist() == [0, 1]
    for name in ("next.h5", "closed.h5"):
        assert not (tmp_path / name).exists()


def test_the_last_micro_batch_in_a_closure_is_told(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        with pytest.raises(RuntimeError, match=r"accumulate=False in the closure.* Found .*Tell"):
            optimizer.step(
                lambda: recorder.backward(objective=risk(model, batch(0)), accumulate=True)
            )
        recorder.backward(objective=risk(model, batch(0)))
    assert len(open_run(tmp_path / "run.h5").steps) == 1


@pytest.mark.parametrize("update", [True, False])
def test_a_step_that_was_taken_is_in_the_file(update: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            recorder.backward(objective=risk(model, batch(step)))
            optimizer.step()
            run = open_run(tmp_path / "run.h5")
            assert run.steps.tolist() == [*range(step + 1)]
            assert np.isfinite(run.gram()).all()
            with torch.no_grad():
                model[0].weight += 1.0  # added to the row when the next gradient is taken


@pytest.mark.parametrize("store", ["sketch", "full", "int8"])
def test_a_row_that_is_added_to_is_whole_in_every_store(store: str, tmp_path: Path) -> None:
    model = network()
    seen: dict[str, Any]
    with Recorder(model, tmp_path / "run.h5", update=True, store=store) as recorder:
        seen = trained(decayed, recorder, model)
    run = open_run(tmp_path / "run.h5")
    assert validate(run.path).whole
    if store != "full":
        return
    for step, (before, after) in enumerate(zip(seen["before"], seen["after"], strict=True)):
        found = np.concatenate(run.gradient("update", step))
        whole = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
        np.testing.assert_array_equal(found, whole.numpy())


def test_scores_sum_over_what_is_stepped(tmp_path: Path) -> None:
    model = network()
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        trained(frozen_part, recorder, model)
    run = open_run(tmp_path / "run.h5")
    K = run.gram()
    o, f, r = (run.index(name) for name in ("objective", "forget", "retain"))
    own, whole = K[:, 2:].sum(axis=1), K.sum(axis=1)
    for sums, stepped_only in ((own, True), (whole, False)):
        table = g_effect(run, by="model", stepped_only=stepped_only)
        unlearning = table[table["effect"] == "unlearning"]["value"]
        np.testing.assert_allclose(unlearning, sums[:, f, o], rtol=1e-12)
        angle = sums[:, o, r] / np.sqrt(sums[:, o, o] * sums[:, r, r])
        found = cosine(run, "objective", "retain", by="model", stepped_only=stepped_only)
        np.testing.assert_allclose(found["value"], angle, rtol=1e-12)
        signs = conflict(run, by="model", stepped_only=stepped_only)["value"]
        assert signs.tolist() == (sums[:, o, r] < 0).astype(float).tolist()
    by_parameter = g_effect(run, by="parameter")
    absent = by_parameter[by_parameter["value"].isna()]["parameter"]
    assert set(absent) == {"0.weight", "0.bias"}
    assert not g_effect(run, by="parameter", stepped_only=False)["value"].isna().any()


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(
    ("climbs", "said"),
    [
        ({"maximize": True}, r"`maximize` of SGD should be False.* Found .*Negate"),
        ({"lr": -0.1}, r"rate of SGD should not be negative.* Found -0\.1.* Negate"),
    ],
)
def test_an_optimizer_that_climbs_is_refused(
    climbs: dict[str, Any], said: str, update: bool, tmp_path: Path
) -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update(climbs)
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        recorder.backward(objective=risk(model, batch(0)))
        with pytest.raises(ValueError, match=said):
            optimizer.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert not (tmp_path / "run.h5").exists()


def test_a_step_that_raises_is_not_taken_for_one_that_goes_on(tmp_path: Path) -> None:
    model = network()

    class Broken(SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["lr"] < 0.05:
                raise ArithmeticError("no step")
            return super().step(closure)

    optimizer = Broken(model.parameters(), lr=0.01)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=risk(model, batch(0)))
        with pytest.raises(ArithmeticError):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        assert len(open_run(tmp_path / "run.h5").steps) == 1


@pytest.mark.parametrize("options", [{}, {"lr": None}])
def test_the_rate_of_an_optimizer_that_makes_its_own_is_not_known(
    options: dict[str, None], tmp_path: Path
) -> None:
    class Sign(torch.optim.Optimizer):
        """A step of a thousandth along each sign."""

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(0.001 * parameter.grad.sign())

    model = network()
    optimizer = Sign(model.parameters(), options)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=risk(model, batch(0)))
        optimizer.step()
    run = open_run(tmp_path / "run.h5")
    assert np.isnan(run.column("lr")).tolist() == [True]
    assert run.stepped().all()


@pytest.mark.parametrize("update", [True, False])
def test_what_has_no_gradient_left_is_not_stepped(update: bool, tmp_path: Path) -> None:
    model, rate = network(), 0.05
    optimizer = SGD(model.parameters(), lr=rate)
    expected = []
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        for step in range(3):
            retain = torch.autograd.grad(risk(model, batch(step + 9)), [*model.parameters()])
            before = [p.detach().clone() for p in model.parameters()]
            recorder.backward(
                objective={"forget": -1.0},
                forget=risk(model, batch(step)),
                retain=risk(model, batch(step + 9)),
            )
            for parameter in model[0].parameters():  # one layer is trained
                parameter.grad = None
            optimizer.step()
            optimizer.zero_grad()
            moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
            expected.append(-sum(float((g * d).sum()) for g, d in zip(retain, moved, strict=True)))
    run = open_run(tmp_path / "run.h5")
    assert run.stepped().tolist() == [[False, False, True, True]] * 3
    table = g_effect(run, by="model")
    effects = table[table["effect"] == "retaining"]["value"]
    np.testing.assert_allclose(rate * effects, expected, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_loop_that_climbs_is_warned_of_once(
    sign: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No optimizer tells that by an option: code of one's own adds what it should subtract."""
    model = network()
    with Recorder(model, tmp_path / "a.h5", update=True) as recorder:
        for step in range(3):
            recorder.backward(objective=lambda step=step: risk(model, batch(step)))
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=sign * 0.05)
            model.zero_grad()
    told = [record for record in caplog.records if "has gone up the gradient" in record.message]
    assert len(told) == (sign > 0)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_group_without_a_learning_rate_is_not_stepped(
    tmp_path: Path, update: bool, first: bool
) -> None:
    model = network()
    groups = [
        {"params": [*model[0].parameters()], "lr": 0.0},
        {"params": [*model[2].parameters()], "lr": 0.05},
    ]
    optimizer = AdamW(groups if first else groups[::-1], weight_decay=0.1)
    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        for step in range(2):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            recorder.backward(
                objective={"forget": -1.0},
                forget=risk(model, batch(step)),
                retain=risk(model, batch(step + 9)),
            )
            optimizer.step()
            optimizer.zero_grad()
            moved = [not torch.equal(*p) for p in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
    assert open_run(tmp_path / "run.h5").stepped().tolist() == [moved, moved]


def test_a_warmup_that_begins_at_zero_steps_all(tmp_path: Path) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.0)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(
            objective={"forget": -1.0}, forget=risk(model, batch(0)), retain=risk(model, batch(9))
        )
        optimizer.step()
    assert open_run(tmp_path / "run.h5").stepped().all()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_file_tells_of_all_optimizers_in_the_order_of_the_parameters(
    is_first: bool, tmp_path: Path
) -> None:
    """Whichever steps first."""
    model = network()
    first, last = SGD(model[0].parameters(), lr=0.5), AdamW(model[1:].parameters(), lr=0.1)
    optimizers = (first, last) if is_first else (last, first)
    with Recorder(model, tmp_path / "run.h5") as recorder:
        for step in range(2):
            recorder.backward(objective=risk(model, batch(step)))
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["optimizer"]["class"] == "SGD and AdamW"
    assert [group["lr"] for group in run.manifest["optimizer"]["groups"]] == [0.5, 0.1]
    assert run.column("lr").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("update", [False, True])
def test_a_file_tells_of_an_optimizer_with_a_closure(update: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        recorder.backward(objective=risk(model, batch(0)))
        return risk(model, batch(0)).detach()

    with Recorder(model, tmp_path / "run.h5", update=update) as recorder:
        optimizer.step(closure)
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["optimizer"]["class"] == "SGD"
    assert run.column("lr").tolist() == [0.5]


class Around(torch.optim.Optimizer):
    """An optimizer around another one, by which it steps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {"lr": 1.0})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_around_another_one_is_not_told_of(tmp_path: Path) -> None:
    model = network()
    optimizer = Around(SGD(model.parameters(), lr=0.5))
    with Recorder(model, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=risk(model, batch(0)))
        optimizer.step()
    assert open_run(tmp_path / "run.h5").manifest["optimizer"]["class"] == "SGD"
