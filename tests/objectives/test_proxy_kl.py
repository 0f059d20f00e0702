"""Proxy KL against a loop, and the proxy that is passed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from geffect.objectives import KL, FrozenModel, GradientAscent, ProxyKL, Regularised, named
from tests.utils import reference
from tests.utils import shallow as tiny


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    return tiny.gpt2(), tiny.gpt2(seed=1).eval()


def naive(model: Any, proxy: Any, batch: reference.Batch, temperature: float) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    now, known = model(**inputs).logits, proxy(**inputs).logits.detach()
    found = []
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            if place and label != -100:
                p = (now[row, place - 1] / temperature).softmax(-1)
                q = (known[row, place - 1] / temperature).softmax(-1)
                found.append((p * (p.log() - q.log())).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_it_is_its_formula(models: tuple[nn.Module, nn.Module], temperature: float) -> None:
    model, proxy = models
    pair = {"retain": tiny.batch(0, padding=3)}
    loss = ProxyKL(temperature)(model, pair, FrozenModel(proxy))
    expected = naive(model, proxy, pair["retain"], temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, gradient = reference.gradient(model, loss), reference.gradient(model, expected)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-14)


def test_it_is_nothing_where_the_model_is_its_proxy(models: tuple[nn.Module, nn.Module]) -> None:
    model = models[0]
    loss = ProxyKL()(model, {"retain": tiny.batch(0)}, FrozenModel.copied(model))
    assert abs(loss.item()) < 1e-15
    assert all(g.abs().max() < 1e-14 for g in reference.gradient(model, loss).values())


def test_at_temperature_one_it_is_kl_of_the_other_order(
    models: tuple[nn.Module, nn.Module],
) -> None:
    model, proxy = models
    pair = {"retain": tiny.batch(0)}
    found = ProxyKL(1.0)(model.eval(), pair, FrozenModel(proxy))
    turned = KL()(proxy, pair, FrozenModel(model))
    assert found.item() == pytest.approx(turned.item(), rel=1e-12)


def test_a_step_on_it_comes_nearer_to_the_proxy(models: tuple[nn.Module, nn.Module]) -> None:
    model, proxy = tiny.gpt2(), models[1]
    pair = {"retain": tiny.batch(0)}
    before = ProxyKL()(model, pair, FrozenModel(proxy))
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert ProxyKL()(model, pair, FrozenModel(proxy)) < before


def test_it_goes_behind_a_name() -> None:
    assert named("wga+proxy-kl", {"weight": 0.5, "proxy_temperature": 3.0}) == Regularised(
        named("wga"), ProxyKL(3.0), weight=0.5
    )
    assert named("ga+proxy-kl") == Regularised(GradientAscent(), ProxyKL())


def test_in_low_precision_the_logits_are_divided_in_float32() -> None:
    model, proxy = tiny.llama().bfloat16(), tiny.llama(1).bfloat16().eval()
    with torch.no_grad():
        for one in (model, proxy):
            one.get_submodule("lm_head").weight.mul_(30)
    batch = tiny.batch(0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = [one(**inputs).logits.detach() for one in (model, proxy)]

    def expected(now: torch.Tensor, known: torch.Tensor) -> float:
        """Of logits that are divided already."""
        of = [
            lambda input_ids, attention_mask, z=z: SimpleNamespace(logits=z) for z in (now, known)
        ]
        return naive(*of, batch, 1.0).item()

    loss = ProxyKL(3.0)(model, {"retain": batch}, FrozenModel(proxy)).item()
    assert loss == pytest.approx(expected(*(z.double() / 3 for z in logits)), rel=1e-5)
    assert loss != pytest.approx(expected(*((z / 3).double() for z in logits)), rel=1e-5)


def test_a_temperature_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`proxy_temperature` of ProxyKL .* Found .* Pass"):
        ProxyKL(0.0)
