"""Rectification: what GRU is, and what a rectifier does from the first step to the last."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geffect import Rectifier
from geffect.gradients import differentiate, reduced
from geffect.objectives import nll
from geffect.projection import (
    SAGO,
    State,
)
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.rectified import losses_of, two_layers


def test_the_default_is_gru_on_the_whole_model_with_the_average() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, ema=0.8)
    average = None
    for pair in tiny.pairs(3):
        u = -reference.flat(reference.gradient(model, nll(model, pair["forget"])))
        r = reference.flat(reference.gradient(model, nll(model, pair["retain"])))
        average = r if average is None else 0.8 * r + 0.2 * average
        model.zero_grad()
        rectifier.backward(
            objective={"forget": -1.0},
            forget=nll(model, pair["forget"]),
            retain=nll(model, pair["retain"]),
        )
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        expected = reference.gru(u.double(), average.double()).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(u.norm()))


def test_the_report_says_what_was_done() -> None:
    model = tiny.llama()
    rectifier = Rectifier(model, ema=1.0)
    pair = {"forget": tiny.batch(0), "retain": tiny.batch(0)}  # opposite: everything is removed
    losses = {side: nll(model, batch) for side, batch in pair.items()}
    rectifier.backward(objective={"forget": -2.0}, **losses)
    report = rectifier.report
    assert report is not None
    assert report.fired == (1.0,)
    assert report.coefficient[0] == pytest.approx(2.0, rel=1e-5)
    assert report.norm_before[0] == pytest.approx(2 * report.retain_norm[0], rel=1e-5)
    assert report.inner_before[0] == pytest.approx(-2 * report.retain_norm[0] ** 2, rel=1e-5)
    assert report.norm_after[0] <= 1e-5 * report.norm_before[0]
    assert abs(report.inner_after[0]) <= 1e-10 * report.norm_before[0] ** 2


def test_the_average_weighs_the_new_gradient_and_owns_its_memory() -> None:
    model = nn.Linear(2, 1, bias=False)
    rectifier = Rectifier(model, ema=0.25)
    seen = []
    for x in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        model.zero_grad()
        inputs = torch.tensor(x)
        rectifier.backward(objective=-model(inputs).sum(), retain=model(inputs).sum())
        model.weight.grad.zero_()  # what happens to `.grad` later does not reach the average
        seen.append(rectifier.watched["retain_ema"][0].reshape(-1).tolist())
    assert seen == [[1.0, 0.0], [0.75, 0.25], [0.8125, 0.4375]]


def public_port(model: nn.Module, pairs: Any, *, weight: float, rate: float) -> int:
    """GRU as its public ports have it: the average of the retain gradients starts at zero."""
    average, parameters = torch.zeros(()), list(model.parameters())
    fired = 0
    for pair in pairs:
        losses = losses_of(model, pair)
        forget, retain = (
            torch.cat([g.flatten() for g in torch.autograd.grad(losses[side], parameters)]).double()
            for side in ("forget", "retain")
        )
        average = weight * retain + (1 - weight) * average
        step = -forget
        if step @ average < 0:
            fired += 1
            step = step - (step @ average) / (average @ average) * average
        with torch.no_grad():
            for p, x in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                p -= rate * x.view_as(p)
    return fired


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_started_at_zero_it_is_the_public_port(weight: float) -> None:
    ported, pairs = tiny.gpt2(), tiny.pairs(6)
    assert public_port(ported, pairs, weight=weight, rate=0.05) > 1
    ended = {}
    for start in ("zero", "first"):
        model = tiny.gpt2()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        rectifier = Rectifier(model, ema=weight, ema_start=start)
        for pair in pairs:
            optimizer.zero_grad()
            rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
            optimizer.step()
        assert rectifier.options["ema_start"] == start
        ended[start] = max(
            float((p - q).abs().max().detach())
            for p, q in zip(model.parameters(), ported.parameters(), strict=True)
        )
    assert ended["zero"] < 1e-7  # the averages are float32
    assert (ended["first"] > 1e-5) == (weight < 1.0)


def test_the_average_stays_exact_over_many_steps() -> None:
    model = nn.Linear(50, 1, bias=False).bfloat16()
    rectifier = Rectifier(model, None, ema=0.01)
    draw = torch.Generator().manual_seed(0)
    expected = None
    for _ in range(400):
        x = torch.randn(50, generator=draw).bfloat16()
        model.zero_grad()
        rectifier.backward(objective=model(x).sum(), retain=model(x).sum())
        exact = x.double()
        expected = exact if expected is None else 0.01 * exact + 0.99 * expected
    (found,) = rectifier.watched["retain_ema"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.reshape(-1).double(), expected, rtol=1e-5, atol=1e-6)


def test_detached_it_leaves_the_optimizer_alone() -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rectifier = Rectifier(model, scope="coordinate", space="update", optimizer=optimizer)
    pair = tiny.pairs(1)[0]
    rectifier.backward(
        objective={"forget": -1.0},
        forget=nll(model, pair["forget"]),
        retain=nll(model, pair["retain"]),
    )
    rectifier.detach()
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    optimizer.step()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_a_rectifier_that_only_watches_changes_nothing() -> None:
    pair = tiny.pairs(1)[0]
    results = []
    for watched in (True, False):
        model = tiny.llama()
        losses = {side: nll(model, batch) for side, batch in pair.items()}
        if watched:
            Rectifier(model, None).backward(objective={"forget": -1.0}, **losses)
        else:
            (-losses["forget"]).backward()
        results.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert torch.equal(*results)


def test_misuse_is_said_in_one_sentence() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(3, 1)
    loss = model(torch.ones(2)).sum()
    with pytest.raises(ValueError, match=r'before a step with space="update".* Found none. Pass'):
        Rectifier(model, space="update").backward(objective=-loss, retain=loss)
    with pytest.raises(ValueError, match=r"one named `objective`. Found retain. Pass objective"):
        Rectifier(model).backward(retain=loss)
    gradients = differentiate(list(model.parameters()), {"retain": loss})
    with pytest.raises(ValueError, match=r"made for the model that is trained. Found .* Make it"):
        Rectifier(other).observe(gradients)


def test_a_rectifier_of_a_copy_is_not_that_of_the_model() -> None:
    model = two_layers()
    rectifier = Rectifier(copy.deepcopy(model))
    loss = model(torch.ones(3)).sum()
    with pytest.raises(ValueError, match="made for the model that is trained"):
        rectifier.observe(differentiate(list(model.parameters()), {"retain": loss}))


def test_the_forget_part_is_rectified_and_the_retain_term_added_behind() -> None:
    for part in ("total", "forget"):
        model = tiny.llama()
        rectifier = Rectifier(model, part=part, ema=1.0)  # type: ignore[arg-type]
        pair = tiny.pairs(1)[0]
        u = -reference.flat(reference.gradient(model, nll(model, pair["forget"]))).double()
        r = reference.flat(reference.gradient(model, nll(model, pair["retain"]))).double()
        rectifier.backward(objective={"forget": -1.0, "retain": 0.25}, **losses_of(model, pair))
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()
        whole = reference.gru(u + 0.25 * r, r)
        behind = reference.gru(u, r) + 0.25 * r
        expected = whole if part == "total" else behind
        assert (whole - behind).norm() > 1e-3 * u.norm(), "the parts differ"
        assert (found - expected).norm() <= 1e-5 * u.norm()
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                rectifier.watched["retain_ema"], reference_tensors(model, pair), strict=True
            )
        )


def test_a_rule_that_adds_the_retain_gradient_gets_it_once() -> None:
    model = tiny.llama()
    pair = tiny.pairs(1)[0]
    u = -reference.flat(reference.gradient(model, nll(model, pair["forget"])))
    r = reference.flat(reference.gradient(model, nll(model, pair["retain"])))
    rectifier = Rectifier(model, SAGO(prefer_retain=True), part="forget", ema=1.0)
    rectifier.backward(objective={"forget": -1.0, "retain": 1.0}, **losses_of(model, pair))
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = torch.where(u * r < 0, r, u + r)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def reference_tensors(model: nn.Module, pair: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return list(reference.gradient(model, nll(model, pair["retain"])).values())


def test_micro_batches_are_rectified_as_the_whole() -> None:
    results = []
    for windows in (1, 3):
        model = tiny.llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        rectifier = Rectifier(model)
        pairs = tiny.pairs(6)
        for start in (0, 3):
            optimizer.zero_grad()
            window = pairs[start : start + 3]
            if windows == 1:
                sums = {
                    side: sum(nll(model, pair[side]) for pair in window) / 3  # type: ignore[misc]
                    for side in ("forget", "retain")
                }
                rectifier.backward(objective={"forget": -1.0}, **sums)
            else:
                for place, pair in enumerate(window):
                    parts = {side: nll(model, batch) / 3 for side, batch in pair.items()}
                    rectifier.backward(objective={"forget": -1.0}, accumulate=place < 2, **parts)
                    assert (model.model.norm.weight.grad is None) == (place < 2)
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": None, "select": 0.05, "space": "update"},
        {"scope": "coordinate", "space": "update", "state": State(torch.bfloat16)},
        {"space": "update", "correction": "retain_adam", "state": State(device="cpu")},
        {"space": "update", "ema_start": "zero", "ema": 0.2},
    ],
    ids=str,
)
def test_a_run_that_was_stopped_and_resumed_equals_the_one_that_was_not(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def made(model: nn.Module) -> tuple[torch.optim.Optimizer, Rectifier]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return optimizer, Rectifier(
            model, **options, **({"optimizer": optimizer} if options else {})
        )

    def train(model: nn.Module, optimizer: Any, rectifier: Rectifier, pairs: Any) -> None:
        for pair in pairs:
            optimizer.zero_grad()
            rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
            optimizer.step()

    pairs = tiny.pairs(6)
    whole = tiny.llama()
    train(whole, *made(whole), pairs)
    stopped = tiny.llama()
    optimizer, rectifier = made(stopped)
    train(stopped, optimizer, rectifier, pairs[:3])
    states = stopped.state_dict(), optimizer.state_dict(), rectifier.state_dict()
    torch.save(states, tmp_path / "checkpoint.pt")
    resumed = tiny.llama(seed=1)
    optimizer, rectifier = made(resumed)
    for owner, state in zip(
        (resumed, optimizer, rectifier), torch.load(tmp_path / "checkpoint.pt"), strict=True
    ):
        owner.load_state_dict(state)
    train(resumed, optimizer, rectifier, pairs[3:])
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_the_two_gradients_of_a_step_are_not_in_memory_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[list[weakref.ref[Tensor]]] = []

    def watching(*args: Any, **named: Any) -> Any:
        assert all(tensor() is None for tensor in (taken[-1] if len(taken) % 2 else []))
        gradients = reduced(*args, **named)
        vectors = gradients.vectors.values()
        taken.append([weakref.ref(t) for v in vectors for t in v if t is not None])
        return gradients

    monkeypatch.setattr("geffect.projection.rectifier.reduced", watching)
    model = tiny.llama()
    rectifier = Rectifier(model, ema=0.5)
    for pair in tiny.pairs(2):
        model.zero_grad()
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
    assert [len(tensors) > 0 for tensors in taken] == [True] * 4, "a retain pass, then another"


class Embedded(nn.Module):
    """A frozen embedding whose output requires a gradient, as for checkpoints, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4).requires_grad_(False)
        self.head = nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).requires_grad_()
        return nn.functional.cross_entropy(self.head(hidden), ids)


def test_micro_batches_may_have_leaves_of_their_own() -> None:
    grads = []
    windows = [[torch.arange(5)], [torch.arange(7)]], [[torch.arange(5), torch.arange(7)]]
    for accumulated in windows:
        model = Embedded()
        rectifier = Rectifier(model)
        for i, parts in enumerate(accumulated):
            forget = sum(model(ids) for ids in parts)
            retain = sum(model(ids.flip(0) % 3) for ids in parts)
            rectifier.backward(
                accumulate=i < len(accumulated) - 1,
                objective={"forget": -1.0}, forget=forget, retain=retain,
            )  # fmt: skip
        grads.append(torch.cat([p.grad.flatten() for p in model.head.parameters()]))
    torch.testing.assert_close(*grads)


def test_parameters_inside_of_a_reentrant_checkpoint_are_reached() -> None:
    class Checkpointed(Embedded):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids).requires_grad_()
            logits = checkpoint(self.head, hidden, use_reentrant=True)
            return nn.functional.cross_entropy(logits, ids)

    grads = []
    for kind in (Embedded, Checkpointed):
        model = kind()
        rectifier = Rectifier(model)
        forget, retain = model(torch.arange(5)), model(torch.arange(3))
        rectifier.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
        grads.append(torch.cat([p.grad.flatten() for p in model.head.parameters()]))
    assert torch.equal(*grads)


def test_the_forget_part_is_that_of_a_declared_objective() -> None:
    model = nn.Linear(2, 1, bias=False)
    forget, retain = model(torch.ones(2)).sum(), model(torch.tensor([1.0, -2.0])).sum()
    with pytest.raises(ValueError, match=r"declared as a combination .* Found a tensor. Pass wei"):
        Rectifier(model, part="forget").backward(objective=-forget + retain, retain=retain)
    results = []
    for part in ("total", "forget"):  # the same, where there is no retain term
        model.zero_grad()
        forget, retain = model(torch.ones(2)).sum(), model(torch.tensor([2.0, 1.0])).sum()
        rectifier = Rectifier(model, part=part)  # type: ignore[arg-type]
        rectifier.backward(objective={"forget": -1.0}, forget=forget, retain=retain)
        results.append(model.weight.grad.clone())
    assert torch.equal(*results)


def test_a_state_that_is_loaded_leaves_nothing_of_a_window() -> None:
    pairs = tiny.pairs(2)
    grads = []
    for windowed in (False, True):
        model = tiny.llama()
        rectifier = Rectifier(model)
        state = rectifier.state_dict()
        if windowed:
            rectifier.backward(
                objective={"forget": -1.0}, accumulate=True, **losses_of(model, pairs[0])
            )
            rectifier.load_state_dict(state)
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pairs[1]))
        grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert torch.equal(*grads)


def test_a_parameter_that_is_replaced_is_refused() -> None:
    model = two_layers()
    rectifier = Rectifier(model)
    x = torch.ones(3)
    rectifier.backward(objective=-model(x).sum(), retain=(model(x) ** 2).sum())
    model.zero_grad()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ValueError, match=r"stay the tensors that they were .* Found others"):
        rectifier.backward(objective=-model(x).sum(), retain=(model(x) ** 2).sum())
