"""The signed fold against the matrix that it is, and its error against what is stated."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from geffect.layers import Parameter, describe
from geffect.sketch import Sketch, cosine, error, inner
from tests.utils import tiny

WINDOW = 2**22 // 61 * 61  # of a sketch of width 64: where another stretch of signs begins


def drawn(*shape: int, seed: int = 0, power: int = 1) -> Tensor:
    """Normal numbers; with a power, heavy-tailed ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** power


def matrix(sketch: Sketch, numel: int, name: str) -> Tensor:
    """The linear map, coordinate by coordinate."""
    return torch.stack([sketch.fold(unit, name) for unit in torch.eye(numel)], dim=1)


@pytest.mark.parametrize("width", [2, 64, 4096])
def test_each_coordinate_has_one_sign_in_one_place(width: int) -> None:
    S = matrix(Sketch(width=width), 500, "w")
    assert S.shape == (width, 500)
    assert torch.equal((S != 0).sum(dim=0), torch.ones(500, dtype=torch.long))
    assert set(S.unique().tolist()) <= {-1.0, 0.0, 1.0}
    # As evenly as can be, and with as many signs of either kind as chance has it.
    used = (S != 0).sum(dim=1)
    assert used.max() <= -(-500 // max(1, width - 10))
    assert abs(S.sum().item()) < 4 * 500**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_fold_is_that_matrix(dtype: torch.dtype) -> None:
    sketch, x = Sketch(seed=5, width=64), drawn(700, power=3).to(dtype)
    found = sketch.fold(x, "w")
    assert found.dtype == torch.float32
    expected = matrix(sketch, 700, "w").double() @ x.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("start", [0, 17, WINDOW - 9000, 3 * WINDOW])
@pytest.mark.parametrize("cuts", [[1], [60, 61, 62], [5000, 5000, 15_000], [0, 20_000]])
def test_parts_add_up(start: int, cuts: list[int]) -> None:
    sketch, x = Sketch(width=64), drawn(20_000)
    edges = [0, *cuts, len(x)]
    parts = [sketch.fold(x[a:b], "w", start=start + a) for a, b in pairwise(edges)]
    torch.testing.assert_close(sum(parts), sketch.fold(x, "w", start=start), rtol=1e-5, atol=1e-4)


def test_a_tensor_longer_than_a_stretch_of_signs() -> None:
    sketch, x = Sketch(width=64), torch.zeros(WINDOW + 1000)
    x[-2000:] = drawn(2000)
    expected = sketch.fold(x[-2000:], "w", start=len(x) - 2000)
    torch.testing.assert_close(sketch.fold(x, "w"), expected, rtol=1e-5, atol=1e-5)


def test_a_part_that_is_empty_is_zero() -> None:
    assert torch.equal(Sketch(width=64).fold(torch.zeros(0), "w", start=77), torch.zeros(64))


def test_a_gradient_is_sketched_where_its_graph_is() -> None:
    x = drawn(100).requires_grad_()
    assert not Sketch().fold(x * 2, "w").requires_grad


def test_what_is_not_finite_is_not_hidden() -> None:
    x = drawn(1000)
    x[3] = float("inf")
    assert not torch.isfinite(Sketch().fold(x, "w")).all()


def test_the_recipe_of_version_1() -> None:
    S = matrix(Sketch(seed=3, width=8), 12, "model.norm.weight")
    places, signs = (S != 0).int().argmax(dim=0), S.sum(dim=0).int()
    assert places.tolist() == [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert signs.tolist() == [1, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, 1]
    far = Sketch(seed=3).fold(torch.ones(5), "model.norm.weight", start=10**10)
    assert far.nonzero().squeeze().tolist() == [2541, 2542, 2543, 2544, 2545]


def test_seeds_and_names_give_other_maps() -> None:
    x = drawn(5000)
    folds = [
        Sketch(seed=seed, width=64).fold(x, name).numpy() for seed in (0, 1) for name in ("a", "b")
    ]
    assert (np.abs(cosine(folds, folds) - np.eye(4)) < 0.6).all()


def test_sums_do_not_round() -> None:
    x = drawn(2_000_000, power=5)
    found, exact = Sketch().fold(x, "w").double(), Sketch().fold(x.double(), "w").double()
    assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_layers_are_summed_in_float32_whatever_type_tensors_have(
    default_dtype: torch.dtype,
) -> None:
    model = tiny.gpt2()
    vectors = [drawn(*p.shape).float() for p in model.parameters()]
    found = Sketch().layers(vectors, parameters := describe(model))
    assert found.dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    assert torch.equal(found, Sketch().layers(vectors, parameters))


def correlated() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of gradients of matrices, as difficult as those of a network."""
    heavy = drawn(3, 64, 256, power=3)
    yield "heavy tails", heavy[0] + heavy[2], heavy[1] + heavy[2]
    u, v = drawn(3, 64, seed=1), drawn(3, 256, seed=2, power=3)
    outer = torch.einsum("ki,kj->kij", u, v)
    yield "rank 2 and 1", outer[0] + outer[1], outer[0]
    column = torch.zeros(2, 64, 256)
    column[0, :, 7] = column[1, :, 7] = drawn(64, seed=3)
    column += 0.01 * drawn(2, 64, 256, seed=4)
    yield "one heavy column", column[0], column[1]


@pytest.mark.parametrize(("a", "b"), [pair[1:] for pair in correlated()],
                         ids=[pair[0] for pair in correlated()])  # fmt: skip
def test_estimates_are_unbiased_and_as_exact_as_stated(a: Tensor, b: Tensor) -> None:
    width, draws = 128, [(seed, f"w{i}") for seed in range(5) for i in range(60)]
    a, b = a.reshape(-1), b.reshape(-1)
    product, squares = (a.double() @ b.double()).item(), [x.double().square().sum() for x in (a, b)]
    exact = product / (squares[0] * squares[1]).sqrt().item()
    spread = ((squares[0] * squares[1] + product**2) / width).sqrt().item()
    folds = [[Sketch(seed, width).fold(x, name).numpy() for x in (a, b)] for seed, name in draws]
    products = np.array([inner(*pair) for pair in folds])
    cosines = np.array([cosine(*pair) for pair in folds])
    assert abs(products.mean() - product) < 4 * spread / len(draws) ** 0.5
    # Not above what is stated, up to the chance of 300 draws and of who shares a place with whom.
    assert rms(products - product) < 1.2 * spread
    assert rms(cosines - exact) < 1.2 * error(width, exact)


def test_the_error_is_reached_where_all_collides() -> None:
    a, b = drawn(2, 20_000)
    exact = torch.cosine_similarity(a, b, dim=0).item()
    draws = [[Sketch(width=256).fold(x, f"w{i}").numpy() for x in (a, b)] for i in range(300)]
    assert rms([cosine(*pair) - exact for pair in draws]) == pytest.approx(error(256), rel=0.15)


def rms(values: object) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def test_layers_sum_their_tensors() -> None:
    model = tiny.llama(tied=True)
    parameters = describe(model)
    vectors: list[Tensor | None] = [drawn(*p.shape, seed=i) for i, p in enumerate(parameters)]
    vectors[1] = None
    sketch = Sketch(width=64)
    found = sketch.layers(vectors, parameters)
    names = list(dict.fromkeys(p.layer for p in parameters))
    for row, layer in zip(found, names, strict=True):
        folds = [
            sketch.fold(vector.reshape(-1), parameter.name)
            for vector, parameter in zip(vectors, parameters, strict=True)
            if parameter.layer == layer and vector is not None
        ]
        torch.testing.assert_close(row, torch.stack(folds).sum(dim=0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="zip"):
        sketch.layers(vectors[:-1], parameters)


def test_a_layer_without_a_gradient_is_zero() -> None:
    one = Parameter("w", "head", "head", -1, "w", (3,), "float32", ())
    assert torch.equal(Sketch(width=8).layers([None], [one]), torch.zeros(1, 8))


def test_reading_all_pairs() -> None:
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32), np.array([[4.0, 3.0], [6e19, 8e19]])
    assert inner(a, b).tolist() == [[24.0, 5e20], [0.0, 0.0]]
    assert cosine(a, b)[0].tolist() == [pytest.approx(0.96), 1.0]
    assert np.isnan(cosine(a, b)[1]).all()
    tiny_ones = np.full((1, 2), 1e-30, np.float32)
    assert cosine(tiny_ones, tiny_ones) == pytest.approx(1.0)


@pytest.mark.parametrize("width", [0, 1, 2**20])
def test_a_width_that_cannot_be_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"`width` should be between 2 and .* Found {width}\."):
        Sketch(width=width)


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`version` should be 1\. Found 2\. Use the version of"):
        Sketch(version=2)
