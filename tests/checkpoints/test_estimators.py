"""Estimators: their bias on a Gaussian, their rows against naive loops, their memory."""

import gc
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect.analysis.intervals import share_below
from geffect.checkpoints import batch_gradients
from geffect.checkpoints.batch_gradients import Sources
from geffect.checkpoints.estimators import full, reference_ema, same_batch, split_batch
from geffect.objectives import (
    NPO,
    Combination,
    Component,
    FrozenModel,
    GradDiff,
    GradientAscent,
    Objective,
    Reduction,
    Reference,
    WeightedGradientAscent,
    combination,
)
from geffect.risk import sequence_sum, token_log_probabilities
from tests.utils import reference
from tests.utils import shallow as tiny

Batch = dict[str, Tensor]
GA = Combination({"forget": -1.0})
BEFORE = FrozenModel(tiny.gpt2(seed=9).eval())


# A Gaussian: the gradient of a batch is the mean of its draws.


class Linear(nn.Module):
    """The loss <theta, x> of every draw, whose gradient is the draw."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, draws: Tensor) -> Tensor:
        return draws @ self.theta


@pytest.fixture
def linear_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_gradients, combination):
        monkeypatch.setattr(module, "nll", lambda model, batch: model(draws=batch["draws"]).mean())


def draws(x: Tensor, size: int) -> list[Batch]:
    """Batches of draws, each with one scored token."""
    return [
        {"draws": part, "labels": torch.zeros(len(part), 2, dtype=torch.long)}
        for part in x.split(size)
    ]


def e_u(sources: Sources, estimator: Callable[[Sources], Any]) -> np.ndarray:
    """The unlearning G-effect in each row."""
    rows = list(estimator(sources))
    place = [rows[0].names.index(name) for name in ("objective", "forget")]
    return np.array([float(row.gram[:, place[0], place[1]].sum()) for row in rows])


@pytest.mark.usefixtures("linear_loss")
def test_same_batch_is_biased_by_the_variance_of_a_batch_and_the_others_are_right() -> None:
    size, n, count, deviation = 200, 4, 200, 3.0
    rng = torch.Generator().manual_seed(0)
    mu = 0.1 * torch.ones(size, dtype=torch.float64)
    x = mu + deviation * torch.randn(n * count, size, generator=rng, dtype=torch.float64)
    truth, bias = -float(mu @ mu), -size * deviation**2 / n
    sources = Sources(Linear(size), GA, {"forget": draws(x, n)})

    def off(rows: np.ndarray, expected: float) -> float:
        """By how many standard errors the mean of the rows differs."""
        return float(abs(rows.mean() - expected) / (rows.std(ddof=1) / math.sqrt(len(rows))))

    same, split = e_u(sources, same_batch), e_u(sources, split_batch)
    assert truth == pytest.approx(-2.0) and bias == -450.0
    assert off(same, truth + bias) < 3 and off(same, truth) > 100
    assert off(split, truth) < 3
    mean = x.mean(dim=0)
    whole = e_u(sources, full)
    assert whole.mean() == pytest.approx(-float(mean @ mean), rel=1e-12)
    # Of the population, `full` is as biased as one batch of everything.
    assert off(whole, truth - size * deviation**2 / (n * count)) < 3


@pytest.mark.usefixtures("linear_loss")
def test_a_squared_norm_that_is_lost_in_noise_may_be_estimated_negative() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = list(split_batch(Sources(Linear(3), GA, {"forget": draws(x, 2)})))
    assert min(float(row.gram[0, 1, 1]) for row in rows) < 0


@pytest.mark.usefixtures("linear_loss")
def test_rows_of_one_set_are_the_derivative_of_the_gram_matrix_by_the_weight_of_a_batch() -> None:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sources = Sources(Linear(3), GA, {"forget": draws(x, 2)})
    batches = x.reshape(8, 2, 3).mean(dim=1)
    whole = batches.mean(dim=0)
    for row, g in zip(full(sources), batches, strict=True):
        expected = 2 * float(g @ whole) - float(whole @ whole)
        assert float(row.gram[0, 1, 1]) == pytest.approx(expected, rel=1e-12)
        assert float(row.gram[0, 0, 1]) == pytest.approx(-expected, rel=1e-12)
        # By a difference quotient: the weight e is moved to the batch from all.
        e = 1e-6
        moved = (1 - e) * whole + e * g
        slope = (float(moved @ moved) - float(whole @ whole)) / e
        change = float(row.gram[0, 1, 1]) - float(whole @ whole)
        assert slope == pytest.approx(change, rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("linear_loss")
def test_the_spread_of_the_rows_of_full_is_that_of_samples_drawn_anew() -> None:
    """Both sets vary on their own: so do the rows, and their variances add up."""
    rng = torch.Generator().manual_seed(3)
    forget = 1 + torch.randn(60, 4, generator=rng, dtype=torch.float64)
    retain = 2 + torch.randn(30, 4, generator=rng, dtype=torch.float64)
    sets = {"forget": draws(forget, 2), "retain": draws(retain, 2)}
    rows = list(full(Sources(Linear(4), GA, sets)))
    values = np.array([float(row.gram[0, 0, 2]) for row in rows])
    a, b = forget.reshape(30, 2, 4).mean(1).numpy(), retain.reshape(15, 2, 4).mean(1).numpy()
    draw = np.random.default_rng(0)
    anew = [
        -a[draw.integers(30, size=30)].mean(0) @ b[draw.integers(15, size=15)].mean(0)
        for _ in range(4000)
    ]
    assert len(rows) == 45
    assert values.std() / math.sqrt(45) == pytest.approx(np.std(anew), rel=0.1)


# Against naive loops


def batches(seed: int, count: int) -> list[Batch]:
    """Batches of unequal size and length."""
    return [tiny.batch(seed + i, rows=2 + i % 3, length=7 + i % 4) for i in range(count)]


def grouped(parts: Sequence[Batch], count: int) -> list[list[Batch]]:
    """Batches in order, in groups whose sizes differ by one at most, the larger ones spread."""
    bounds = [i * len(parts) // count for i in range(count + 1)]
    return [[*parts[a:b]] for a, b in itertools.pairwise(bounds)]


def joined(parts: Sequence[Batch]) -> Batch:
    """All rows as one batch."""
    width = max(part["input_ids"].shape[1] for part in parts)

    def widened(name: str, value: int) -> Tensor:
        tensors = [nn.functional.pad(p[name], (0, width - p[name].shape[1]), value=value)
                   for p in parts]  # fmt: skip
        return torch.cat(tensors)

    return {"input_ids": widened("input_ids", 0), "attention_mask": widened("attention_mask", 0),
            "labels": widened("labels", -100)}  # fmt: skip


def naive_gradients(
    model: nn.Module,
    objective: Objective,
    forget: Batch,
    retain: Batch,
    before: Reference = BEFORE,
) -> dict[str, dict[str, Tensor]]:
    """The gradient of every source, by autograd."""
    risks = {"forget": reference.nll(model, forget), "retain": reference.nll(model, retain)}
    loss = objective(model, {"forget": forget, "retain": retain}, before)
    return {
        name: reference.gradient(model, value)
        for name, value in {"objective": loss, **risks}.items()
    }


def inner_products(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> np.ndarray:
    """<a_i, b_j> for every parameter."""
    names = list(a["forget"])
    return np.array([[[reference.inner(x, y, name) for y in b.values()] for x in a.values()]
                     for name in names])  # fmt: skip


def close(a: Any, b: np.ndarray, *, relative: float = 1e-9) -> bool:
    """Whether inner products agree, beside the longest gradient of their parameter."""
    scale = np.abs(b).max(axis=(-1, -2), keepdims=True)
    return bool((np.abs(np.asarray(a) - b) <= relative * scale + 1e-300).all())


OBJECTIVES: dict[str, Objective] = {
    "declared": Combination({"forget": -1.0, "retain": 0.5}),
    "ga": GradientAscent(),
    "wga": WeightedGradientAscent(alpha=0.5),
    "npo": NPO(beta=0.3),
    "npo+gd": GradDiff(forget=NPO(beta=0.3), weight=2.0),
}


# How batches are grouped does not ask for the objective, only for what it is a mean over.
@pytest.mark.parametrize(
    ("name", "forget", "retain"),
    [
        *[(name, *counts) for name in ("declared", "npo") for counts in ((4, 4), (5, 9), (5, 4))],
        ("ga", 5, 9),
        ("wga", 5, 4),
        ("npo+gd", 5, 9),
    ],
)
def test_same_and_split_batch_row_by_row(name: str, forget: int, retain: int) -> None:
    """Every batch is used once, several of them as one batch of all their rows."""
    model = tiny.gpt2()
    objective = OBJECTIVES[name]
    sets = {"forget": batches(0, forget), "retain": batches(50, retain)}

    def naive(count: int) -> list[dict[str, dict[str, Tensor]]]:
        f, r = ([joined(group) for group in grouped(own, count)] for own in sets.values())
        return [naive_gradients(model, objective, *pair) for pair in zip(f, r, strict=True)]

    rows = list(same_batch(Sources(model, objective, sets, reference=BEFORE)))
    assert [row.names for row in rows] == [("objective", "forget", "retain")] * min(forget, retain)
    count = min(forget, retain)
    even, single = count // 2 * 2, naive(count)
    for row, g in zip(rows, single, strict=True):
        assert close(row.gram, inner_products(g, g))
    pairs = list(split_batch(Sources(model, objective, sets, reference=BEFORE)))
    halves = single if even == count else naive(even)
    assert len(pairs) == even // 2
    for row, a, b in zip(pairs, halves[::2], halves[1::2], strict=True):
        across = inner_products(a, b)
        assert close(row.gram, (across + across.swapaxes(-1, -2)) / 2)
        assert close(row.gram, row.gram.mT.numpy())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_batches_of_a_row(name: str) -> None:
    model = tiny.gpt2()
    objective = OBJECTIVES[name]
    forget, retain = batches(0, 2), batches(50, 6)
    both = [{"forget": f, "retain": joined(r)}
            for f, r in zip(forget, grouped(retain, 2), strict=True)]  # fmt: skip
    with torch.no_grad():
        risks = [{side: float(reference.nll(model, batch)) for side, batch in pair.items()}
                 for pair in both]  # fmt: skip
        losses = [float(objective(model, pair, BEFORE)) for pair in both]
    expected = [{"objective": loss, **risk} for loss, risk in zip(losses, risks, strict=True)]
    sources = Sources(model, objective, {"forget": forget, "retain": retain}, reference=BEFORE)
    for row, values in zip(same_batch(sources), expected, strict=True):
        assert row.losses == pytest.approx(values)
    (row,) = split_batch(sources)
    assert row.losses["objective"] == pytest.approx(sum(losses) / 2)


@pytest.mark.usefixtures("linear_loss")
@pytest.mark.parametrize(("forget", "retain"), [(16, 16), (16, 24)])
def test_intervals_of_unequal_sets_hold_the_truth(forget: int, retain: int) -> None:
    """e_r = -<mu_f, mu_r> = -1.8 in at least 90 % of 80 studies, each with its own draws."""
    rng = torch.Generator().manual_seed(forget + retain)
    draw, held = np.random.default_rng(0), []
    for _ in range(80):
        f = 0.3 + torch.randn(forget, 20, generator=rng, dtype=torch.float64)
        r = 0.3 + torch.randn(retain, 20, generator=rng, dtype=torch.float64)
        sources = Sources(Linear(20), GA, {"forget": draws(f, 1), "retain": draws(r, 1)})
        rows = np.array([float(row.gram[0, 0, 2]) for row in split_batch(sources)])
        means = rows[draw.integers(len(rows), size=(400, len(rows)))].mean(axis=1)
        share = share_below(0.95, len(rows))
        held.append(np.quantile(means, share) <= -1.8 <= np.quantile(means, 1 - share))
    assert len(rows) >= 8 and np.mean(held) >= 0.9


@pytest.mark.parametrize("name", OBJECTIVES)
def test_full_is_the_gradient_of_one_batch_of_everything(name: str) -> None:
    model = tiny.gpt2()
    objective = OBJECTIVES[name]
    forget, retain = batches(0, 8), batches(50, 8)
    rows = list(
        full(Sources(model, objective, {"forget": forget, "retain": retain}, reference=BEFORE))
    )
    g = naive_gradients(model, objective, joined(forget), joined(retain))
    assert len(rows) == 16
    assert close(torch.stack([row.gram for row in rows]).mean(dim=0), inner_products(g, g))
    with torch.no_grad():
        losses = {"forget": float(reference.nll(model, joined(forget))),
                  "retain": float(reference.nll(model, joined(retain)))}  # fmt: skip
    for row in rows:
        assert row.names == ("objective", "forget", "retain")
        assert {name: row.losses[name] for name in losses} == pytest.approx(losses)
        assert close(row.gram, row.gram.mT.numpy())


@pytest.mark.parametrize("name", ["npo", "npo+gd"])
def test_full_does_not_know_the_order_or_the_size_of_batches(name: str) -> None:
    model = tiny.gpt2()
    objective = OBJECTIVES[name]
    forget, retain = batches(0, 4), batches(50, 3)

    def estimate(forget: list[Batch], retain: list[Batch], estimator: Any) -> np.ndarray:
        rows = list(
            estimator(
                Sources(model, objective, {"forget": forget, "retain": retain}, reference=BEFORE)
            )
        )
        return torch.stack([row.gram for row in rows]).mean(dim=0).numpy()

    others = [forget[::-1], [joined(forget[:2]), joined(forget[2:])], [joined(forget)]]
    first = estimate(forget, retain, full)
    for other in others:
        assert close(estimate(other, retain[::-1], full), first)
    averaged = estimate(forget, forget, reference_ema)
    assert not close(estimate(forget[::-1], forget, reference_ema), averaged, relative=1e-3)


class SumOfSquares(Objective):
    """An objective of one's own: minus the mean over sequences of the squared answer NLL."""

    def components(
        self, model: Any, batch: Any, reference: Reference | None = None
    ) -> dict[str, Component]:
        log_p, scored = token_log_probabilities(model, batch["forget"])
        return {"erase": Component(sequence_sum(log_p, scored).square().mean(), -1.0)}


class DeclaredSumOfSquares(SumOfSquares):
    @property
    def reductions(self) -> dict[str, Reduction]:
        return {"erase": Reduction("forget", "sequence_sum")}


class Elsewhere(SumOfSquares):
    @property
    def reductions(self) -> dict[str, Reduction]:
        return {"erase": Reduction("moon", "sequence_sum")}


def test_an_objective_of_ones_own_says_what_it_is_a_mean_over() -> None:
    model, forget, retain = tiny.gpt2(), batches(0, 3), batches(50, 2)
    sets = {"forget": forget, "retain": retain}
    for objective in (SumOfSquares(), GradDiff(forget=SumOfSquares()), Elsewhere()):
        for estimator in (full, same_batch, split_batch):
            with pytest.raises(
                ValueError, match=r"`reductions` of the objective.*nothing of `erase`"
            ):
                list(estimator(Sources(model, objective, sets, reference=BEFORE)))
        # On pairs of batches there is nothing to put together.
        paired = Sources(model, objective, {"forget": forget[:2], "retain": retain})
        assert len(list(same_batch(paired))) == 2 == len(list(split_batch(paired))) + 1
    objective = DeclaredSumOfSquares()
    g = naive_gradients(model, objective, joined(forget), joined(retain))
    (row,) = full(Sources(model, objective, sets, reference=BEFORE))
    assert close(row.gram, inner_products(g, g))
    # Over tokens it would be another gradient: batches have answers of different lengths.
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in forget]
    assert len({n / len(b["labels"]) for n, b in zip(tokens, forget, strict=True)}) > 1


def test_graddiff_of_full_is_the_identity() -> None:
    model = tiny.gpt2()
    for objective in (GradDiff(), Combination({"forget": -1.0, "retain": 1.0})):
        sets = {"forget": batches(0, 3), "retain": batches(50, 2)}
        rows = list(full(Sources(model, objective, sets, reference=BEFORE)))
        K = torch.stack([row.gram for row in rows]).mean(dim=0).sum(dim=0)
        assert float(K[0, 2]) == pytest.approx(float(K[2, 2] - K[1, 2]), rel=1e-9)


@pytest.mark.parametrize("retain", [1, 2])
def test_full_of_few_batches_has_no_spread_and_no_second_pass(retain: int) -> None:
    model, told = tiny.gpt2(), []
    sets = {"forget": batches(0, 3), "retain": batches(50, retain)}
    sources = Sources(model, GA, sets, report=lambda done, total: told.append((done, total)))
    (row,) = full(sources)
    g = naive_gradients(model, GA, joined(sets["forget"]), joined(sets["retain"]))
    assert close(row.gram, inner_products(g, g))
    assert told == [(n, 3 + retain) for n in range(1, 4 + retain)]


def test_a_further_risk_and_the_update() -> None:
    model = tiny.gpt2()
    sets = {"forget": batches(0, 4), "retain": batches(50, 4), "facts": batches(80, 5)}
    moved = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    update = list(moved.values())
    g = naive_gradients(model, GA, joined(sets["forget"]), joined(sets["retain"]))
    g["facts"] = reference.gradient(model, reference.nll(model, joined(sets["facts"])))
    expected = inner_products({**g, "update": moved}, {**g, "update": moved})
    rows = list(full(Sources(model, GA, sets, update=update)))
    assert rows[0].names == ("objective", "forget", "retain", "facts", "update")
    assert close(torch.stack([row.gram for row in rows]).mean(dim=0), expected)
    assert "update" not in rows[0].losses
    for estimator in (same_batch, split_batch, reference_ema):
        for row in estimator(Sources(model, GA, sets, update=update)):
            assert close(row.gram[:, -1:, -1:], expected[:, -1:, -1:])
    naive = [naive_gradients(model, GA, f, r)
             for f, r in zip(sets["forget"], sets["retain"], strict=True)]  # fmt: skip
    split = next(split_batch(Sources(model, GA, sets, update=update)))
    along = [inner_products(g, {"update": moved})[:, 1, 0] for g in naive[:2]]
    assert split.gram[:, 1, -1].numpy() == pytest.approx((along[0] + along[1]) / 2)


# The public code


@pytest.mark.parametrize("objective", [GA, NPO(beta=0.5)])
def test_reference_ema_is_the_recursion_of_the_public_code(objective: Any) -> None:
    model, before = tiny.llama(tied=True), FrozenModel(tiny.llama(seed=3).eval())
    forget = [tiny.batch(i) for i in range(10)]
    retain = [tiny.batch(50 + i) for i in range(10)]
    averages: dict[str, dict[str, Tensor]] = {}
    expected = []
    for count, batches in enumerate(zip(forget, retain, strict=True), start=1):
        for source, g in naive_gradients(model, objective, *batches, before).items():
            old = averages.get(source)
            averages[source] = {
                name: new if old is None else 0.6 * old[name] + 0.4 * new for name, new in g.items()
            }
        if count % 4 == 3:
            expected.append(inner_products(averages, averages))
    sets = {"forget": forget, "retain": retain}
    rows = list(reference_ema(Sources(model, objective, sets, reference=before)))
    assert len(rows) == len(expected) == 2  # after the micro-batches 3 and 7, counted from one
    for row, K in zip(rows, expected, strict=True):
        assert close(row.gram, K, relative=1e-4)


def test_averages_are_kept_in_float32() -> None:
    model = tiny.llama().bfloat16()
    sets = {name: [tiny.batch(i) for i in range(8)] for name in ("forget", "retain")}
    averages: list[Tensor] = []
    for b in range(8):
        g = reference.gradient(model, reference.nll(model, sets["forget"][b]))
        new = reference.flat(g).double()
        averages.append(new if not averages else 0.6 * averages[-1] + 0.4 * new)
    expected = [float(averages[b] @ averages[b]) for b in (2, 6)]
    rows = list(reference_ema(Sources(model, GA, sets)))
    assert [float(row.gram[:, 1, 1].sum()) for row in rows] == pytest.approx(expected, rel=0.02)


# What is there, and what is not


def most_resident(model: Any, objective: Any, sets: Any, estimator: Any) -> int:
    """How many gradients of the embedding there were at a time."""
    embedding, most = model.transformer.wte.weight, 0

    def look(done: int, total: int) -> None:
        nonlocal most
        there = [
            o for o in gc.get_objects()
            if type(o) is Tensor and o.shape == embedding.shape and not o.requires_grad
        ]  # fmt: skip
        most = max(most, len(there))

    before = FrozenModel(tiny.gpt2(seed=9).requires_grad_(True).eval())
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again and again
    for _ in estimator(Sources(model, objective, sets, reference=before, report=look)):
        pass
    return most


@pytest.mark.parametrize("estimator", [same_batch, split_batch, full, reference_ema])
def test_no_more_than_2k_gradients_are_resident(estimator: Any) -> None:
    sets = {"forget": batches(0, 8), "retain": batches(50, 8)}
    losses = 3  # the forget part of the objective, and two risks, one of them its retain part
    objective = GradDiff(forget=NPO(beta=0.3))
    assert 0 < most_resident(tiny.gpt2(), objective, sets, estimator) <= 2 * losses


def test_no_more_than_3k_are_where_batches_stand_together() -> None:
    model = tiny.gpt2()
    sets = {"forget": batches(0, 4), "retain": batches(50, 7)}
    most = most_resident(model, GradDiff(forget=NPO(beta=0.3)), sets, split_batch)
    assert 6 < most <= 3 * 3


def test_nothing_is_changed() -> None:
    model = tiny.llama(dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    sets = {"forget": batches(0, 4), "retain": batches(50, 4)}
    for estimator in (same_batch, split_batch, full, reference_ema):
        list(estimator(Sources(model, GA, sets)))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert model.lm_head.weight.grad is kept and torch.equal(kept, torch.ones_like(kept))


@pytest.mark.parametrize(
    ("estimator", "forget", "says"),
    [
        (split_batch, 4, r"`retain` should have two batches or more.* Found 1"),
        (reference_ema, 4, r"`retain` should have 3 batches or more.* Found 1"),
    ],
)
def test_too_few_batches(estimator: Any, forget: int, says: str) -> None:
    sets = {"forget": batches(0, forget), "retain": batches(50, 1)}
    with pytest.raises(ValueError, match=says):
        list(estimator(Sources(tiny.gpt2(), GA, sets)))
