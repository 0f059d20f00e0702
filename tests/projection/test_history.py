"""Several retain gradients of earlier steps as constraints, in the metric of Adam: GU."""

import copy
import io
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import rectification
from geffect.interrupts import to_the_end
from geffect.projection import State, hamu, nearest, off_span
from geffect.projection.memory import RetainMemory
from tests.utils import shallow as tiny
from tests.utils.rectified import losses_of, placed

ADAM = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, eps=1e-4),
    "two-groups": lambda p: torch.optim.AdamW(
        [{"params": p[:3], "eps": 1e-3}, {"params": p[3:]}], lr=1e-3
    ),
}


def flat(tensors: Any) -> np.ndarray:
    joined: np.ndarray = torch.cat([t.detach().double().flatten() for t in tensors]).numpy()
    return joined


def nearest_by_nnls(u: np.ndarray, retain: list[np.ndarray], metric: np.ndarray) -> np.ndarray:
    """argmin 1/2 |x - u|_M^2 such that <x, r> >= 0 for all r, on the vectors themselves."""
    root = metric**0.5
    A = np.stack([r / np.linalg.norm(r) / root for r in retain])
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    weights, _ = nnls(A.T, -root * u, maxiter=1000)
    found: np.ndarray = (root * u + A.T @ weights) / root
    return found


def metric_of(optimizer: torch.optim.Optimizer) -> np.ndarray:
    """sqrt(v) + eps."""
    parts = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
            parts.append(v.sqrt() + group["eps"])
    return flat(parts)


def gradients_of(model: nn.Module, pair: Any) -> tuple[list[Tensor], list[Tensor]]:
    parameters = list(model.parameters())
    forget, retain = (
        list(torch.autograd.grad(losses_of(model, pair)[side], parameters))
        for side in ("forget", "retain")
    )
    return [-g for g in forget], retain


@pytest.mark.parametrize("correction", ["retain", "adam"])
@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("name", ADAM)
def test_the_step_is_the_nearest_that_harms_none_of_the_last_gradients(
    name: str, history: int, correction: Any
) -> None:
    model = tiny.gpt2()
    optimizer = ADAM[name](list(model.parameters()))
    rectifier = Rectifier(
        model, nearest, history=history, space="update", correction=correction, optimizer=optimizer
    )
    assert rectifier.options["ema"] == 1.0
    twin = copy.deepcopy(model)
    own = ADAM[name](list(twin.parameters()))
    past: deque[np.ndarray] = deque(maxlen=history + 1)
    several = 0
    for pair in tiny.pairs(6, seed=0):
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.data.copy_(q.data)
        before = flat(twin.parameters())
        objective, retain = gradients_of(twin, pair)
        past.append(flat(retain))
        for p, g, r in zip(twin.parameters(), objective, retain, strict=True):
            p.grad = g - r / 2  # so that there is conflict with several of them
        own.step()
        u = before - flat(twin.parameters())
        metric = metric_of(own) if correction == "adam" else np.ones_like(u)
        expected = nearest_by_nnls(u, list(past), metric)

        optimizer.zero_grad()
        rectifier.backward(objective={"forget": -1.0, "retain": -0.5}, **losses_of(model, pair))
        optimizer.step()
        found = before - flat(model.parameters())
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(u)
        for r in past:
            assert found @ r >= -1e-5 * np.linalg.norm(found) * np.linalg.norm(r)
        several += sum(abs(found @ r) < 1e-5 * np.linalg.norm(u) * np.linalg.norm(r) for r in past)
        assert rectifier.report is not None and rectifier.report.unmet == (0.0,)
    assert several > 6, "the test has too few constraints at work"


def test_in_gradient_space_and_blocks_each_gradient_is_a_constraint() -> None:
    model = tiny.gpt2()
    rectifier = Rectifier(model, nearest, history=2, scope="layer")
    past: deque[list[Tensor]] = deque(maxlen=3)
    for pair in tiny.pairs(5):
        model.zero_grad()
        objective, retain = gradients_of(model, pair)
        past.append(retain)
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
        blocks = rectifier._blocks
        for block in range(len(blocks.names)):
            members = [i for i, of in enumerate(blocks.index) if of == block]
            u = flat([objective[i] for i in members])
            rows = [flat([r[i] for i in members]) for r in past]
            expected = nearest_by_nnls(u, rows, np.ones_like(u))
            found = flat([list(model.parameters())[i].grad for i in members])
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(u)


def test_each_coordinate_agrees_with_every_gradient() -> None:
    model = tiny.gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, scope="coordinate", space="update", history=2, optimizer=optimizer)
    past: deque[np.ndarray] = deque(maxlen=3)
    for pair in tiny.pairs(4):
        before = flat(model.parameters())
        past.append(flat(gradients_of(model, pair)[1]))
        optimizer.zero_grad()
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
        optimizer.step()
        step = before - flat(model.parameters())
        assert all((step * r >= 0).all() for r in past)
        assert step.any()


def test_without_conflict_the_optimizer_steps_as_it_would() -> None:
    ended = []
    for watched in (True, False):
        model = tiny.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rectifier = Rectifier(
            model, nearest, history=8, space="update", correction="adam", optimizer=optimizer
        )
        for pair in tiny.pairs(3):
            optimizer.zero_grad()
            losses = losses_of(model, {"retain": pair["retain"]})
            if watched:
                rectifier.backward(objective={"retain": 1.0}, **losses)
            else:
                losses["retain"].backward()
            optimizer.step()
            assert not watched or (rectifier.report and rectifier.report.fired == (0.0,))
        rectifier.detach()
        ended.append(flat(model.parameters()))
    assert np.array_equal(*ended)


GU: dict[str, Any] = {"history": 3, "space": "update", "correction": "adam"}


def steps(
    model: nn.Module, optimizer: Any, rectifier: Rectifier, pairs: Any, micro: int = 1
) -> Any:
    for pair in pairs:
        optimizer.zero_grad()
        for i in range(micro):
            losses = {name: loss / micro for name, loss in losses_of(model, pair).items()}
            rectifier.backward(objective={"forget": -1.0}, accumulate=i < micro - 1, **losses)
        optimizer.step()
    return flat(model.parameters())


@pytest.mark.parametrize("state", [State(), State(torch.bfloat16, "cpu")], ids=str)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_that_is_resumed_ends_as_if_it_had_not_been_stopped(state: State, stop: int) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, Rectifier]:
        model = tiny.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, Rectifier(model, nearest, state=state, optimizer=optimizer, **GU)

    pairs = tiny.pairs(7)
    unbroken = steps(*made(), pairs)
    model, optimizer, rectifier = made()
    steps(model, optimizer, rectifier, pairs[:stop])
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in (model, optimizer, rectifier)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    others = made()
    for thing, kept in zip(others, saved, strict=True):
        thing.load_state_dict(kept)
    assert np.array_equal(steps(*others, pairs[stop:]), unbroken)
    with pytest.raises(ValueError, match="should be set up as the one whose state it takes"):
        Rectifier(model, nearest).load_state_dict(saved[2])


def test_micro_batches_are_one_gradient_of_the_history() -> None:
    ended, counts = [], []
    for micro in (1, 4):
        model = tiny.gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rectifier = Rectifier(model, nearest, optimizer=optimizer, **GU)
        ended.append(steps(model, optimizer, rectifier, tiny.pairs(4), micro))
        counts.append(rectifier._memory._count)
    assert counts == [4, 4]
    np.testing.assert_allclose(ended[1], ended[0], rtol=0, atol=1e-7)


def test_a_gradient_that_does_not_count_pushes_none_out() -> None:
    kept = RetainMemory(["retain"], 1.0, second_moment=False, state=State(), history=2)
    values = (1.0, 2.0, 0.0, float("nan"), 3.0, 4.0)
    for value in values:
        kept.update({"retain": [torch.tensor([value])]})
    assert [float(r) for r in kept.retain(0) if r is not None] == [4.0, 3.0, 2.0]


def test_earlier_gradients_are_kept_as_they_were() -> None:
    kept = RetainMemory(["retain"], 1.0, second_moment=True, state=State(), history=2)
    draw = torch.Generator().manual_seed(0)
    past: deque[list[Tensor | None]] = deque(maxlen=3)
    for reached in ("a", "b", "ab", "a", "b", "b", "ab", "a"):
        # What the loss does not reach counts as zero.
        past.appendleft([torch.randn(4, generator=draw) if n in reached else None for n in "ab"])
        kept.update({"retain": past[0]})
        for i in range(2):
            found = kept.retain(i)
            assert len(found) == 3
            for r, gradient in zip(found, past, strict=False):
                expected = torch.zeros(4) if gradient[i] is None else gradient[i]
                assert torch.equal(torch.zeros(4) if r is None else r, expected)


def test_an_interrupt_leaves_the_history_as_before_or_after() -> None:
    """What comes between two tensors of a step waits until all of them are taken in."""
    kept = RetainMemory(["retain"], 1.0, second_moment=False, state=State(), history=1)
    kept.update({"retain": [torch.ones(1), torch.ones(1)]})
    asked = 0

    def twice() -> None:
        nonlocal asked
        asked += 1
        kept.update({"retain": [2 * torch.ones(1), 2 * torch.ones(1)]})

    to_the_end(twice)
    assert asked == 1
    assert [[float(r) for r in kept.retain(i)] for i in (0, 1)] == [[2.0, 1.0]] * 2


def test_file_and_report_are_of_the_newest_gradient(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rectifier = Rectifier(model, nearest, optimizer=optimizer, measure_update=True, **GU)
    with Recorder(model, tmp_path / "run.h5", update=True) as recorder:
        for pair in tiny.pairs(6):
            recorder.backward(
                objective={"forget": -1.0}, **losses_of(model, pair), rectifier=rectifier
            )
            optimizer.step()
            optimizer.zero_grad()
            report = rectifier.report
            assert report is not None and len(report.inner_after) == 1
            assert report.applied_average == pytest.approx(report.applied_fresh, abs=1e-12)
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["rectifier"]["history"] == 3
    table = rectification(run)
    assert set(table.query("quantity == 'unmet'")["value"]) == {0.0}
    assert set(table.query("quantity == 'violated'")["value"]) == {0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": -1}, r"`history` of Rectifier should be .* from 0 to 15\. Found"),
        ({"history": 16}, r"`history` of Rectifier should be .* from 0 to 15\. Found"),
        ({"history": 1.0}, r"`history` of Rectifier should be .* from 0 to 15\. Found"),
        ({"history": True}, r"`history` of Rectifier should be .* from 0 to 15\. Found"),
        ({"history": 2, "ema": 0.8}, r"`history` should go with .* ema=1\.0.* Found .*ema=0\.8"),
        ({"history": 2, "protect": ("retain", "world")}, r"`history` should go with a rule, one"),
        ({"history": 2, "rule": None}, r"`history` should go with a rule.* Found rule=None"),
        ({"history": 2, "rule": hamu(0.1)}, r"should be given one retain gradient .* Found 3"),
        ({"correction": "adam"}, r'`correction` should be "retain" in gradient space'),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rectifier(nn.Linear(2, 1), **{"rule": nearest, **options})


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adamax(p, lr=0.1),
    ],
    ids=["sgd", "rmsprop", "adamax"],
)
def test_the_metric_of_an_optimizer_without_one_is_refused(optimizer_of: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"should go with Adam or AdamW .* Found .* Take"):
        Rectifier(model, nearest, optimizer=optimizer_of(model.parameters()), **GU)


def test_it_says_what_memory_it_takes() -> None:
    model = nn.Linear(2, 1)
    shown = repr(Rectifier(model, nearest, history=8))
    assert "ema=1.0" in shown and "history=8: 9 vectors of the model's size" in shown
    assert "history" not in repr(Rectifier(model, nearest))


def test_off_span_takes_a_history_too() -> None:
    model = tiny.gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rectifier = Rectifier(model, off_span, history=2, **placed("update", optimizer))
    past: deque[np.ndarray] = deque(maxlen=3)
    for pair in tiny.pairs(4):
        before = flat(model.parameters())
        past.append(flat(gradients_of(model, pair)[1]))
        optimizer.zero_grad()
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
        optimizer.step()
        step = before - flat(model.parameters())
        for r in past:
            assert abs(step @ r) <= 1e-5 * np.linalg.norm(step) * np.linalg.norm(r)
