"""KL on retain answers against a loop, and what the public code makes of it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from geffect.objectives import KL, FrozenModel
from geffect.objectives.kl import divergence
from tests.utils import reference
from tests.utils import shallow as tiny


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    return tiny.gpt2(), tiny.gpt2(seed=1).eval()


def naive(model: Any, other: Any, batch: reference.Batch, *, everywhere: bool) -> torch.Tensor:
    """The mean KL, one position and one word at a time."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    now, before = model(**inputs).logits, other(**inputs).logits.detach()
    rows, length = batch["labels"].shape
    found = []
    for row in range(rows):
        for position in range(length):
            following = batch["labels"][row, position + 1] if position + 1 < length else -100
            if not everywhere and following == -100:
                continue
            log_o = torch.log_softmax(before[row, position], dim=-1)
            log_p = torch.log_softmax(now[row, position], dim=-1)
            words = zip(log_o, log_p, strict=True)
            found.append(torch.stack([o.exp() * (o - p) for o, p in words]).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("legacy", [False, True])
def test_it_is_its_formula(models: tuple[nn.Module, nn.Module], legacy: bool) -> None:
    model, other = models
    pair = {"retain": tiny.batch(0, padding=3)}
    loss = KL(legacy_kl=legacy)(model, pair, FrozenModel(other))
    expected = naive(model, other, pair["retain"], everywhere=legacy)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, gradient = reference.gradient(model, loss), reference.gradient(model, expected)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-14)


def test_it_is_nothing_where_the_model_is_its_reference(
    models: tuple[nn.Module, nn.Module],
) -> None:
    model = models[0]
    loss = KL()(model, {"retain": tiny.batch(0)}, FrozenModel.copied(model))
    assert abs(loss.item()) < 1e-15
    assert all(g.abs().max() < 1e-14 for g in reference.gradient(model, loss).values())


def test_its_gradient_is_that_of_the_cross_entropy(models: tuple[nn.Module, nn.Module]) -> None:
    model, other = models
    batch = tiny.batch(0)
    scored = batch["labels"][:, 1:] != -100
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    log_p = torch.log_softmax(model(**inputs).logits[:, :-1][scored], dim=-1)
    p_o = torch.softmax(other(**inputs).logits[:, :-1][scored], dim=-1).detach()
    crossed = reference.gradient(model, -(p_o * log_p).sum(dim=-1).mean())
    found = reference.gradient(model, KL()(model, {"retain": batch}, FrozenModel(other)))
    torch.testing.assert_close(found, crossed, rtol=1e-8, atol=1e-14)


def test_the_mean_over_all_positions_depends_on_the_padding(
    models: tuple[nn.Module, nn.Module],
) -> None:
    model, other = models
    batches = [{"retain": tiny.batch(0, padding=padding)} for padding in (0, 7)]
    for objective, same in ((KL(), True), (KL(legacy_kl=True), False)):
        values = [objective(model, batch, FrozenModel(other)).item() for batch in batches]
        assert (values[0] == pytest.approx(values[1], rel=1e-10)) is same
    assert KL(legacy_kl=True).reductions == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_certain_predictions_are_finite(dtype: torch.dtype) -> None:
    before = torch.tensor([[0.0, -torch.inf, -1000.0], [500.0, 0.0, -500.0]], dtype=dtype)
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 500.0, 0.0]], dtype=dtype)
    logits.requires_grad_()
    values = divergence(before, logits)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([0.0, 500.0]))
    values.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_token_that_both_rule_out_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    value = divergence(torch.tensor([[math.log(3.0), 0.0, -torch.inf]]), logits)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_switch_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`legacy_kl` of KL should be True or False. Found"):
        KL(legacy_kl="yes")  # type: ignore[arg-type]


def test_a_batch_without_answers_is_refused() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    pair = {"retain": {"input_ids": ids, "labels": torch.full_like(ids, -100)}}
    uniform = FrozenModel(lambda input_ids: SimpleNamespace(logits=torch.zeros(2, 3, 4)))
    with pytest.raises(ValueError, match="should have an answer token"):
        KL()(uniform.model, pair, uniform)
