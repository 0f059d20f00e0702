"""SSD against a loop over rows and numbers."""

import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from geffect.data.collate import collate
from geffect.edits import LFSSD, SSD, Edit
from geffect.edits.importance import of_size
from geffect.layers import trainable
from tests.utils import reference, tiny


class TwoLayers(nn.Module):
    """A language model of two layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(tiny.VOCABULARY, 6)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, tiny.VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = torch.tanh(self.first(self.embedding(input_ids)))
        return SimpleNamespace(logits=self.second(hidden))


FORGET, RETAIN = [tiny.batch(1, rows=2), tiny.batch(2, rows=3)], [tiny.batch(5, rows=4)]
DATA = {"forget": FORGET, "retain": RETAIN}


def rows(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {n: v[i : i + 1] for n, v in b.items()} for b in batches for i in range(len(b["labels"]))
    ]


def energy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1]
    terms = [
        logits[r, i].pow(2).sum()
        for r, labels in enumerate(batch["labels"][:, 1:])
        for i, label in enumerate(labels)
        if label != -100
    ]
    return torch.stack(terms).mean()


def naive_importance(
    model: nn.Module, batches: list[dict[str, Tensor]], free: bool
) -> list[Tensor]:
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for batch in batches:
        loss = energy(model, batch) if free else reference.nll(model, batch)
        grads = torch.autograd.grad(loss, [*model.parameters()])
        for total, grad in zip(sums, grads, strict=True):
            total += grad.abs() if free else grad**2
    return [total / len(batches) for total in sums]


def naive(model: nn.Module, alpha: float, lam: float, *, free: bool, every: bool) -> list[Tensor]:
    """The dampened parameters, number by number."""
    forget = naive_importance(model, rows(FORGET), free)
    other = naive_importance(model, rows(RETAIN) + (rows(FORGET) if every else []), free)
    after = []
    for parameter, f, d in zip(model.parameters(), forget, other, strict=True):
        new = parameter.detach().clone().flatten()
        for i, (x, y) in enumerate(zip(f.flatten().tolist(), d.flatten().tolist(), strict=True)):
            if x > alpha * y:
                new[i] *= min(lam * y / x, 1.0)
        after.append(new.view_as(parameter))
    return after


@pytest.mark.parametrize("every", [False, True], ids=["retain", "all"])
@pytest.mark.parametrize(("alpha", "lam"), [(1.2, 1.0), (1.1, 0.1), (0.5, 0.9)])
@pytest.mark.parametrize("kind", [SSD, LFSSD])
def test_a_loop(kind: type[SSD], alpha: float, lam: float, every: bool) -> None:
    model = TwoLayers()
    edit = kind(alpha=alpha, dampening=lam, against="all" if every else "retain")
    expected = naive(model, alpha, lam, free=kind is LFSSD, every=every)
    with edit.change(model, DATA) as change:
        for parameter, after in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(parameter, after, rtol=1e-12, atol=0)
    assert 0 < sum(change.touched.values()) < sum(p.numel() for p in model.parameters())
    assert change.facts["batches"] == {
        "forget": 5,
        "retain" if not every else "all": 9 if every else 4,
    }


@pytest.mark.parametrize("alpha", [1e300, math.inf])
def test_a_large_alpha_selects_nothing_that_retain_knows(alpha: float) -> None:
    model = TwoLayers()
    edit = SSD(alpha=alpha, against="all")
    change = edit.change(model, DATA)
    assert change.displacement == {} and change.facts["selected"] == 0
    assert change.facts["largest_ratio"] <= 9 / 5 * (1 + 1e-12)


def test_a_large_lambda_and_a_full_mask_leave_the_model() -> None:
    model = tiny.gpt2()
    change = SSD(alpha=1e-300, dampening=1e300, against="all").change(model, DATA)
    assert change.facts["selected"] > 0 and not any(change.touched.values())


def test_a_fraction_selects_just_so_many() -> None:
    model = TwoLayers()
    total = sum(p.numel() for p in model.parameters())
    ratios = torch.cat([
        (f / d)[f > 0].flatten()
        for f, d in zip(
            naive_importance(model, rows(FORGET), False),
            naive_importance(model, rows(RETAIN) + rows(FORGET), False),
            strict=True,
        )
    ])  # fmt: skip
    for count in (1, 10, 60):
        change = SSD(fraction=count / total, against="all").change(model, DATA)
        # Numbers may have one ratio and one importance.
        threshold = ratios.sort(descending=True).values[count - 1]
        assert change.facts["selected"] >= count
        assert change.facts["selected"] <= (ratios >= threshold * (1 - 1e-9)).sum()
        assert change.facts["alpha"] == pytest.approx(threshold.item())
    with pytest.raises(ValueError, match=r"an importance for: 0.* of them. Found 1.0"):
        SSD(fraction=1.0).change(tiny.llama(), DATA)


def test_fishers_are_of_one_batch_size() -> None:
    """mu^2 + sigma^2 / B: it falls as the batches grow, and both sets have the same."""
    model = TwoLayers()
    four = [tiny.batch(1, rows=4)]
    given = {"forget": four, "retain": [tiny.batch(6, rows=1), tiny.batch(7, rows=3)]}
    for size in (1, 2, 4):
        change = SSD(alpha=1.1, fisher_batch=size).change(model, given)
        assert change.facts["batches"] == {"forget": 4 // size, "retain": 4 // size}
        assert f"batches of {size}" in change.facts["importance"]
    naively = naive_importance(model, [four[0]], False)
    own = SSD(fisher_batch=4)._importance(model, of_size("forget", four, 4), [*trainable(model)])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(naively, own.values(), strict=True))
    with pytest.warns(UserWarning, match="the last 1 are left out"):
        SSD(fisher_batch=2).change(model, {**given, "forget": [tiny.batch(1, rows=3)]})
    with pytest.raises(
        ValueError, match=r"`forget` should have a batch of 5 rows or more. Found 4"
    ):
        SSD(fisher_batch=5).change(model, given)


@pytest.mark.parametrize("kind", [SSD(alpha=1.2), LFSSD(alpha=1.2), SSD(fraction=0.01)])
def test_padding_batching_and_training_change_nothing(kind: Edit) -> None:
    model = tiny.gpt2()
    expected = kind.displacement(model, DATA)
    padded = [
        {n: torch.nn.functional.pad(v, (0, 3), value=-100 if n == "labels" else 0)
         for n, v in b.items()} for b in FORGET
    ]  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    state = torch.get_rng_state()
    together = collate([{n: v[0] for n, v in row.items()} for row in rows(padded)])
    for forget in (padded, rows(FORGET), together):
        found = kind.displacement(model, {"forget": forget, "retain": RETAIN[0]})
        assert found.keys() == expected.keys()
        for name, moved in expected.items():
            assert torch.allclose(found[name], moved, rtol=1e-9, atol=1e-15)
    assert model.training and (model.transformer.wte.weight.grad == 1).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_patterns() -> None:
    model = tiny.llama()
    chosen = SSD(alpha=1.1, include="*mlp*, *norm*", exclude="*.0.*").displacement(model, DATA)
    assert chosen and all(("mlp" in n or "norm" in n) and ".0." not in n for n in chosen)
    with pytest.raises(ValueError, match=r"Found `\*mpl\*`, which none of them has"):
        SSD(include="*mpl*").change(model, DATA)
    with pytest.raises(ValueError, match="should leave parameters to select from"):
        SSD(exclude="*").change(model, DATA)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"alpha": math.nan}, "alpha = nan"),
        ({"fraction": 0.0}, "fraction = 0.0"),
        ({"fraction": 1.5}, "fraction = 1.5"),
        ({"alpha": 1.0, "fraction": 0.5}, "alpha = 1.0`. Leave one of the two out"),
        ({"dampening": -1.0}, "dampening = -1.0"),
        ({"dampening": math.nan}, "dampening = nan"),
        ({"against": "rest"}, "against = 'rest'"),
        ({"fisher_batch": 0}, "fisher_batch = 0"),
        ({"alpha": "much"}, "alpha = 'much'"),
        ({"fisher_batch": 1.5}, "fisher_batch = 1.5"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        SSD(**options)


def test_data_that_are_refused() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"Found `forget`. Pass `retain` as well: batches"):
        SSD().change(model, {"forget": FORGET})
    odd = [{**FORGET[0], "scale": torch.tensor(1.0)}]
    with pytest.raises(ValueError, match="otherwise for `scale`"):
        SSD().change(model, {**DATA, "forget": odd})
    packed = {**FORGET[0], "position_ids": torch.arange(9).repeat(2, 1) % 5}
    packed["labels"] = packed["input_ids"].clone()
    with pytest.raises(ValueError, match="one answer a row"):
        SSD().change(model, {**DATA, "forget": packed})
    unscored = {**FORGET[0], "labels": torch.full((2, 9), -100)}
    for kind in (SSD(), LFSSD()):
        for name in ("forget", "retain"):
            with pytest.raises(ValueError, match=f"`{name}` should have an answer token"):
                kind.change(model, {**DATA, name: unscored})


@pytest.mark.parametrize("kind", [SSD(alpha=1.1), LFSSD(alpha=1.1), SSD(fraction=0.1)])
def test_gradients_that_are_not_finite_are_refused(kind: Edit) -> None:
    """They would select nothing, or anything, in silence."""
    for odd in (math.nan, math.inf):
        model = tiny.llama()
        with torch.no_grad():
            model.lm_head.weight[0, 0] = odd
        with pytest.raises(ValueError, match="Gradients of an importance should be finite"):
            kind.change(model, DATA)


@pytest.mark.parametrize("kind", [SSD, LFSSD])
def test_a_fraction_holds_where_retain_knows_nothing_of_more(kind: type[SSD]) -> None:
    """Rows of an embedding that only the forget data uses have an infinite ratio, all of them."""
    model = tiny.llama()
    data = {"forget": [tiny.batch(1, rows=2)], "retain": [tiny.batch(5, rows=4)]}
    total = sum(p.numel() for p in model.parameters())
    for count in (1, 5):
        change = kind(fraction=count / total).change(model, data)
        assert (change.facts["selected"], change.facts["alpha"]) == (count, "infinity")


@pytest.mark.parametrize("kind", [SSD, LFSSD])
@pytest.mark.parametrize("against", ["retain", "all"])
def test_a_fraction_holds_where_all_numbers_have_one_ratio(
    kind: type[SSD], against: Literal["retain", "all"]
) -> None:
    """Of equal sets all of them have; those that matter most are taken, and no others."""
    model, data = tiny.llama(), {"forget": DATA["forget"], "retain": DATA["forget"]}
    total = sum(p.numel() for p in model.parameters())
    every = kind(alpha=0.5, dampening=0.5, against=against).change(model, data)
    assert every.facts["selected"] > total / 2
    for count in (1, 100):
        some = kind(fraction=count / total, dampening=0.5, against=against).change(model, data)
        assert some.facts["selected"] == count
    twice = kind(fraction=100 / total, dampening=0.5, against=against).change(model, data)
    naive = naive_importance(model, rows(DATA["forget"]), kind is LFSSD)
    least = torch.cat([x.flatten() for x in naive]).sort(descending=True).values[99] * (1 - 1e-6)
    for moved, own in zip(twice.vector, naive, strict=True):
        if moved is not None:
            assert bool((own[moved != 0] >= least).all())
