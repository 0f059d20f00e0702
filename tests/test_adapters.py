"""Adapters of every kind that the package peft has."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import instances
from geffect.audit.adapters import deployed
from geffect.checkpoints.loading import Loader, whole_of
from geffect.edits import TaskVectorNegation
from geffect.effects import direction
from geffect.layers import canonical_name, describe, trainable
from geffect.places import OTHER, is_adapter
from geffect.risk import token_log_probabilities
from tests.utils import reference
from tests.utils.tuners import OPTIONS, PROMPTS, adapted, base

peft = pytest.importorskip("peft")

REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), "should return logits for each position"),
    "LILY": "should predict each token unseen",  # it routes by a mean over all positions
}
"""What gives no likelihood of the tokens of a batch."""

UNMERGED = {*PROMPTS, "ADAPTION_PROMPT", "BEFT", "LILY"}
"""What peft does not merge into the weights of a model such as this."""


def batch(seed: int, rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**data).loss
    return found


def flat(gradients: list[Tensor | None], parameters: list[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def gradient(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    parameters = [*trainable(model).values()]
    found = torch.autograd.grad(loss(model, data), parameters, allow_unused=True)
    return flat([*found], parameters).double()


@pytest.mark.parametrize("kind", OPTIONS)
def test_recorder_and_rectifier_agree_with_autograd(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    f, r = gradient(model, batch(1)), gradient(model, batch(2))
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(
            objective={"forget": -1.0},
            forget=lambda: loss(model, batch(1)),
            retain=lambda: loss(model, batch(2)),
        )
    run = open_run(tmp_path / "a.h5")
    vectors = torch.stack([-f, f, r])
    lengths = vectors.norm(dim=1)
    off = (torch.tensor(run.gram()[0].sum(axis=0)) - vectors @ vectors.T).abs()
    assert (off <= 1e-6 * lengths[:, None] * lengths).all()

    sign = -1.0 if torch.dot(f, r) > 0 else 1.0
    model.zero_grad()
    Rectifier(model).backward(
        objective={"forget": sign, "retain": -0.1},
        forget=lambda: loss(model, batch(1)),
        retain=lambda: loss(model, batch(2)),
    )
    parameters = [*trainable(model).values()]
    left = flat([p.grad for p in parameters], parameters).double()
    u = sign * f - 0.1 * r
    assert (left - reference.gru(u, r)).norm() <= 1e-6 * u.norm()


@pytest.mark.parametrize("kind", OPTIONS)
def test_effects_of_samples_agree_with_autograd(kind: str) -> None:
    model, data = adapted(kind), batch(1)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            direction(model, [data])
        return
    parameters = [*trainable(model).values()]
    along = direction(model, [batch(2)])
    v = flat([*along], parameters).double()
    log_p, scored = token_log_probabilities(model, data)
    found = instances(model, [data], along).groupby("sample")["value"].sum()
    for sample, row in enumerate((log_p * scored).sum(dim=1)):
        taken = torch.autograd.grad(row, parameters, allow_unused=True, retain_graph=True)
        g = flat([*taken], parameters).double()
        assert abs(found[sample] - float(torch.dot(g, v))) <= 1e-6 * g.norm() * v.norm()


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_tensor_has_a_home_and_a_name_without_the_adapter(kind: str) -> None:
    for row in describe(adapted(kind)):
        assert OTHER not in row.layer and "head" not in row.layer
        assert "default" not in row.name or kind in PROMPTS
        assert is_adapter(row.name) or kind in {*PROMPTS, "ADAPTION_PROMPT"}


def layers_of_peft() -> Iterator[type]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in pkgutil.walk_packages(peft.tuners.__path__, "peft.tuners."):
        try:
            importlib.import_module(module.name)
        except ImportError:  # of a package that is not there
            continue
    found = [BaseTunerLayer]
    for kind in found:
        found += kind.__subclasses__()
    return iter(found)


def test_every_tensor_of_an_adapter_is_told_by_its_name() -> None:
    names = {name for layer in layers_of_peft() for name in layer.adapter_layer_names or ()}
    names -= {"shadow_dropout"}  # which holds none
    assert len(names) > 20 and all(map(is_adapter, names))
    for name in names:
        weight = canonical_name(f"base_model.model.model.layers.0.mlp.up_proj.{name}.of_mine")
        assert "of_mine" not in weight
    assert not any(is_adapter(row.name) for row in describe(base()))


@pytest.mark.parametrize("kind", [k for k in OPTIONS if k not in {*PROMPTS, "ADAPTION_PROMPT"}])
def test_what_weights_are_made_from_is_no_weight(kind: str) -> None:
    with pytest.raises(ValueError, match=r"of an adapter, .* Merge the adapter into its model"):
        TaskVectorNegation().change(adapted(kind), {"tuned": adapted(kind, 1)})
    whole = base()
    with pytest.raises(ValueError, match="Found adapters beside them"):
        TaskVectorNegation().change(whole, {"tuned": adapted(kind)})


@pytest.mark.parametrize("kind", OPTIONS)
def test_as_deployed_it_says_the_same(kind: str) -> None:
    model = adapted(kind)
    with torch.no_grad():
        before = model(**batch(3)).logits
        if kind in {"BEFT", "LILY"}:
            with pytest.raises(ValueError, match="should be one that can be merged"):
                deployed(model)
            return
        after = deployed(model).eval()(**batch(3)).logits
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIONS)
def test_checkpoints_are_loaded_one_after_the_other(kind: str, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    models = [adapted(kind, seed) for seed in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    loader = Loader(base=tmp_path / "base")
    if kind in PROMPTS:
        with pytest.raises(ValueError, match="should be an adapter that changes weights"):
            loader.load(tmp_path / "a")
        return
    for name, model in zip("ab", models, strict=True):
        found = loader.load(tmp_path / name)
        assert torch.equal(found(**batch(3)).logits, model(**batch(3)).logits)
        assert trainable(found).keys() == trainable(model).keys()
    if kind in UNMERGED:
        with pytest.raises(ValueError, match="should be an adapter that can be merged"):
            whole_of(tmp_path / "b", tmp_path / "base", "cpu")
        return
    merged = whole_of(tmp_path / "b", tmp_path / "base", "cpu")
    assert torch.allclose(merged(**batch(3)).logits, models[1](**batch(3)).logits, atol=1e-5)
