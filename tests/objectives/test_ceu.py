"""CEU against the cross-entropy of the public code, a token at a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from geffect.batch import behind_first
from geffect.objectives import CEU, FrozenModel
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.predictions import predicting
from tests.utils.sides import pair_of


def public(model: nn.Module, batch: dict[str, Tensor], skip: int) -> tuple[Tensor, Tensor]:
    """The cross-entropy towards q, and the entropy of q."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses, entropies = [], []
    for row, labels in enumerate(batch["labels"]):
        places = [i for i, label in enumerate(labels) if label != -100 and i > 0]
        for place in places[skip:]:
            z = logits[row, place - 1]
            kept = z.detach().clone()
            kept[labels[place]] = -torch.inf
            q = kept.softmax(-1)
            losses.append(-(q * z.log_softmax(-1)).sum())
            entropies.append(-torch.special.xlogy(q, q).sum())
    return torch.stack(losses).mean(), torch.stack(entropies).mean()


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_ceu_has_the_gradient_of_the_public_loss_and_its_value_but_for_the_entropy(
    skip: int,
) -> None:
    model, pair = tiny.gpt2(), pair_of(CEU(), padding=3, seed=4)
    loss = CEU(skip)(model, pair)
    expected, entropy = public(model, pair["forget"], skip)
    assert loss.item() == pytest.approx((expected - entropy).item(), rel=1e-10)
    found, publicly = (reference.flat(reference.gradient(model, x)) for x in (loss, expected))
    assert (found - publicly).abs().max() < 1e-12 * publicly.abs().max()


@pytest.mark.parametrize(("skip", "value"), [(0, 2.682397), (1, 2.067583)])
def test_the_numbers_of_open_unlearning(skip: int, value: float) -> None:
    """On p = (.9, .5, .2) and 5 equal tokens beside the true one, whose entropy is log 5."""
    model, batch = predicting([[0.9, 0.5, 0.2]])
    found = CEU(skip)(model, {"forget": batch}).item()
    assert found + torch.tensor(5.0).log().item() == pytest.approx(value, abs=1e-6)


def test_ceu_has_the_gradient_of_the_unlikelihood() -> None:
    model, pair = tiny.gpt2(), pair_of(CEU())
    rows = reference.token_log_p(model, pair["forget"])
    unlikelihood = -torch.cat([torch.log(1 - torch.stack(r[1:]).exp()) for r in rows if r[1:]])
    found = CEU(1)(model, pair)
    assert found.item() == pytest.approx(unlikelihood.mean().item(), rel=1e-10)
    expected = reference.flat(reference.gradient(model, unlikelihood.mean()))
    torch.testing.assert_close(reference.flat(reference.gradient(model, found)), expected)


def test_the_first_tokens_are_those_of_each_answer_of_a_row() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    batch = {"labels": labels, "position_ids": positions}
    taken = behind_first((labels != -100)[:, 1:], batch, 2)
    assert taken.int().tolist() == [[0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1]]


def test_its_weights_are_finite_where_a_probability_rounds_to_one() -> None:
    logits = torch.tensor([[[0.0, 200.0], [0.0, 0.0]]]).bfloat16().requires_grad_()
    ids = torch.tensor([[0, 1]])
    pair = {"forget": {"input_ids": ids, "labels": ids}}
    model = lambda input_ids: SimpleNamespace(logits=logits)  # noqa: E731
    weights = CEU(0).implicit_weights(model, pair)["weight"]
    assert weights.log().tolist() == pytest.approx([200.0])
    (gradient,) = torch.autograd.grad(CEU(0)(model, pair), logits)
    assert gradient[0, 0].tolist() == [-1.0, 1.0]  # bounded where that on p is not


def test_answers_of_nothing_but_their_first_token_are_refused() -> None:
    model, batch = predicting([[0.9], [0.2]])
    with pytest.raises(ValueError, match=r"more than 1 scored tokens .* Found none in 2"):
        CEU()(model, {"forget": batch})
    assert CEU(0)(model, {"forget": batch}, FrozenModel(model)).isfinite()


@pytest.mark.parametrize("skip", [-1, 1.0, True, "1"])
def test_a_count_that_is_none_is_refused(skip: object) -> None:
    with pytest.raises(ValueError, match=r"`skip` of CEU should be .* Found `skip = .* Pass"):
        CEU(skip)  # type: ignore[arg-type]
