"""Models of a kind that is seldom met: recorded as autograd has it, or refused by its name."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geffect import Recorder, Rectifier, open_run
from geffect.capture import StoreOptions
from geffect.gradients import differentiate
from geffect.layers import trainable


def squared(model: nn.Module, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    loss: Tensor = model(torch.randn(3, 4, generator=draw)).square().mean()
    return loss


class Halves(nn.Module):
    """Two towers; a loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)


# Of another model.

OTHERS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "a copy": copy.deepcopy,
    "a wrapped copy": lambda model: nn.Sequential(copy.deepcopy(model)),
    "another kind": lambda model: nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
    "a shared buffer": lambda model: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)),
}


@pytest.mark.parametrize("others", [("forget",), ("retain",), ("forget", "retain")])
@pytest.mark.parametrize("kind", OTHERS)
def test_losses_of_another_model_are_refused_by_their_name(
    tmp_path: Path, kind: str, others: tuple[str, ...]
) -> None:
    model = nn.Linear(4, 1)
    losses = {
        name: squared(OTHERS[kind](model) if name in others else model, seed)
        for seed, name in enumerate(("forget", "retain"))
    }
    says = rf"Loss `{others[0]}` should be computed with the model that is watched. Found none of"
    with (
        Recorder(model, tmp_path / "a.h5") as recorder,
        pytest.raises(ValueError, match=says),
    ):
        recorder.backward(objective={"forget": -1.0}, **losses)
    assert model.weight.grad is None and not (tmp_path / "a.h5").exists()
    with pytest.raises(ValueError, match=says.replace("forget", others[-1])):
        Rectifier(model).backward(objective={"forget": -1.0}, **losses)


def test_gradients_of_another_model_are_refused(tmp_path: Path) -> None:
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    gradients = differentiate([*other.parameters()], {"objective": squared(other, 0)})
    with (
        Recorder(model, tmp_path / "a.h5") as recorder,
        pytest.raises(ValueError, match=r"made for the model that is trained. Found gradients of"),
    ):
        recorder.record(gradients)


def test_a_parameter_that_a_loss_does_not_use_has_zeros_beside_the_others(tmp_path: Path) -> None:
    model = Halves()
    losses = {"forget": squared(model.left, 0), "retain": squared(model.right, 1)}
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses)
    gram = open_run(tmp_path / "a.h5").gram()[0]
    assert [g.any() for g in gram[:, 2, 2]] == [False, False, True, True]
    assert not gram[:, 1, 2].any() and gram[:2, 1, 1].all()
    assert model.right.weight.grad is None  # as after a backward pass of the objective alone


# Complex.


@pytest.mark.parametrize("look", ["recorder", "rectifier"])
def test_complex_parameters_are_refused_by_their_name(tmp_path: Path, look: str) -> None:
    model = nn.ModuleDict(
        {"real": nn.Linear(4, 4), "mixer": nn.Linear(4, 4, dtype=torch.complex64)}
    )
    made = {
        "recorder": lambda: Recorder(model, tmp_path / "a.h5"),
        "rectifier": lambda: Rectifier(model),
    }
    with pytest.raises(ValueError, match=r"of `ModuleDict` .* Found `mixer.weight` of torch.comp"):
        made[look]()
    model["mixer"].requires_grad_(False)
    made[look]()


def test_a_complex_layer_of_real_parameters_is_recorded_as_autograd_has_it(tmp_path: Path) -> None:
    pair = nn.Parameter(torch.randn(4, 2))
    model = nn.ParameterList([pair])
    losses = {
        name: (torch.view_as_complex(pair) * x).abs().square().sum()
        for name, x in (("forget", 2.0), ("retain", torch.arange(4.0)))
    }
    f, r = (torch.autograd.grad(x, pair, retain_graph=True)[0] for x in losses.values())
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(objective={"forget": -1.0}, **losses)
    expected = [[float((x * y).sum()) for y in (f, r)] for x in (f, r)]
    np.testing.assert_allclose(open_run(tmp_path / "a.h5").gram()[0, 0, 1:, 1:], expected, 1e-6)


# Sparse.


class Words(nn.Module):
    """Embeddings with a gradient in few rows, tied or not to a dense use."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        bag = kind == "bag"
        self.words: Any = (nn.EmbeddingBag if bag else nn.Embedding)(7, 4, sparse=True)
        self.head = nn.Linear(4, 7, bias=False)
        if kind == "tied":
            self.head.weight = self.words.weight
        self.is_bag = bag

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.words(ids[None] if self.is_bag else ids)
        logits: Tensor = self.head(found)
        return F.cross_entropy(logits, ids[: len(logits)])


@pytest.mark.parametrize("kind", ["embedding", "bag", "tied"])
@pytest.mark.parametrize("how", [{}, {"update": True}, {"store": StoreOptions(gradients="full")}])
@pytest.mark.parametrize("parts", [1, 2])
def test_sparse_gradients_are_recorded_as_dense_ones_and_left_as_they_are(
    tmp_path: Path, kind: str, how: dict[str, Any], parts: int
) -> None:
    torch.manual_seed(0)
    model = Words(kind)
    plain = copy.deepcopy(model)
    ids = {"forget": torch.tensor([1, 1, 2]), "retain": torch.tensor([2, 3, 5])}

    def optimizers(of: Words) -> list[torch.optim.Optimizer]:
        if kind == "tied":
            return [torch.optim.SGD(of.parameters(), lr=0.1)]
        return [
            torch.optim.SparseAdam(of.words.parameters(), lr=0.1),
            torch.optim.SGD(of.head.parameters(), lr=0.1),
        ]

    for _ in range(parts):
        (-plain(ids["forget"])).backward()
    vectors = [
        {name: torch.autograd.grad(plain(x), p)[0] for name, x in ids.items()}
        for p in plain.parameters()
    ]
    with Recorder(model, tmp_path / "a.h5", **how) as recorder:
        for part in range(parts):
            losses = {name: model(x) for name, x in ids.items()}
            recorder.backward(objective={"forget": -1.0}, **losses, accumulate=part < parts - 1)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad.layout == q.grad.layout
            assert torch.equal(p.grad.to_dense(), q.grad.to_dense())
        for a, b in zip(optimizers(model), optimizers(plain), strict=True):
            a.step()
            b.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    gram = open_run(tmp_path / "a.h5").gram()[0]
    for of_parameter, found in zip(vectors, gram[:, 1:3, 1:3], strict=True):
        dense = torch.stack([x.to_dense().flatten() for x in of_parameter.values()]).double()
        np.testing.assert_allclose(found, parts**2 * dense @ dense.T, rtol=1e-6)


def test_sparse_gradients_are_not_rectified() -> None:
    model = Words("embedding")
    losses = {"forget": model(torch.tensor([1, 2])), "retain": model(torch.tensor([3, 2]))}
    rectifier = Rectifier(model)
    with pytest.raises(ValueError, match=r"rectified step should be dense. Found .* sparse=False"):
        rectifier.backward(objective={"forget": -1.0}, **losses)
    assert not any(v is not None for v in rectifier.watched["retain_ema"])
    assert all(p.grad is None for p in model.parameters())


# Held in another form.


class Halved(Tensor):
    """A tensor that holds the half of its numbers, as a quantised one holds codes."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Self:
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)  # type: ignore[no-any-return,attr-defined]

    def __init__(self, half: Tensor) -> None:
        self.half = half

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(parts: Any, *_: Any) -> "Halved":
        return Halved(parts["half"])

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten.detach.default:
            return Halved(args[0].half)
        plain = [2 * x.half if isinstance(x, Halved) else x for x in args]
        return operation(*plain, **(kwargs or {}))


def test_quantised_weights_are_refused_where_they_are_trained(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight = nn.Parameter(Halved(torch.randn(4, 4)))
    with pytest.raises(ValueError, match=r"Found `0.weight` of `Halved`, which holds .* adapter"):
        Recorder(model, tmp_path / "a.h5")
    model[0].weight.requires_grad_(False)
    assert [*trainable(model)] == ["0.bias", "1.weight", "1.bias"]
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(objective=squared(model, 0))


def test_integer_weights_under_an_adapter_are_no_obstacle(tmp_path: Path) -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(-8, 8, (4, 4), dtype=torch.int8)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            adapted: Tensor = x @ (self.codes.to(x.dtype) / 8) + self.lora_B(self.lora_A(x))
            return adapted

    model = Coded()
    expected = [torch.autograd.grad(squared(model, 0), p)[0] for p in trainable(model).values()]
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(objective=squared(model, 0))
    np.testing.assert_allclose(
        open_run(tmp_path / "a.h5").gram()[0, :, 0, 0],
        [float(g.double().square().sum()) for g in expected],
        rtol=1e-6,
    )


# Hooks on gradients.


def test_a_sum_of_losses_under_hooks_on_gradients_is_warned_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def gradient(hook: Callable[[Tensor], Tensor], *, one: bool, watched: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        model.weight.register_hook(hook)
        losses = {name: lambda i=i: squared(model, i) for i, name in enumerate(("one", "other"))}
        if not watched:
            (losses["one"]() - losses["other"]()).backward()
        else:
            weights = {"one": 1.0, "other": -1.0}
            whole = lambda: losses["one"]() - losses["other"]()  # noqa: E731
            with Recorder(model, tmp_path / "a.h5", overwrite=True) as recorder:
                recorder.backward(objective=whole if one else weights, **losses)
        assert model.weight.grad is not None
        return model.weight.grad

    hooks = {"clip": lambda g: g.clamp(-0.01, 0.01), "mask": lambda g: g * torch.eye(2, 4)}
    for hook in hooks.values():
        assert torch.equal(
            gradient(hook, one=True, watched=True), gradient(hook, one=False, watched=False)
        )
    assert not recwarn
    for name, hook in hooks.items():
        with pytest.warns(UserWarning, match="hooks see these. Found hooks on 1 parameters"):
            found = gradient(hook, one=False, watched=True)
        expected = gradient(hook, one=False, watched=False)
        assert torch.allclose(found, expected, atol=1e-7) == (name == "mask")
