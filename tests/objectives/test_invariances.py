"""What holds for every objective, by its being in the catalogue."""

import copy
import math
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from geffect.batch import batches_in, original_of, side_of
from geffect.data.collate import PaddingSide
from geffect.objectives import (
    CATALOGUE,
    REGULARISERS,
    FrozenModel,
    LikelihoodControl,
    Likelihoods,
    Objective,
    Reference,
    SharedForward,
    nll,
)
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import extreme, pair_of

OBJECTIVES: dict[str, Objective] = {
    **CATALOGUE,
    "likelihood-control": LikelihoodControl(delta=60.0),  # above the answers of the tiny models
    **{f"ga+{name}": objective for name, objective in REGULARISERS.items()},
}

UNSIGNED = {"rmu"}
"""What pulls to a random target: the forget risk rises in the end, not with every step."""

REVERSED = {"ssu-acquire", "sku"}
"""What learns first, to be negated afterwards: the forget risk falls where it is not low yet."""

BY_ANSWER = {"ga-lowest"}
"""Means over tokens that are chosen answer by answer."""

every = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def before() -> Reference:
    return FrozenModel(tiny.gpt2(seed=1).eval())


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return reference.flat(reference.gradient(model, loss))


def alike(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    scale = float(expected.abs().max())
    return bool(scale and (found - expected).abs().max() <= tolerance * scale)


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(
    objective: Objective, side: PaddingSide, model: nn.Module, before: Reference
) -> None:
    plain, padded = pair_of(objective), pair_of(objective, padding=5, side=side)
    losses = [objective(model, pair, before) for pair in (plain, padded)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-9, abs=1e-12)
    assert alike(*(gradient(model, loss) for loss in losses))
    short, long = (objective.implicit_weights(model, pair, before) for pair in (plain, padded))
    assert short.keys() == long.keys()
    for name, weights in short.items():
        assert not weights.requires_grad
        torch.testing.assert_close(long[name], weights)


@every
def test_order_changes_nothing(objective: Objective, model: nn.Module, before: Reference) -> None:
    losses = [
        objective(model, pair_of(objective, rows=rows), before) for rows in ((0, 1, 2), (2, 0, 1))
    ]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-9, abs=1e-12)
    assert alike(*(gradient(model, loss) for loss in losses))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_rows_are_so_many_answers_or_are_refused(name: str) -> None:
    """Several answers in one row, whose positions begin anew, are those answers in rows."""
    objective = OBJECTIVES[name]
    model, known = (tiny.llama(seed).double().eval() for seed in (0, 1))
    padded, before = pair_of(objective), FrozenModel(known)
    whole = any(how.kind != "token_mean" for how in objective.reductions.values())
    if whole or name in BY_ANSWER:
        with pytest.raises(ValueError, match="should have one answer a row for"):
            objective(model, packed_of(padded), before)
        return
    packed = objective(model, packed_of(padded), before)
    loss = objective(model, padded, before)
    assert packed.item() == pytest.approx(loss.item(), rel=1e-9)
    assert alike(gradient(model, packed), gradient(model, loss), 1e-7)


def packed_of(side: dict[str, Any]) -> dict[str, Any]:
    """All rows of each batch in one, without padding."""
    if not isinstance(side.get("labels"), Tensor):
        return {name: packed_of(inside) for name, inside in side.items()}
    attended = side["attention_mask"] != 0
    positions = torch.arange(attended.shape[1]).expand(attended.shape)
    columns = {"input_ids": side["input_ids"], "labels": side["labels"], "position_ids": positions}
    return {name: values[attended][None] for name, values in columns.items()}


@every
def test_labels_of_the_question_change_nothing(
    objective: Objective, model: nn.Module, before: Reference
) -> None:
    """The first token is predicted from nothing, whatever its label says."""
    plain, marked = pair_of(objective), pair_of(objective)
    for _, batch in batches_in(marked):
        assert (batch["labels"][:, 0] == -100).all()
        batch["labels"][:, 0] = batch["input_ids"][:, 0]
    losses = [objective(model, pair, before) for pair in (plain, marked)]
    assert torch.equal(*losses)
    assert torch.equal(*(gradient(model, loss) for loss in losses))


@every
def test_other_questions_are_other_losses(
    objective: Objective, model: nn.Module, before: Reference
) -> None:
    """What is not scored is read nevertheless: the tests above are of no constant."""
    plain, asked = pair_of(objective), pair_of(objective)
    for _, batch in batches_in(asked):
        batch["input_ids"][:, 0] = (batch["input_ids"][:, 0] + 1) % tiny.VOCABULARY
    values = [objective(model, pair, before).item() for pair in (plain, asked)]
    assert values[0] != values[1]


@every
def test_batches_add_up_to_their_data(
    objective: Objective, model: nn.Module, before: Reference
) -> None:
    """Each component on all rows is that on some of them, with their shares of the counts."""
    whole, *parts = (pair_of(objective, rows=rows) for rows in ((0, 1, 2), (0,), (1, 2)))
    expected = objective.components(model, whole, before)
    found = [objective.components(model, part, before) for part in parts]
    assert objective.reductions.keys() <= expected.keys()
    for name, how in objective.reductions.items():
        counts = [how.count(model, side_of(part, how.side)) for part in parts]
        assert sum(counts) == how.count(model, side_of(whole, how.side))
        mean = sum(n * c[name].loss.item() for n, c in zip(counts, found, strict=True))
        assert mean / sum(counts) == pytest.approx(expected[name].loss.item(), rel=1e-9, abs=1e-12)


@every
def test_the_loss_is_the_sum_of_its_components(
    objective: Objective, model: nn.Module, before: Reference
) -> None:
    pair = pair_of(objective)
    parts = objective.components(model, pair, before).values()
    summed = sum(part.weight * gradient(model, part.loss) for part in parts)
    assert alike(gradient(model, objective(model, pair, before)), summed)
    assert torch.equal(
        objective(SharedForward(model), pair, before), objective(model, pair, before)
    )


@every
def test_answers_that_are_all_empty_are_refused(
    objective: Objective, model: nn.Module, before: Reference
) -> None:
    """Those to be forgotten: a loss without a gradient would train nothing in silence."""
    pair = pair_of(objective)
    for _, batch in batches_in({"forget": pair["forget"]}):
        batch["labels"].fill_(-100)
    with pytest.raises(ValueError, match="should have an answer"):
        objective(model, pair, before)


class Limited:
    """A reference that gives what an objective asks for, and nothing more."""

    def __init__(self, objective: Objective, whole: FrozenModel, pair: Any) -> None:
        self._whole, self._need = whole, objective.reference
        self._kept = Likelihoods(whole, [batch for _, batch in batches_in(pair)])

    def log_probabilities(self, batch: Any) -> Tensor:
        return self._kept.log_probabilities(batch)

    def logits(self, batch: Any) -> Tensor:
        return self._whole.logits(batch) if self._need == "logits" else self._refuse()

    def hidden_states(self, batch: Any) -> tuple[Tensor, ...]:
        return self._whole.hidden_states(batch) if self._need == "hidden states" else self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError(f"{self._need} should do")


@every
def test_it_asks_for_no_more_of_the_reference_than_it_says(
    objective: Objective, model: nn.Module, before: FrozenModel
) -> None:
    pair = pair_of(objective)
    expected = objective(model, pair, before)
    if objective.reference == "none":
        assert torch.equal(objective(model, pair), expected)
        return
    limited = Limited(objective, before, pair)
    assert objective(model, pair, limited).item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"`reference` of \w+ should be .* Found None. Pass"):
        objective(model, pair)


@every
@pytest.mark.parametrize("model_of_before", ["the same", "another"])
def test_finite_in_bfloat16_at_probabilities_of_zero_and_one(
    objective: Objective, model_of_before: str
) -> None:
    sharp, other = (tiny.llama(seed).bfloat16() for seed in (0, 1))
    with torch.no_grad():
        for one in (sharp, other):
            one.get_submodule("lm_head").weight.mul_(1000)
    pair = extreme(objective, sharp)
    rows = reference.token_log_p(sharp.float(), original_of(pair["forget"]))
    log_p = torch.cat([torch.stack(row) for row in rows])
    assert log_p.max() > -1e-6 and log_p.min() < -100
    sharp.bfloat16()
    known = FrozenModel(copy.deepcopy(sharp if model_of_before == "the same" else other).eval())
    loss = objective(sharp, pair, known)
    assert loss.isfinite() and loss.dtype == torch.float32
    assert gradient(sharp, loss).isfinite().all()
    for weights in objective.implicit_weights(sharp, pair, known).values():
        assert len(weights) and weights.isfinite().all()


@pytest.fixture(scope="module")
def memorised() -> nn.Module:
    """A model that knows the forget answers by heart, the same for every objective."""
    model = tiny.gpt2()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    batch = pair_of(CATALOGUE["ga"])["forget"]
    for _ in range(30):
        optimizer.zero_grad()
        nll(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert 1e-3 < nll(model, batch).item() < 0.5
    return model.eval()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in UNSIGNED])
def test_descent_on_the_objective_raises_the_forget_risk(
    name: str, model: nn.Module, memorised: nn.Module
) -> None:
    objective, start = OBJECTIVES[name], model if name in REVERSED else memorised
    moved, pair = copy.deepcopy(start), pair_of(objective)
    grads = reference.gradient(moved, objective(moved, pair, FrozenModel.copied(start)))
    norm = math.sqrt(reference.inner(grads, grads))
    with torch.no_grad():
        for parameter, grad in zip(moved.parameters(), grads.values(), strict=True):
            parameter -= 1e-4 / norm * grad
    rises = nll(moved, pair["forget"]) > nll(start, pair["forget"])
    assert rises == (name not in REVERSED)
