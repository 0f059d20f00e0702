"""Kernels against numpy in float64, run on the CPU by Triton's interpreter."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from geffect import Rectifier, devices, dots
from geffect.projection import SaliencyMask, nearest
from geffect.projection.elementwise import SAGO, Halt
from tests.utils.far_device import Spread, kernels_on_the_cpu

kernels = pytest.importorskip("geffect.kernels")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mixed(k: int, size: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(k * 10_000 + size)
    normal = torch.randn(k, size, generator=draw)
    return [row.to(TYPES[i % 4]) for i, row in enumerate(normal)]


def exact(vectors: list[torch.Tensor]) -> torch.Tensor:
    rows = np.stack([v.detach().double().numpy().reshape(-1) for v in vectors])
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(rows @ rows.T)


def check(found: torch.Tensor, vectors: list[torch.Tensor]) -> None:
    expected = exact(vectors)
    lengths = expected.diagonal().sqrt()
    assert found.dtype == torch.float64
    assert ((found - expected).abs() <= 1e-14 * lengths.outer(lengths)).all()


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with kernels_on_the_cpu(monkeypatch):
        yield


@pytest.mark.parametrize(
    ("k", "size"),
    [(k, size) for k in (*range(1, 10), 12, 13) for size in (0, 1, 1023, 1024, 1025)]
    + [(k, 8195) for k in (1, 2, 5, 9)],
)
def test_gram_equals_float64(k: int, size: int) -> None:
    vectors = mixed(k, size)
    check(kernels.gram(vectors), vectors)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_products_neither_underflow_nor_overflow(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16:
        scale = scale ** (1 / 8)
    vectors = [(v * scale).to(dtype) for v in torch.randn(2, 5000).double()]
    assert exact(vectors).diagonal().isfinite().all()
    assert (kernels.gram(vectors).diagonal() > 0).all()
    check(kernels.gram(vectors), vectors)


def test_a_heavy_tail_leaves_the_sign_of_a_small_product() -> None:
    a, b = (torch.randn(50_000, generator=torch.Generator().manual_seed(s)) ** 5 for s in (0, 1))
    b -= (torch.dot(a.double(), b.double()) / torch.dot(a.double(), a.double())).float() * a
    check(kernels.gram([a, b]), [a, b])
    assert kernels.gram([a, b])[0, 1].sign() == exact([a, b])[0, 1].sign()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 4095, 4096, 5000])
def test_what_is_not_finite_is_told(bad: float, place: int) -> None:
    spoilt, whole = torch.ones(5001), torch.ones(5001)
    spoilt[place] = bad
    found = kernels.gram([spoilt, whole, torch.zeros(5001)])
    torch.testing.assert_close(found, exact([spoilt, whole, torch.zeros(5001)]), equal_nan=True)
    assert not found[0].isfinite().any()
    assert found[1, 1] == 5001


def test_the_same_bits_twice() -> None:
    vectors = mixed(3, 30_000)
    assert torch.equal(kernels.gram(vectors), kernels.gram(vectors))


def test_both_halves_are_the_same_bits() -> None:
    found = kernels.gram(mixed(10, 5000))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("take", [dots.gram, dots.quick_gram])
def test_gradients_of_any_layout_go_through_kernels(
    take: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(kernels.launching, "_launch", _counted(kernels.launching._launch, calls))
    plain, turned = torch.randn(30, 70), torch.randn(70, 30).t()
    every_second = torch.randn(30, 140, dtype=torch.float64)[:, ::2].to(torch.bfloat16)
    sparse = torch.sparse_coo_tensor([[3], [5]], [2.0], (30, 70))
    vectors = [plain, turned, every_second, sparse]
    found = take([plain, turned, None, every_second, sparse])
    present = [0, 1, 3, 4]
    check(found[present][:, present], [dots.dense(v) for v in vectors])
    assert not found[2].any()
    assert len(calls) == 1


def test_a_number_without_dimensions_has_a_gram_matrix() -> None:
    assert dots.gram([torch.tensor(3.0), torch.tensor(2.0)]).tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_types_without_a_kernel_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.launching, "_launch", pytest.fail)
    a = torch.arange(5)
    assert dots.gram([a.to(torch.float8_e4m3fn)]).item() == 30


def _counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    return counted


CHOICES: dict[str, dict[str, Any]] = {
    "halt, update space": {"scope": "coordinate", "space": "update"},
    "halt, gradient space": {"scope": "coordinate"},
    "halt and a mask": {"scope": "coordinate", "select": 0.3, "space": "update"},
    "two sets": {"scope": "coordinate", "space": "update", "protect": ("retain", "forget")},
    "SAGO": {"rule": SAGO(alpha=0.7), "ema": 1.0},
    "SAGO that prefers to retain": {"rule": SAGO(alpha=0.7, prefer_retain=True), "ema": 1.0},
}


CONSTRAINTS: dict[str, dict[str, Any]] = {
    "select": {"select": 0.3},
    "select, update space": {"select": 0.3, "space": "update"},
    "SaliencyMask": {"select": SaliencyMask(0.5), "space": "update"},
    "two sets and a mask": {"select": 0.3, "protect": ("retain", "forget"), "rule": nearest},
    "metric": {"space": "update", "correction": "retain_adam"},
    "metric and a mask": {"space": "update", "correction": "retain_adam", "select": 0.3},
    "update space": {"space": "update"},
    "gradient space": {},
    "history": {"rule": nearest, "ema": 1.0, "history": 2, "space": "update"},
}


def trained(
    choice: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    tensors: int = 3,
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> tuple[list[torch.Tensor], list[Any]]:
    model = Spread(tensors, side=50).to(dtype)  # above one tile
    optimizer = kind(model.parameters(), lr=0.01)
    rectifier = Rectifier(model, optimizer=optimizer, **choice)
    reports = []
    for step in range(2):
        rectifier.backward(objective={"forget": -1.0}, **model.losses(step))
        optimizer.step()
        optimizer.zero_grad()
        reports.append(rectifier.report)
    return [p.detach().clone() for p in model.parameters()], reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CHOICES)
def test_kernels_change_coordinates_as_torch_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(kernels.launching, "_launch", _counted(kernels.launching._launch, calls))
    by_kernels, told = trained(CHOICES[name], dtype)
    assert {call[0].__name__ for call in calls} >= {"_elementwise_gram", "_elementwise_write"}
    with monkeypatch.context() as without:
        without.setattr(devices, "has_kernels", lambda *_: False)
        by_torch, expected = trained(CHOICES[name], dtype)
    for a, b in zip(by_kernels, by_torch, strict=True):
        assert torch.equal(a, b)
    check_told(told, expected, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CONSTRAINTS),
        ("select", torch.bfloat16),
    ],
)
def test_kernels_keep_constraints_as_torch_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(kernels.launching, "_launch", _counted(kernels.launching._launch, calls))
    training = partial(trained, CONSTRAINTS[name], dtype, tensors=1, kind=torch.optim.SGD)
    by_kernels, told = training()
    called = {call[0].__name__ for call in calls}
    assert ("_weighted_gram" in called) == (name != "gradient space")
    assert ("_salience" in called) == ("select" in CONSTRAINTS[name])
    with monkeypatch.context() as without:
        without.setattr(devices, "has_kernels", lambda *_: False)
        by_torch, expected = training()
    for a, b in zip(by_kernels, by_torch, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    check_told(told, expected, dtype)


def check_told(told: list[Any], expected: list[Any], dtype: torch.dtype) -> None:
    for a, b in zip(told, expected, strict=True):
        assert a.blocks == b.blocks
        for column in dataclasses.fields(a)[1:]:
            x, y = (torch.tensor(getattr(r, column.name)) for r in (a, b))
            # On a CPU products are the quick ones, which are right to 1e-6 of |a||b|.
            rounds = 1e-2 if dtype == torch.bfloat16 else 1e-6
            within = rounds * max(a.norm_before) * max(1.0, *a.retain_norm, *a.norm_before)
            torch.testing.assert_close(x, y, rtol=rounds, atol=within, equal_nan=True)


def test_a_class_made_from_a_rule_has_no_kernel_of_its_own() -> None:
    class Lesser(Halt):
        def __call__(self, u: torch.Tensor, retain: Any) -> torch.Tensor:
            return u / 2

    assert Halt().form == ("HALT", 0.0)
    assert Lesser().form is None


def test_what_a_kernel_writes_counts_as_a_change() -> None:
    now = torch.ones(3)
    version = now._version
    kernels.Elementwise(now, None, [-torch.ones(3)], None, kernels.HALT).write()
    assert now.tolist() == [0.0] * 3
    assert now._version > version


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
def test_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    now = (torch.randn(3000, generator=torch.Generator().manual_seed(3)) * 1e3).to(dtype)
    r = torch.randn(3000, generator=torch.Generator().manual_seed(4))
    r[:3] = torch.tensor([torch.inf, torch.nan, 3.4e38])
    expected = torch.where((now < 0) & (r > 0) | (now > 0) & (r < 0), (r * 0.7).to(dtype), now)
    kernels.Elementwise(now, None, [r], None, kernels.SAGO, 0.7).write()
    torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)


def test_the_salience_of_a_sample_is_that_of_the_mask() -> None:
    draw = torch.Generator().manual_seed(0)
    u, square = torch.randn(2500, generator=draw), torch.rand(2500, generator=draw)
    square[::7] = 0.0
    found, some = torch.empty(2500), torch.empty(3)
    kernels.take_salience(u, square, 0.3, 1e-8, torch.arange(2500), found)
    kernels.take_salience(u, square, 0.3, 1e-8, torch.tensor([7, 0, 2499]), some)
    assert torch.equal(some, found[[7, 0, 2499]])
    torch.testing.assert_close(found, u.abs() / ((square / 0.3).sqrt() + 1e-8))
    for bound in found[:3]:
        assert torch.equal(kernels.salient(u, square, 0.3, 1e-8, bound.double()), found >= bound)
    assert torch.equal(kernels.salient(u, None, 0.3, 1.0, bound), u.abs() >= bound)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_written_is_what_was_measured(before: bool, half: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if half else torch.float32
    now, then = torch.randn(2, 2100, generator=draw).to(dtype)
    r, s = torch.randn(2, 2100, generator=draw)
    mask = torch.rand(2100, generator=draw) < 0.5
    kernel = kernels.Weighted(now, then if before else None, [r, s], mask, None)
    weights = [0.5, 2.0, -1.0]
    K = kernel.gram(2, weights)
    new = torch.empty_like(now)
    kernel.write(weights, new, anew=True)
    u = (then.float() - now.float() if before else now.float()) * mask
    x = 0.5 * u + 2.0 * r * mask - s * mask
    expected = (then.float() - x if before else x).to(dtype)
    torch.testing.assert_close(new, expected)
    written = then.float() - new.float() if before else new.float()
    vectors = [written, r, s]
    check(K, [*vectors, *(v * mask for v in vectors)])
