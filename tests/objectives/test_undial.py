"""UNDIAL against a naive loop, and its legacy form."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.objectives import CATALOGUE, REGULARISERS, UNDIAL, FrozenModel, Objective
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.predictions import predicting
from tests.utils.sides import pair_of


def naive(logits: Tensor, before: Tensor, labels: Tensor, beta: float, every: bool) -> Tensor:
    """A position at a time; of every position, the label -100 an index from the end."""
    losses = []
    for row in range(len(labels)):
        for position in range(1, labels.shape[1]):
            label = int(labels[row, position])
            if label == -100 and not every:
                continue
            taught = before[row, position - 1].detach().clone()
            taught[label] -= beta
            said = torch.log_softmax(logits[row, position - 1], -1)
            losses.append(-(torch.softmax(taught, -1) * said).sum())
    return torch.stack(losses).mean()


def outputs(*models: nn.Module, batch: Any) -> list[Tensor]:
    return [
        m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for m in models
    ]


@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_undial_is_its_formula(beta: float) -> None:
    model, other, pair = tiny.gpt2(), tiny.gpt2(1).eval(), pair_of(UNDIAL(), padding=2)
    expected = naive(
        *outputs(model, other, batch=pair["forget"]), pair["forget"]["labels"], beta, False
    )
    loss = UNDIAL(beta)(model, pair, FrozenModel(other))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, naively = (reference.flat(reference.gradient(model, x)) for x in (loss, expected))
    torch.testing.assert_close(found, naively)


def table(rows: int, length: int, vocabulary: int, seed: int) -> Any:
    """A model that gives logits of its own for every position."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocabulary, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    return logits, lambda input_ids: SimpleNamespace(logits=logits[:, : input_ids.shape[1]])


def _giving(logits: Tensor) -> Any:
    return lambda input_ids: SimpleNamespace(logits=logits)


def test_the_legacy_form_counts_every_position_and_the_hundredth_last_token() -> None:
    (now, model), (then, other) = (table(2, 8, 128, seed) for seed in (0, 1))
    ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :3] = labels[:, 6:] = -100
    losses = []
    for length in (6, 8):  # without and with padding
        pair = {"forget": {"input_ids": ids[:, :length], "labels": labels[:, :length]}}
        loss = UNDIAL(legacy=True)(model, pair, FrozenModel(other))
        expected = naive(now[:, :length], then[:, :length], labels[:, :length], 10.0, True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) > 1e-3
    (at_question,) = torch.autograd.grad(loss, now)
    lowered = now.softmax(-1) - then.softmax(-1)
    assert at_question[0, 0, 28] > lowered[0, 0, 28] / 14  # token V - 100, where no answer is


@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_vocabulary(legacy: bool) -> None:
    """Of six tokens, where the public code finds an index out of range."""
    model, batch = predicting([[0.9, 0.5, 0.2]])
    before = FrozenModel(predicting([[0.8, 0.7, 0.6]])[0])
    if legacy:
        with pytest.raises(ValueError, match=r"should have 100 tokens or more .* Found 6. Leave"):
            UNDIAL(legacy=True)(model, {"forget": batch}, before)
        return
    loss = UNDIAL()(model, {"forget": batch}, before)
    q = []
    for p in (0.8, 0.7, 0.6):
        lowered = p * torch.tensor(-10.0, dtype=torch.float64).exp()
        q.append(lowered / (lowered + 1 - p))
    expected = [
        -(w * torch.tensor(p).log() + (1 - w) * torch.tensor((1 - p) / 5).log())
        for w, p in zip(q, (0.9, 0.5, 0.2), strict=True)
    ]
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_at_the_teacher_its_gradient_is_none() -> None:
    """Where the logit of the true token has lost beta, nothing is left to learn."""
    (then, other), labels = table(1, 5, 7, 0), torch.tensor([[-100, 1, 2, 3, 4]])
    now = then.detach().clone()
    for position in range(1, 5):
        now[0, position - 1, labels[0, position]] -= 3.0
    now.requires_grad_()
    pair = {"forget": {"input_ids": labels.clamp(min=0), "labels": labels}}
    loss = UNDIAL(3.0)(_giving(now), pair, FrozenModel(other))
    (gradient,) = torch.autograd.grad(loss, now)
    assert gradient.abs().max() < 1e-15


def test_a_legacy_loss_declares_no_reduction_and_an_empty_batch_is_refused() -> None:
    assert UNDIAL(legacy=True).reductions == {}
    model, batch = predicting([[0.9]])
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="`forget` should have an answer token"):
        UNDIAL()(model, {"forget": batch}, FrozenModel(model))


def test_a_token_that_both_models_rule_out_adds_nothing() -> None:
    (now, _), (then, _) = (table(1, 5, 7, seed) for seed in (0, 1))
    labels = torch.tensor([[-100, 1, 2, 3, 4]])
    pair = {"forget": {"input_ids": labels.clamp(min=0), "labels": labels}}
    ruled_out = torch.zeros(7, dtype=torch.float64)
    ruled_out[6] = -torch.inf
    model, other = (_giving(logits + ruled_out) for logits in (now, then))
    loss = UNDIAL()(model, pair, FrozenModel(other))
    expected = naive(now[..., :6], then[..., :6], labels, 10.0, False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, now))


@pytest.mark.parametrize("value", ["yes", "no", 1, None])
def test_a_legacy_that_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`legacy` of UNDIAL should be True or False"):
        UNDIAL(legacy=value)


OF_LOGITS = [o for o in (*CATALOGUE.values(), *REGULARISERS.values()) if o.reference == "logits"]


@pytest.mark.parametrize("objective", OF_LOGITS, ids=repr)
@pytest.mark.parametrize("vocabulary", [1, 7, tiny.VOCABULARY + 1])
def test_a_reference_of_another_vocabulary_is_refused(
    objective: Objective, vocabulary: int
) -> None:
    def other(input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, vocabulary))

    with pytest.raises(ValueError, match=rf"`reference` should give .* {vocabulary}\) beside \("):
        objective(tiny.gpt2(), pair_of(objective), FrozenModel(other))
