"""A change: made and taken back to the bit, whatever is raised meanwhile."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.edits import Change
from geffect.layers import trainable
from geffect.risk import mean_nll, risk_gradient
from tests.utils import tiny


def bits(model: nn.Module) -> dict[str, bytes]:
    """All parameters and buffers, as they lie in memory."""
    return {
        name: t.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, t in model.state_dict().items()
    }


def shifted(model: nn.Module, size: float = 0.01, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + size * torch.randn(p.shape, generator=draw).to(p)
        for name, p in trainable(model).items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_revert_restores_every_bit(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    with torch.no_grad():
        model.lm_head.weight[0, :2] = torch.tensor([-0.0, 0.0])
    before = bits(model)
    change = Change(model, shifted(model))
    assert bits(model) == before
    for _ in range(2):
        change.apply()
        assert bits(model) != before
        change.apply()
        change.revert()
        assert bits(model) == before
        change.revert()
        assert bits(model) == before


def test_an_applied_change_is_the_displacement() -> None:
    model = tiny.gpt2()
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    values = shifted(model)
    del values["transformer.ln_f.bias"]
    change = Change(model, values)
    with change:
        for name, p in trainable(model).items():
            moved = p.detach() - before[name]
            if name in values:
                assert torch.equal(change.displacement[name], moved) and moved.any()
            else:
                assert not moved.any() and name not in change.displacement
    vector = dict(zip(trainable(model), change.vector, strict=True))
    assert vector["transformer.ln_f.bias"] is None and len(change.vector) == len(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_takes_the_change_back(error: type[BaseException]) -> None:
    model = tiny.llama()
    before = bits(model)
    with pytest.raises(error), Change(model, shifted(model)):
        assert bits(model) != before
        raise error
    assert bits(model) == before


@pytest.mark.parametrize("place", [0, 1, 7, 19])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_it_is_made_or_taken_back(
    place: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama()
    before = bits(model)
    change = Change(model, shifted(model))
    copied, calls = Tensor.copy_, [0]

    def failing(self: Tensor, *given: Any, **how: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == place + 1:
            raise error
        return copied(self, *given, **how)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(error):
        change.apply()
    assert bits(model) == before
    calls[0] = -1000
    change.apply()
    assert bits(model) != before
    calls[0] = 0
    with pytest.raises(error):
        change.revert()
    assert bits(model) == before


def test_tied_tensors_are_one() -> None:
    model = tiny.gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    values = shifted(model)
    assert "lm_head.weight" not in values
    with Change(model, values) as change:
        assert torch.equal(model.lm_head.weight, values["transformer.wte.weight"])
    assert change.touched["transformer.wte.weight"] == model.lm_head.weight.numel()
    with pytest.raises(ValueError, match="Found 1 other names, the first of them"):
        Change(model, {"lm_head.weight": model.lm_head.weight.detach()})


def test_predicted_falls_are_finite_differences() -> None:
    """e_R(eps D)/eps against (R(-eps D) - R(eps D))/(2 eps), and blocks add up to the model."""
    model, batches = tiny.gpt2(), [tiny.batch(1), tiny.batch(2, rows=5)]
    gradient = risk_gradient(model, batches).vector
    change = Change(model, shifted(model, 1.0))
    parts = [
        -(g * d).sum().item()
        for g, d in zip(gradient, change.vector, strict=True)
        if g is not None and d is not None
    ]
    eps = 1e-5

    def risk(sign: float) -> float:
        now = {n: p.detach() for n, p in trainable(model).items()}
        moved = {n: now[n] + sign * eps * d for n, d in change.displacement.items()}
        with Change(model, moved):
            return mean_nll(model, batches)

    central = (risk(-1.0) - risk(1.0)) / (2 * eps)
    assert sum(parts) == pytest.approx(central, rel=1e-6)


def test_numbers_that_are_touched() -> None:
    model = tiny.llama()
    weight = model.lm_head.weight.detach()
    values = weight.clone()
    values[0, :3] += 1.0
    values[1, 0] = values[1, 0] * (1 + 1e-12)  # the same after rounding
    change = Change(model, {"lm_head.weight": values, "model.norm.weight": torch.ones(16)})
    assert change.touched == {"lm_head.weight": 3, "model.norm.weight": 0}


def test_in_half_precision_the_displacement_is_what_the_model_moves_by() -> None:
    model = tiny.llama().bfloat16()
    exact = {"lm_head.weight": model.lm_head.weight.detach().float() + 1e-3}
    change = Change(model, exact)
    (moved,) = change.displacement.values()
    assert moved.dtype == torch.float32
    with change:
        after = model.lm_head.weight.detach().float()
    assert torch.equal(after - model.lm_head.weight.detach().float(), moved)
    assert not torch.equal(moved, torch.full_like(moved, 1e-3))


def test_what_is_refused() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"values of its shape \(16,\). Found shape \(3,\)"):
        Change(model, {"model.norm.weight": torch.ones(3)})
    for odd in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="should leave finite weights"):
            Change(model, {"model.norm.weight": torch.full((16,), odd)})
    with pytest.raises(ValueError, match="should leave finite weights"):
        Change(tiny.llama().half(), {"model.norm.weight": torch.full((16,), 1e6)})
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="other names"):
        Change(model, {"model.norm.weight": torch.ones(16)})


def test_a_model_that_has_moved_since_is_refused() -> None:
    model = tiny.llama()
    change = Change(model, shifted(model))
    other = copy.deepcopy(model)
    model.model.norm.weight.data[3] += 1.0  # as autograd does not see it
    before = bits(model)
    with pytest.raises(ValueError, match=r"`model.norm.weight` has moved since"):
        change.apply()
    assert bits(model) == before != bits(other)


def test_of_two_changes_the_last_one_is_taken_back_first() -> None:
    model = tiny.llama()
    before = bits(model)
    first = Change(model, shifted(model))
    first.apply()
    between = bits(model)
    second = Change(model, {"lm_head.weight": torch.zeros_like(model.lm_head.weight)})
    second.apply()
    with pytest.raises(ValueError, match=r"later one of `lm_head\.weight` stands"):
        first.revert()
    assert first.made and second.made
    second.revert()
    assert bits(model) == between
    first.revert()
    assert bits(model) == before


def test_a_block_that_is_left_takes_back_what_was_changed_on_top_of_it() -> None:
    model = tiny.llama()
    before = bits(model)
    first = Change(model, shifted(model))
    with pytest.raises(RuntimeError, match="mine"), first:
        second = Change(model, shifted(model, seed=1))
        second.apply()
        raise RuntimeError("mine")
    assert bits(model) == before and not first.made and not second.made


def test_changes_of_different_tensors_are_taken_back_in_any_order() -> None:
    model = tiny.llama()
    before = bits(model)
    changes = [Change(model, {name: value}) for name, value in [*shifted(model).items()][:2]]
    for change in changes:
        change.apply()
    for change in changes:
        change.revert()
    assert bits(model) == before


def test_a_parameter_that_was_replaced_since_is_refused() -> None:
    model = tiny.llama()
    change = Change(model, shifted(model))
    model.lm_head = nn.Linear(16, tiny.VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"`lm_head.weight` is another one"):
        change.apply()


def test_two_parameters_of_one_memory_are_refused() -> None:
    model = tiny.llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    with pytest.raises(ValueError, match=r"`lm_head.weight` and `model.embed_tokens.weight` share"):
        Change(model, {"lm_head.weight": torch.ones(tiny.VOCABULARY, 16)})
    assert Change(model, {"model.norm.weight": torch.ones(16)})
