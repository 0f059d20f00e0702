"""Collapse: what is left of a matrix, beside a loop over its singular directions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from geffect.projection import Collapse

SIDES = ("input", "output", "both")
STRENGTHS = ("hard", "soft", "quadratic")


def matrices(*shape: int, seed: int = 0, count: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, *(shape or (5, 7)), dtype=torch.float64, generator=draw)


def naive(G: Tensor, basis: Tensor, k: int, side: str, strength: str) -> Tensor:
    """One direction after the other; the eigenvectors of both products, not a decomposition."""
    x = G.clone()
    for name, square in (("input", basis.T @ basis), ("output", basis @ basis.T)):
        if side not in (name, "both"):
            continue
        values, vectors = torch.linalg.eigh(square)
        largest = values.flip(0)[:k] ** 0.5
        for i in range(k):
            v = vectors.flip(1)[:, i]
            ratio = (largest[i] / largest[k - 1]).item()
            f = {"hard": float("inf"), "soft": ratio, "quadratic": ratio**2}[strength]
            along = torch.outer(v, v) * (1 - 1 / f)
            x = x - x @ along if name == "input" else x - along @ x
    return x


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("own", [True, False])
def test_it_is_the_formula(k: int, side: Any, strength: Any, own: bool) -> None:
    for shape in ((5, 7), (7, 5), (6, 6)):
        G, other = matrices(*shape)
        basis = G if own else other
        found = Collapse(k, side, strength=strength)(G, basis)
        torch.testing.assert_close(found, naive(G, basis, k, side, strength), rtol=0, atol=1e-10)


@pytest.mark.parametrize("strength", ["hard"])
@pytest.mark.parametrize("side", SIDES)
def test_hard_leaves_nothing_along_the_directions_and_a_second_time_changes_nothing(
    side: Any, strength: Any
) -> None:
    G, basis = matrices()
    collapse = Collapse(3, side, "retain", strength)
    U, _, Vh = torch.linalg.svd(basis)
    x = collapse(G, basis)
    if side != "output":
        assert (x @ Vh[:3].T).abs().max() < 1e-12
    if side != "input":
        assert (U[:, :3].T @ x).abs().max() < 1e-12
    torch.testing.assert_close(collapse(x, basis), x, rtol=0, atol=1e-12)
    assert (x - G).norm() > 0.1


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("side", SIDES)
def test_no_directions_change_nothing(side: Any, strength: Any) -> None:
    G, basis = matrices()
    for k, of in ((0, basis), (3, torch.zeros_like(basis))):
        x = Collapse(k, side, strength=strength)(G, of)
        assert torch.equal(x, G) and x is not G


@pytest.mark.parametrize("strength", ["soft", "quadratic"])
@pytest.mark.parametrize("side", SIDES)
def test_equal_singular_values_are_left_as_they_are(side: Any, strength: Any) -> None:
    G, other = matrices(6, 6)
    Q, _ = torch.linalg.qr(other)
    x = Collapse(6, side, strength=strength)(G, 3 * Q)
    torch.testing.assert_close(x, G, rtol=0, atol=1e-12)
    torch.testing.assert_close(Collapse(1, side, strength=strength)(G, other), G)  # S_1 / S_1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [2, 5])
def test_hard_at_full_rank_of_the_own_gradient_leaves_nothing(side: Any, rank: int) -> None:
    left, right = matrices(5, rank), matrices(rank, 7)
    G = left[0] @ right[0]
    assert Collapse(rank, side, strength="hard")(G, G).abs().max() < 1e-12 * G.abs().max() * 10


def test_soft_on_both_sides_of_the_own_gradient_inverts_the_spectrum() -> None:
    G, _ = matrices()
    S = torch.linalg.svdvals(G)
    found = torch.linalg.svdvals(Collapse(4, strength="soft")(G, G))
    expected = torch.cat([S[3] ** 2 / S[:4], S[4:]]).sort(descending=True).values
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_side_commutes_with_rotations_of_the_other(strength: Any) -> None:
    G, basis = matrices()
    Q, _ = torch.linalg.qr(matrices(5, 5, seed=1)[0])
    P, _ = torch.linalg.qr(matrices(7, 7, seed=2)[0])
    into = Collapse(3, "input", strength=strength)
    torch.testing.assert_close(into(Q @ G, Q @ basis), Q @ into(G, basis), rtol=0, atol=1e-11)
    out = Collapse(3, "output", strength=strength)
    torch.testing.assert_close(out(G @ P, basis @ P), out(G, basis) @ P, rtol=0, atol=1e-11)


@pytest.mark.parametrize("side", SIDES)
def test_the_length_of_the_basis_does_not_matter(side: Any) -> None:
    G, basis = matrices()
    collapse = Collapse(3, side)
    for scale in (1e-30, -1.0, 1e30):
        torch.testing.assert_close(
            collapse(G, scale * basis), collapse(G, basis), rtol=0, atol=1e-11
        )
        torch.testing.assert_close(collapse(scale * G, basis), scale * collapse(G, basis))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_directions_that_the_basis_does_not_have_are_left_out(strength: Any) -> None:
    G, _ = matrices()
    basis = matrices(5, 2)[0] @ matrices(2, 7)[0]
    found = Collapse(5, "both", "retain", strength)(G, basis)
    torch.testing.assert_close(found, Collapse(2, "both", "retain", strength)(G, basis))


def test_half_precision_is_rounded_once() -> None:
    G, basis = matrices().bfloat16()
    found = Collapse(3)(G, basis)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, Collapse(3)(G.float(), basis.float()).bfloat16())


def test_gradients_are_left_as_they_were() -> None:
    G, basis = matrices()
    before = G.clone(), basis.clone()
    Collapse(3)(G, basis)
    assert torch.equal(G, before[0]) and torch.equal(basis, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, r"`k` of Collapse should be a whole number"),
        ({"k": 1.5}, r"`k` of Collapse should be a whole number"),
        ({"k": True}, r"`k` of Collapse should be a whole number"),
        (
            {"k": 1, "side": "in"},
            r"`side` of Collapse should be one of input, output, both\.",
        ),
        ({"k": 1, "source": "world"}, r"`source` of Collapse should be one of forget, retain"),
        ({"k": 1, "strength": "ridge"}, r"`strength` of Collapse should be one of hard, soft"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collapse(**options)


@pytest.mark.parametrize(
    ("gradient", "basis"),
    [
        (torch.ones(4), torch.ones(4)),
        (torch.ones(2, 3, 1), torch.ones(2, 3, 1)),
        (torch.ones(4, 5), torch.ones(5, 4)),
        (torch.ones(2, 5), torch.ones(2, 5)),
    ],
)
def test_what_is_no_matrix_of_that_size_is_refused(gradient: Tensor, basis: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one matrix whose sides are at least k = 3\. Found"):
        Collapse(3)(gradient, basis)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(wrong: float) -> None:
    good, bad = torch.eye(3), torch.full((3, 3), wrong)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="should be given finite gradients"):
            Collapse(2)(*pair)
