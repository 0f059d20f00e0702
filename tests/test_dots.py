"""Inner products against float64, on what breaks a running float32 sum."""

import pytest
import torch

from geffect.dots import BLOCK, LARGEST, ROW, SMALLEST, TABLE, gram, grams, quick_gram


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return gram([a, b])[0, 1]


def heavy_tailed(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=draw) ** 5


@pytest.mark.parametrize("size", [0, 1, 100, BLOCK, BLOCK + 1, 1_000_000])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_dot_equals_float64(size: int, scale: float) -> None:
    a, b = heavy_tailed(size, 0) * scale, heavy_tailed(size, 1) * scale
    exact = torch.dot(a.double(), b.double())
    lengths = a.double().norm() * b.double().norm()
    assert abs(dot(a, b) - exact) <= 1e-14 * lengths


def test_near_orthogonal_heavy_tailed_pair_keeps_its_sign() -> None:
    a = heavy_tailed(1_000_000, 0)
    b = heavy_tailed(1_000_000, 1)
    b -= (torch.dot(a.double(), b.double()) / torch.dot(a.double(), a.double())).float() * a
    exact = torch.dot(a.double(), b.double())
    assert dot(a, b).sign() == exact.sign()
    assert abs(dot(a, b) - exact) <= 1e-6 * abs(exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gram_of_any_float_type_and_layout(dtype: torch.dtype) -> None:
    vectors = [heavy_tailed(600, seed).clamp(-100, 100).to(dtype).view(20, 30) for seed in range(3)]
    vectors[1] = vectors[1].t().contiguous().t()
    rows = torch.stack([v.double().reshape(-1) for v in vectors])
    torch.testing.assert_close(gram(vectors), rows @ rows.T, rtol=1e-13, atol=0)


def test_an_absent_gradient_is_zero() -> None:
    a = torch.tensor([1.0, 2.0])
    expected = torch.tensor([[5.0, 0.0, 5.0], [0.0, 0.0, 0.0], [5.0, 0.0, 5.0]]).double()
    assert torch.equal(gram([a, None, a]), expected)
    assert torch.equal(gram([None, None]), torch.zeros(2, 2).double())


def test_gradients_of_different_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"should have one shape. Found .*Pass gradients of the"):
        gram([torch.zeros(12), torch.zeros(13)])


def test_parameters_are_gathered_in_their_order() -> None:
    vectors = [[torch.full((size,), float(size)), None] for size in (1, 2, 3)]
    assert grams(vectors)[:, 0, 0].tolist() == [1.0, 8.0, 27.0]
    assert not grams(vectors)[:, 1].any()


def test_a_part_without_coordinates_counts_nothing() -> None:
    empty = torch.zeros(0, 4)
    found = grams([[empty, empty], [empty, None], [torch.ones(2), torch.ones(2)]])
    assert found.tolist() == [[[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, [[2.0, 2.0]] * 2]


def quick_error(vectors: list[torch.Tensor]) -> float:
    """The largest error of a quick inner product, as a share of the product of the lengths."""
    exact = gram(vectors)
    lengths = exact.diagonal().sqrt()
    return float(((quick_gram(vectors) - exact).abs() / lengths.outer(lengths)).max())


@pytest.mark.parametrize("size", [1, ROW - 1, ROW, ROW + 1, TABLE - 1, TABLE + 1, 2 * TABLE])
def test_a_quick_product_is_as_exact_as_it_says(size: int) -> None:
    spiky, even = torch.full((size,), 0.1), torch.full((size,), 0.3)
    spiky[size // 2] = 1e4
    assert quick_error([heavy_tailed(size, 0), heavy_tailed(size, 1)]) < 1e-6
    # What is worst for sums in float32: one large among many small ones, and all alike.
    assert quick_error([spiky, even]) < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e25])
def test_a_quick_product_neither_underflows_nor_overflows(scale: float) -> None:
    large, small = torch.ones(5000) * scale, torch.ones(5000)
    assert not SMALLEST < float(gram([large])) < LARGEST
    assert torch.equal(quick_gram([large, small]), gram([large, small]))


def test_what_is_zero_is_not_multiplied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("geffect.dots._products")
    assert quick_gram([torch.zeros(3000), torch.ones(3000)]).tolist() == [[0, 0], [0, 3000]]


def test_a_quick_product_of_what_is_no_number_is_none() -> None:
    broken = torch.ones(3000)
    broken[7] = torch.nan
    assert quick_gram([broken, torch.ones(3000)]).isnan().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_the_exact_product(dtype: torch.dtype) -> None:
    vectors = [heavy_tailed(3000, seed).clamp(-9, 9).to(dtype) for seed in range(2)]
    assert torch.equal(quick_gram(vectors), gram(vectors))


def test_quick_products_of_any_layout_and_of_absent_gradients() -> None:
    a, b = heavy_tailed(6000, 0).view(60, 100), heavy_tailed(6000, 1).view(100, 60).t()
    expected = gram([a, None, b])
    torch.testing.assert_close(
        quick_gram([a, None, b]), expected, rtol=1e-6, atol=1e-6 * float(expected.max())
    )
    assert torch.equal(quick_gram([None, None]), torch.zeros(2, 2).double())
    assert torch.equal(quick_gram([torch.zeros(0, 4)] * 2), torch.zeros(2, 2).double())
