"""Recovery and verdicts: against loops over all numbers, and where the answer is known."""

import copy
import math

import pytest
import torch
from torch import nn

from geffect.evaluation.restoration import recovery, verdict
from geffect.layers import describe, trainable
from tests.utils import tiny


def moved(model: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """A copy whose trainable tensors are each a random step away."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trainable(other).values():
            tensor += scale * torch.randn(tensor.shape, generator=draw)
    return other


def flat(model: nn.Module, layer: str | None = None) -> torch.Tensor:
    rows = describe(model)
    return torch.cat(
        [
            tensor.detach().double().flatten()
            for row, tensor in zip(rows, trainable(model).values(), strict=True)
            if layer in (None, row.layer)
        ]
    )


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_every_layer_is_what_its_numbers_say(make: type[nn.Module]) -> None:
    clean = make()
    corrupted, unlearned = moved(clean, 1), moved(clean, 2)
    found = recovery(clean, corrupted, unlearned)
    assert {*found} == {"model", *(row.layer for row in describe(clean))}
    for layer, report in found.items():
        name = None if layer == "model" else layer
        c, k, u = (flat(model, name) for model in (clean, corrupted, unlearned))
        cosine = torch.cosine_similarity(u - k, c - k, dim=0)
        assert report.cosine == pytest.approx(cosine.item(), abs=1e-12)
        assert report.residual == pytest.approx(((u - c).norm() / (k - c).norm()).item())


def test_the_clean_model_is_recovered_and_the_corrupted_one_is_not() -> None:
    clean = tiny.llama()
    corrupted = moved(clean, 1)
    for report in recovery(clean, corrupted, copy.deepcopy(clean)).values():
        assert (report.cosine, report.residual) == (pytest.approx(1.0, abs=1e-12), 0.0)
    for report in recovery(clean, corrupted, copy.deepcopy(corrupted)).values():
        assert math.isnan(report.cosine) and report.residual == 1.0


def test_a_step_further_away_has_the_cosine_minus_one_and_states_may_be_kept_tensors() -> None:
    clean = tiny.llama()
    corrupted, further = moved(clean, 1), copy.deepcopy(clean)
    with torch.no_grad():
        for tensor, c, k in zip(
            *(trainable(m).values() for m in (further, clean, corrupted)), strict=True
        ):
            tensor.copy_(k + (k - c))
    kept = {name: tensor.detach().clone() for name, tensor in trainable(clean).items()}
    report = recovery(kept, trainable(corrupted), further)["model"]
    assert (report.cosine, report.residual) == (pytest.approx(-1.0), pytest.approx(2.0))


def test_a_layer_that_is_not_corrupted_has_no_recovery() -> None:
    clean = tiny.llama()
    corrupted, unlearned = copy.deepcopy(clean), moved(clean, 3)
    layer = describe(clean)[-1].layer
    with torch.no_grad():
        for row, tensor in zip(describe(corrupted), trainable(corrupted).values(), strict=True):
            if row.layer == layer:
                tensor += 1.0
    found = recovery(clean, corrupted, unlearned)
    assert not math.isnan(found[layer].cosine)
    assert all(
        math.isnan(report.cosine) and math.isnan(report.residual)
        for name, report in found.items()
        if name not in ("model", layer)
    )


def test_tied_tensors_count_once() -> None:
    clean = tiny.llama(tied=True)
    corrupted, unlearned = moved(clean, 1), moved(clean, 2)
    tensors = {id(p): p for p in clean.parameters()}
    assert len(flat(clean)) == sum(p.numel() for p in tensors.values())
    c, k, u = (flat(model) for model in (clean, corrupted, unlearned))
    report = recovery(clean, corrupted, unlearned)["model"]
    assert report.residual == pytest.approx(((u - c).norm() / (k - c).norm()).item())


def test_numbers_that_are_none_recover_nothing() -> None:
    clean = tiny.llama()
    corrupted, broken = moved(clean, 1), moved(clean, 2)
    with torch.no_grad():
        next(iter(trainable(broken).values())).fill_(float("nan"))
    report = recovery(clean, corrupted, broken)["model"]
    assert math.isnan(report.cosine) and math.isnan(report.residual)


def test_states_that_do_not_compare_are_refused() -> None:
    clean = tiny.llama()
    with pytest.raises(ValueError, match="Found the same parameters"):
        recovery(clean, clean, moved(clean, 1))
    with pytest.raises(ValueError, match="`clean` should have the trainable tensors"):
        recovery(tiny.gpt2(), clean, clean)
    fewer = dict(list(trainable(clean).items())[1:])
    with pytest.raises(ValueError, match="`corrupted` should have the trainable tensors"):
        recovery(clean, fewer, clean)


@pytest.mark.parametrize(
    ("false", "true", "said"),
    [
        (-1.0, 1.0, "restorative"),
        (-1.0, 0.0, "forget-only"),
        (-1.0, -1.0, "forget-only"),
        (0.0, 1.0, "neither"),
        (1.0, -1.0, "neither"),
    ],
)
def test_verdicts_follow_the_signs(false: float, true: float, said: str) -> None:
    assert verdict(false, true) == said


def test_a_verdict_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Found nan and"):
        verdict(float("nan"), 1.0)
