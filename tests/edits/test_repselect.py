"""RepSelect as an edit, beside autograd and the decomposition of each matrix."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from geffect.edits import RepSelect
from geffect.layers import trainable
from geffect.risk import nll
from tests.utils import tiny

DATA = {"forget": [tiny.batch(1, rows=2), tiny.batch(2)], "retain": [tiny.batch(5, rows=4)]}


def gradients(model: nn.Module, side: str, names: list[str]) -> dict[str, Tensor]:
    loss = sum(nll(model, batch) for batch in DATA[side]) / len(DATA[side])
    found = torch.autograd.grad(loss, [trainable(model)[name] for name in names])
    return dict(zip(names, (g.double() for g in found), strict=True))


def hard(G: Tensor, basis: Tensor, k: int, side: str) -> Tensor:
    U, _, Vh = torch.linalg.svd(basis, full_matrices=False)
    if side != "output":
        G = G - G @ Vh[:k].T @ Vh[:k]
    if side != "input":
        G = G - U[:, :k] @ U[:, :k].T @ G
    return G


@pytest.mark.parametrize("basis", ["forget", "retain"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_it_is_the_formula(make: Any, side: Any, basis: Any) -> None:
    model = make()
    names = [n for n, p in trainable(model).items() if ".mlp." in n and p.ndim == 2]
    own, of = gradients(model, "forget", names), gradients(model, basis, names)
    if make is tiny.gpt2:  # whose weights are stored with their input side first
        expected = {n: hard(own[n].T, of[n].T, 3, side).T for n in names}
    else:
        expected = {n: hard(own[n], of[n], 3, side) for n in names}
    total = torch.stack([x.square().sum() for x in expected.values()]).sum().sqrt()
    edit = RepSelect(k=3, side=side, basis=basis, strength="hard", length=0.5)
    found = edit.displacement(model, DATA)
    assert found.keys() == set(names)
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double(), 0.5 * x / total, rtol=1e-3, atol=1e-6)
    length = torch.stack([d.double().square().sum() for d in found.values()]).sum().sqrt()
    assert length.item() == pytest.approx(0.5, rel=1e-5)


def test_it_forgets_and_twice_as_long_is_twice_as_far() -> None:
    model = tiny.gpt2()
    before = sum(nll(model, batch) for batch in DATA["forget"])
    short = RepSelect(length=0.01).displacement(model, DATA)
    with RepSelect(length=0.01).change(model, DATA):
        assert sum(nll(model, batch) for batch in DATA["forget"]) > before
    for name, d in RepSelect(length=0.02).displacement(model, DATA).items():
        torch.testing.assert_close(d, 2 * short[name])


def test_an_eighth_of_the_smaller_side_is_the_default() -> None:
    model = tiny.llama()  # 16 wide
    found, named = (RepSelect(k=k, strength="hard").displacement(model, DATA) for k in (None, 2))
    assert all(torch.equal(found[name], d) for name, d in named.items())


def test_what_is_included_is_what_changes() -> None:
    model = tiny.llama()
    found = RepSelect(include="*down_proj*, lm_head.*").displacement(model, DATA)
    assert {name.split(".")[-2] for name in found} == {"down_proj", "lm_head"}
    with pytest.raises(ValueError, match=r"patterns of names of matrices\. Found '\*norm\*'"):
        RepSelect(include="*norm*").displacement(model, DATA)
    with pytest.raises(ValueError, match=r"at least k = 17\. Found shapes"):
        RepSelect(k=17).displacement(model, DATA)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_batch_without_answers_is_refused_by_the_name_of_its_set(name: str) -> None:
    unscored = {**tiny.batch(1), "labels": torch.full_like(tiny.batch(1)["labels"], -100)}
    data = {**DATA, name: [*DATA[name], unscored]}
    with pytest.raises(ValueError, match=f"`{name}` should have an answer token"):
        RepSelect(basis="retain").change(tiny.llama(), data)


def test_a_gradient_of_which_nothing_is_left_is_refused() -> None:
    model = copy.deepcopy(tiny.llama())
    with pytest.raises(ValueError, match=r"should leave something .* Found a length of 0\.0"):
        nothing = {"forget": [{**tiny.batch(1), "labels": tiny.batch(1)["labels"]}]}
        nn.init.zeros_(model.lm_head.weight)  # no gradient reaches what comes before
        RepSelect().displacement(model, nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"`k` of RepSelect should be a whole number from 1 on"),
        ({"k": 2.0}, r"`k` of RepSelect should be a whole number from 1 on"),
        ({"length": 0.0}, r"`length` of RepSelect should be a positive number"),
        ({"length": float("inf")}, r"`length` of RepSelect should be a positive number"),
        ({"side": "in"}, r"`side` of Collapse should be one of"),
        ({"basis": "world"}, r'`basis` of RepSelect should be "forget" or "retain"'),
        ({"strength": "ridge"}, r"`strength` of Collapse should be one of"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepSelect(**options)


def test_experts_in_one_tensor_are_not_left_out_in_silence() -> None:
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj` of shape \(2, 16, 16\)"):
        RepSelect().change(model, DATA)
    changed = RepSelect(include="*mlp.gate.weight").change(model, DATA).touched
    assert [*changed] == ["model.layers.0.mlp.gate.weight"]
