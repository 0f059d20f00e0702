"""Adapters on quantised models: held against a dequantised copy, in all that watches training.

In float32 a layer of 4 bits dequantises its weights and multiplies: nothing is left between the
two. In bfloat16 it rounds its inputs, its weights and the gradients that pass it to 8 bits of
mantissa, and the errors of two layers add up. A layer of 8 bits rounds its inputs to 8 bits of
each row and passes gradients as if it had not, so that its gradient is not that of its loss.
Adam's first steps are near the sign of the gradient, which flips where that is small: rectified
steps are compared under SGD.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.checkpoints.loading import Loader, whole_of
from geffect.codes import coded
from geffect.effects import InstanceEffects, direction, sample_effects, token_effects
from geffect.layers import describe, trainable
from geffect.objectives import nll
from geffect.risk import mean_nll, risk_gradient
from tests.utils import quantised, tiny

bnb = pytest.importorskip("bitsandbytes")
Linear4bit = bnb.nn.Linear4bit

ERROR = {"nf4": 1e-6, "nf4, computes in bfloat16": 2e-2, "codes in bfloat16": 1e-6, "int8": 3e-2}
"""In terms of the lengths; found were 0, 7e-3, 0 and 1.1e-2."""

FORGET, RETAIN = tiny.batch(0), tiny.batch(1)

OPTIMIZERS = {
    "AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=16),
    "PagedAdamW": lambda p: bnb.optim.PagedAdamW(p, lr=1e-2),
    "PagedAdamW8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=16),
    "Lion8bit": lambda p: bnb.optim.Lion8bit(p, lr=1e-3, min_8bit_size=16),
    "SGD8bit": lambda p: bnb.optim.SGD8bit(p, lr=1e-2, momentum=0.9, min_8bit_size=16),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised.saved(tmp_path_factory.mktemp("quantised") / "model")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By kind: an adapter on the quantised model, and the same on its dequantised copy."""
    found = {}
    for kind in ERROR:
        base = quantised.loaded(folder, kind)
        copied = quantised.dequantised(base)
        found[kind] = quantised.adapted(base), quantised.adapted(copied)
    return found


Pairs = dict[str, tuple[nn.Module, nn.Module]]


@pytest.mark.parametrize("kind", ERROR)
def test_gram_matrices_are_those_of_the_dequantised_model(
    kind: str, pairs: Pairs, tmp_path: Path
) -> None:
    grams = []
    for place, model in enumerate(map(copy.deepcopy, pairs[kind])):
        with Recorder(model, tmp_path / f"{place}.h5") as recorder:
            recorder.backward(
                objective={"forget": -1.0, "retain": 0.5},
                forget=lambda model=model: nll(model, FORGET),
                retain=lambda model=model: nll(model, RETAIN),
            )
        grams.append(open_run(tmp_path / f"{place}.h5").gram()[0])
    assert describe(pairs[kind][0]) == describe(pairs[kind][1])
    lengths = np.sqrt(np.einsum("pkk->pk", grams[1]))
    assert lengths.min() > 0
    error = np.abs(grams[0] - grams[1]) / (lengths[:, :, None] * lengths[:, None])
    assert error.max() <= ERROR[kind]


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("kind", ERROR)
def test_rectified_steps_are_those_of_the_dequantised_model(
    kind: str, space: Any, pairs: Pairs
) -> None:
    moves, fired = [], []
    for model in map(copy.deepcopy, pairs[kind]):
        before = quantised.flat(model)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
        rectifier = Rectifier(model, space=space, optimizer=optimizer)
        rectifier.backward(
            objective={"forget": -1.0, "retain": -0.5},
            forget=lambda model=model: nll(model, FORGET),
            retain=lambda model=model: nll(model, RETAIN),
        )
        optimizer.step()
        moves.append(quantised.flat(model) - before)
        assert rectifier.report is not None
        fired.append(rectifier.report.fired)
    assert fired == [(1.0,), (1.0,)]
    assert (moves[0] - moves[1]).norm() <= ERROR[kind] * moves[1].norm()


@pytest.mark.parametrize("kind", ERROR)
def test_effects_of_samples_and_tokens_are_those_of_the_dequantised_model(
    kind: str, pairs: Pairs
) -> None:
    model, copied = pairs[kind]
    along, exact = direction(model, [RETAIN]), direction(copied, [RETAIN])
    tokens, samples = [], []
    for of, v in (model, along), (copied, exact):
        tokens.append(token_effects(of, FORGET, v))
        samples.append(sample_effects(of, [FORGET], {"retain": v})["retain"])
    error = (samples[0] - samples[1]).norm() / samples[1].norm()
    assert error <= ERROR[kind]
    assert (tokens[0].values - tokens[1].values).nan_to_num().norm() <= ERROR[kind] * tokens[
        1
    ].values.nan_to_num().norm()
    # What tokens and instances say of the model agrees with its own gradients, all the same.
    own = 1e-2 if "computes" in kind else 1e-4
    torch.testing.assert_close(
        tokens[0].by_sample, samples[0].sum(dim=1), rtol=own, atol=own * samples[0].norm()
    )
    with InstanceEffects(model, along) as instances:
        nll(model, FORGET).backward()
    gradient = [p.grad for p in trainable(model).values()]
    model.zero_grad()
    expected = torch.stack(
        [(g.double() * v).sum() for g, v in zip(gradient, along, strict=True)]  # type: ignore[union-attr,operator]
    )
    torch.testing.assert_close(
        instances.by_parameter.sum(dim=0), expected, rtol=own, atol=own * expected.norm()
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_by_an_optimizer_of_8_bits_ends_watched_as_unwatched(
    name: str, pairs: Pairs, tmp_path: Path
) -> None:
    ends, moved = [], []
    for watched in (False, True):
        model = copy.deepcopy(pairs["nf4"][0])
        optimizer = OPTIMIZERS[name](list(trainable(model).values()))
        recorder = Recorder(model, tmp_path / "a.h5", update=True) if watched else None
        for step in range(3):
            optimizer.zero_grad()
            before = quantised.flat(model)
            if recorder is None:
                (-nll(model, tiny.batch(step))).backward()
            else:
                recorder.backward(
                    objective=lambda model=model, step=step: -nll(model, tiny.batch(step)),
                    retain=lambda model=model: nll(model, RETAIN),
                )
            optimizer.step()
            moved.append((quantised.flat(model) - before).double().square().sum().item())
        if recorder is not None:
            recorder.close()
        ends.append(quantised.flat(model))
    assert torch.equal(*ends)
    run = open_run(tmp_path / "a.h5")
    place = run.sources.index("update")
    np.testing.assert_allclose(run.gram()[:, :, place, place].sum(axis=1), moved[3:], rtol=1e-5)


@pytest.mark.parametrize("scope", ["model", "coordinate"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_of_an_optimizer_of_8_bits_is_rectified(
    name: str, scope: Any, pairs: Pairs
) -> None:
    """Against the optimizer's own step on a copy, corrected by hand."""
    model = copy.deepcopy(pairs["nf4"][0])
    optimizer = OPTIMIZERS[name](list(trainable(model).values()))
    rectifier = Rectifier(model, space="update", optimizer=optimizer, scope=scope, ema=1.0)
    naive = copy.deepcopy(model)
    plain = OPTIMIZERS[name](list(trainable(naive).values()))
    for step in range(3):
        retain = tiny.batch(step)
        optimizer.zero_grad()
        rectifier.backward(
            objective={"retain": -1.0}, retain=lambda batch=retain: nll(model, batch)
        )
        optimizer.step()
        before = quantised.flat(naive)
        gradient = torch.autograd.grad(nll(naive, retain), [*trainable(naive).values()])
        for parameter, g in zip(trainable(naive).values(), gradient, strict=True):
            parameter.grad = -g
        plain.step()
        down = _rectified(before - quantised.flat(naive), torch.cat([*map(_flat, gradient)]), scope)
        _write(naive, before - down)
        torch.testing.assert_close(quantised.flat(model), quantised.flat(naive), rtol=0, atol=1e-6)
        assert rectifier.report is not None
        assert rectifier.report.fired[0] > 0


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def _rectified(step: Tensor, retain: Tensor, scope: str) -> Tensor:
    """A step down without what harms, by the model or by the coordinate."""
    if scope == "coordinate":
        return torch.where(step * retain < 0, 0.0, step)
    inner = torch.dot(step.double(), retain.double())
    lengths = torch.dot(retain.double(), retain.double())
    return (step - min(0.0, float(inner / lengths)) * retain).float()


def _write(model: nn.Module, values: Tensor) -> None:
    own = [*trainable(model).values()]
    for parameter, part in zip(own, values.split([p.numel() for p in own]), strict=True):
        parameter.data.copy_(part.view_as(parameter))


def _packs(model: nn.Module) -> None:
    """As bitsandbytes finds on a CPU that multiplies in bfloat16, whatever this one is."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True


def _are_packed(model: nn.Module) -> list[bool]:
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return [getattr(state, "packing_format_for_cpu", False) for state in states if state]


def test_looks_beside_training_pack_no_codes(pairs: Pairs) -> None:
    """Packed for inference, matrices of 4 bits pass no gradients on, in training either."""
    model, plain = (copy.deepcopy(pairs["nf4"][0]) for _ in range(2))
    _packs(model)
    risk = mean_nll(model, [FORGET])
    along = risk_gradient(model, [RETAIN]).vector
    token_effects(model, FORGET, along)
    sample_effects(model, [FORGET], {"retain": along})
    assert not any(_are_packed(model))
    assert all(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))
    assert risk == mean_nll(plain, [FORGET])
    gradients = []
    for trained in (model.train(), plain.train()):
        nll(trained, FORGET).backward()
        gradients.append(torch.cat([_flat(p.grad) for p in trainable(trained).values()]))
    assert torch.equal(*gradients)


def test_gradients_through_packed_codes_are_refused(pairs: Pairs) -> None:
    model = copy.deepcopy(pairs["nf4"][0])
    along = risk_gradient(model, [RETAIN]).vector
    state = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    state.weight.quant_state.packing_format_for_cpu = True
    refused = r"not be packed for inference.*Found `base_model\..*layers\.1\.mlp\.up_proj"
    for take in (
        lambda: risk_gradient(model, [FORGET]),
        lambda: token_effects(model, FORGET, along),
        lambda: sample_effects(model, [FORGET], {"retain": along}),
    ):
        with pytest.raises(RuntimeError, match=refused):
            take()


def test_the_metric_of_an_optimizer_that_keeps_codes_is_refused(pairs: Pairs) -> None:
    model = pairs["nf4"][0]
    optimizer = OPTIMIZERS["AdamW8bit"](list(trainable(model).values()))
    with pytest.raises(ValueError, match=r'Found AdamW8bit.* Take correction="retain_adam"'):
        Rectifier(model, space="update", correction="adam", optimizer=optimizer)


@pytest.mark.parametrize("kind", ["nf4", "codes in bfloat16", "int8"])
def test_a_quantised_checkpoint_is_replayed_by_its_adapters_alone(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    base = quantised.loaded(folder, kind)
    quantised.dequantised(base).save_pretrained(tmp_path / "dequantised")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"hold weights that have gradients\. Found `model\."):
        Loader().load(tmp_path / "base")
    adapter: Any = quantised.adapted(base)
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    replayed = Loader().load(tmp_path / "adapter")
    assert torch.equal(quantised.flat(replayed), quantised.flat(adapter))
    assert [*coded(replayed)]
    with pytest.raises(ValueError, match=r"model in floating point, to be merged.* as the base"):
        whole_of(tmp_path / "adapter", None, "cpu")
    whole = whole_of(tmp_path / "adapter", tmp_path / "dequantised", "cpu")
    with torch.no_grad():
        assert abs(nll(whole, FORGET) - nll(adapter, FORGET)) < ERROR[kind]


def test_codes_that_lie_in_memory_as_bfloat16_are_no_weights(folder: Path, tmp_path: Path) -> None:
    model = quantised.loaded(folder, "codes in bfloat16").requires_grad_()
    with pytest.raises(ValueError, match=r"q_proj\.weight` of `Params4bit`, which holds them in"):
        Recorder(model, tmp_path / "a.h5")
