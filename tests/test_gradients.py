"""Separated gradients: one pass a tensor, bit for bit, and nothing else changed."""

import pytest
import torch
from torch import Tensor, nn

from geffect.gradients import differentiate, peak
from geffect.objectives import SharedForward, WeightedGradientAscent, nll
from tests.utils import reference, tiny


@pytest.fixture
def model() -> nn.Module:
    return tiny.llama()


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def equal(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.3, -1.7])
def test_objective_is_left_bit_for_bit(model: nn.Module, weight: float) -> None:
    pair = tiny.pairs(1)[0]
    parameters = list(model.parameters())
    (weight * nll(model, pair["forget"])).backward()
    expected = grads(model)
    model.zero_grad()
    step = differentiate(
        parameters,
        {
            "objective": {"forget": weight},
            "forget": nll(model, pair["forget"]),
            "retain": nll(model, pair["retain"]),
        },
    )
    step.deposit()
    assert equal(grads(model), expected)


def test_a_tensor_objective_is_left_bit_for_bit_and_added_to_what_was_there(
    model: nn.Module,
) -> None:
    pair = tiny.pairs(1)[0]
    parameters = list(model.parameters())
    objective = WeightedGradientAscent(2.0)
    for _ in range(2):
        objective(model, pair).backward()
    expected = grads(model)
    model.zero_grad()
    for _ in range(2):
        losses = {"objective": objective(model, pair), "retain": nll(model, pair["retain"])}
        differentiate(parameters, losses).deposit()
    assert equal(grads(model), expected)


def test_losses_may_share_a_forward(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    parameters = list(model.parameters())
    shared = SharedForward(model)
    losses = {
        "objective": WeightedGradientAscent(1.0)(shared, pair),
        "forget": nll(shared, pair["forget"]),
        "retain": nll(shared, pair["retain"]),
    }
    step = differentiate(parameters, losses)
    apart = {
        "objective": WeightedGradientAscent(1.0)(model, pair),
        "forget": nll(model, pair["forget"]),
        "retain": nll(model, pair["retain"]),
    }
    for name, loss in apart.items():
        alone = differentiate(parameters, {name: loss})
        assert equal(list(step.of(name)), list(alone.of(name))), name
    # The graph is freed by the last pass that needs it.
    with pytest.raises(RuntimeError, match="second time"):
        losses["forget"].backward()


def test_one_pass_a_tensor_and_none_for_a_combination(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    real = Tensor.backward
    monkeypatch.setattr(Tensor, "backward", lambda *a, **k: (passes.append(1), real(*a, **k))[1])
    forget = nll(model, tiny.batch(0))
    losses = {
        "objective": {"forget": -1.0, "retain": 2.0},
        "forget": forget,
        "again": forget,
        "retain": nll(model, tiny.batch(1)),
        "minus": {"retain": -3.0},
    }
    step = differentiate(list(model.parameters()), losses)
    assert len(passes) == 2
    assert step.sources == ("objective", "forget", "again", "retain", "minus")
    assert step.losses["objective"] == pytest.approx(
        -step.losses["forget"] + 2 * step.losses["retain"], rel=1e-12
    )


def test_gram_equals_naive_autograd() -> None:
    model = tiny.gpt2()
    pair = tiny.pairs(1)[0]
    losses = {
        "objective": {"forget": -1.5, "retain": 0.5},
        "forget": nll(model, pair["forget"]),
        "retain": nll(model, pair["retain"]),
    }
    gram = differentiate(list(model.parameters()), losses).gram()
    forget = reference.gradient(model, reference.nll(model, pair["forget"]))
    retain = reference.gradient(model, reference.nll(model, pair["retain"]))
    objective = {n: -1.5 * forget[n] + 0.5 * retain[n] for n in forget}
    sources = [objective, forget, retain]
    for p, name in enumerate(forget):
        for i, a in enumerate(sources):
            for j, b in enumerate(sources):
                scale = (reference.inner(a, a, name) * reference.inner(b, b, name)) ** 0.5
                difference = abs(gram[p, i, j].item() - reference.inner(a, b, name))
                assert difference <= 1e-10 * scale + 1e-300


def test_a_failing_pass_leaves_grad_as_it_was(model: nn.Module) -> None:
    parameters = list(model.parameters())
    nll(model, tiny.batch(0)).backward()
    before = grads(model)
    spent = nll(model, tiny.batch(1))
    spent.backward()
    for p, g in zip(parameters, before, strict=True):
        p.grad = g
    with pytest.raises(RuntimeError):
        differentiate(parameters, {"objective": spent})
    assert equal(grads(model), before)


def test_a_parameter_that_a_loss_does_not_reach_stays_without_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.5)
    step = differentiate([used, unused], {"objective": used.sum()})
    step.deposit()
    optimizer.step()
    assert unused.grad is None
    assert torch.equal(unused, torch.ones(2)), "weight decay moved a parameter without gradient"
    assert step.gram()[1].abs().sum() == 0


def test_a_leaf_beside_the_parameters_gets_the_objectives_gradient_alone() -> None:
    model = nn.Linear(2, 1)
    prompt = nn.Parameter(torch.tensor([1.0, -2.0]))
    losses = {
        "objective": {"forget": -1.0},
        "forget": model(prompt).sum(),
        "retain": (model(3 * prompt) ** 2).sum(),
    }
    (expected,) = torch.autograd.grad(-losses["forget"], prompt, retain_graph=True)
    step = differentiate(list(model.parameters()), losses)
    assert prompt.grad is None
    step.deposit()
    assert prompt.grad is not None
    assert torch.equal(prompt.grad, expected)
    assert len(step.of("objective")) == 2


def test_a_shared_forward_without_a_graph_is_run_again_for_a_loss(model: nn.Module) -> None:
    pair = tiny.pairs(1)[0]
    shared = SharedForward(model)
    with torch.no_grad():
        before = nll(shared, pair["forget"])
    loss = nll(shared, pair["forget"])
    assert torch.equal(before, loss)
    loss.backward()
    with torch.no_grad():
        assert nll(shared, pair["forget"]).item() == loss.item()


def test_weights_of_one_tensor_under_two_names_may_not_cancel_out(model: nn.Module) -> None:
    loss = nll(model, tiny.pairs(1)[0]["forget"])
    with pytest.raises(ValueError, match=r"left with some weight\. Found .* Pass different losses"):
        differentiate(
            list(model.parameters()),
            {"objective": {"forget": -1.0, "retain": 1.0}, "forget": loss, "retain": loss},
        )


KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_the_largest_coordinate_is_that_of_tensors_of_any_types(
    first: torch.dtype, second: torch.dtype
) -> None:
    parts = [torch.linspace(-3, 2, 70_000).to(first), None, torch.tensor(2.5, dtype=second)]
    assert peak(parts) == 3.0
    assert peak([parts[2], *parts]) == 3.0
    for odd in (torch.inf, torch.nan):
        found = torch.tensor(peak([*parts, torch.tensor([odd, 0.0], dtype=second)]))
        torch.testing.assert_close(found, torch.tensor(odd), equal_nan=True)
