"""Rules: each is what its paper says, and what a loop over the vectors themselves gives."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from geffect import projection
from geffect.projection.from_torchjd import from_torchjd
from geffect.projection.rules import (
    Rule,
    a_gem,
    blur,
    gru,
    nearest,
    off_span,
    orthogonal,
    pcgrad,
)
from tests.utils import reference, two_ranks
from tests.utils.vectors import gram, rectified, step, tensors

RULES = [found for found in vars(projection).values() if isinstance(found, Rule)]
OF_ONE = [rule for rule in RULES if rule.one_retain]
OF_SEVERAL = [rule for rule in RULES if not rule.one_retain]
NEVER_IN_CONFLICT = [gru, a_gem, orthogonal, pcgrad, off_span, nearest]

untimed = settings(deadline=None, max_examples=40)

SCALES = [1e-10, 1e-3, 1.0, 7.0, 1e15]
vectors = st.lists(
    st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=3, max_size=3
)


@st.composite
def rows(draw: Any, most: int = 4) -> Tensor:
    """u and up to `most` retain gradients of few, small whole numbers, of very different lengths.

    So zero, equal, parallel, opposite and linearly dependent gradients are all frequent.
    """
    size, count = draw(st.integers(1, 5)), draw(st.integers(1, most))
    number = st.integers(-3, 3)
    row = st.lists(number, min_size=size, max_size=size)
    matrix = torch.tensor(draw(st.lists(row, min_size=count + 1, max_size=count + 1))).double()
    lengths = draw(st.lists(st.sampled_from(SCALES), min_size=count + 1, max_size=count + 1))
    return matrix * torch.tensor(lengths).double()[:, None]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm() if vector.any() else vector


def off(u: Tensor, retain: list[Tensor]) -> Tensor:
    """u without its part in the span, by least squares on the vectors."""
    if not retain:
        return u
    span = torch.stack([unit(r) for r in retain], dim=1)
    return u - span @ torch.linalg.lstsq(span, u[:, None], driver="gelsd").solution[:, 0]


def nearest_by_force(u: Tensor, retain: list[Tensor]) -> Tensor:
    """The nearest of the points off the span of some retain gradients that harm none of them.

    The solution is one of these, and none that is allowed is nearer.
    """
    slack = 1e-11 * float(u.norm())
    points = [
        off(u, list(some))
        for count in range(len(retain) + 1)
        for some in combinations(retain, count)
    ]
    allowed = [x for x in points if all(float(unit(r) @ x) >= -slack for r in retain)]
    return min(allowed, key=lambda x: float((x - u).norm()))


def conflict(x: Tensor, retain: Tensor, size: Tensor) -> float:
    """How much x harms the retain gradient it harms most, as a share of what u could."""
    if not size.any():
        return 0.0
    return max(-float(unit(r) @ x) for r in retain) / float(size.norm())


@pytest.mark.parametrize("rule", NEVER_IN_CONFLICT)
@untimed
@given(matrix=rows())
def test_afterwards_nothing_is_in_conflict(rule: Rule, matrix: Tensor) -> None:
    u, *retain = matrix if rule in OF_SEVERAL else matrix[:2]
    x = step(rule, u, *retain)
    # PCGrad's r may be the larger part of it.
    size = torch.stack([u, *retain]).norm(dim=1).max() if rule is pcgrad else u.norm()
    assert conflict(x, torch.stack(retain), size) <= 1e-10


@pytest.mark.parametrize("rule", [gru, a_gem, orthogonal, off_span, nearest])
@untimed
@given(matrix=rows())
def test_a_second_time_changes_nothing(rule: Rule, matrix: Tensor) -> None:
    u, *retain = matrix if rule in OF_SEVERAL else matrix[:2]
    x = step(rule, u, *retain)
    assert (step(rule, x, *retain) - x).norm() <= 1e-10 * u.norm()


@pytest.mark.parametrize("rule", [gru, a_gem, orthogonal, off_span, nearest])
@untimed
@given(matrix=rows(), own=st.sampled_from(SCALES), others=st.lists(st.sampled_from(SCALES)))
def test_lengths_of_retain_gradients_do_not_matter(
    rule: Rule, matrix: Tensor, own: float, others: list[float]
) -> None:
    u, *retain = matrix if rule in OF_SEVERAL else matrix[:2]
    x = step(rule, u, *retain)
    scaled = [scale * r for scale, r in zip([*others, *[1.0] * 4], retain, strict=False)]
    assert (step(rule, own * u, *scaled) - own * x).norm() <= 1e-10 * (own * u).norm()


@pytest.mark.parametrize("rule", [gru, a_gem, nearest])
@untimed
@given(matrix=rows())
def test_without_conflict_the_objective_is_left_as_it_is(rule: Rule, matrix: Tensor) -> None:
    u, *retain = matrix if rule in OF_SEVERAL else matrix[:2]
    agreeing = [r if u @ r >= 0 else -r for r in retain]
    alone = [1.0, *[0.0] * len(retain)]
    assert rule(gram(torch.stack([u, *agreeing]))).tolist() == alone


@pytest.mark.parametrize("rule", RULES)
@untimed
@given(u_=vectors)
def test_a_zero_retain_gradient_takes_no_part(rule: Rule, u_: list[float]) -> None:
    u, r = torch.tensor(u_).double(), torch.tensor([-1.0, 2.0, 0.5]).double()
    nothing = torch.zeros_like(u)
    assert torch.equal(step(rule, u, nothing), u)
    if rule in OF_SEVERAL:
        assert (step(rule, u, nothing, r) - step(rule, u, r)).norm() <= 1e-12 * u.norm()


@pytest.mark.parametrize("rule", RULES)
def test_without_an_objective_there_is_no_conflict(rule: Rule) -> None:
    u, r = torch.zeros(3).double(), torch.tensor([-1.0, 2.0, 0.5]).double()
    assert torch.equal(step(rule, u, r), r if rule in (pcgrad, blur) else u)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_are_asked_for_each_by_itself(rule: Rule) -> None:
    k = 4 if rule in OF_SEVERAL else 2
    K = torch.stack([gram(torch.randn(k, 5, dtype=torch.float64)) for _ in range(6)])
    K[2] = 0.0
    together = rule(K.reshape(2, 3, k, k))
    assert together.shape == (2, 3, k)
    for found, block in zip(together.reshape(6, k), K, strict=True):
        torch.testing.assert_close(found, rule(block), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", OF_ONE)
def test_a_rule_for_one_retain_gradient_refuses_several(rule: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"`{rule.__name__}` should be .*Found 2.*`nearest`"):
        rule(torch.eye(3))


@untimed
@given(vectors, vectors)
def test_a_gem_is_gru(u_: list[float], r_: list[float]) -> None:
    u, r = torch.tensor(u_).double(), torch.tensor(r_).double()
    K = gram(torch.stack([u, r]))
    assert torch.equal(a_gem(K), gru(K))
    assert (step(gru, u, r) - reference.gru(u, r)).norm() <= 1e-9 * u.norm()


@untimed
@given(vectors, vectors)
def test_orthogonal_projects_whatever_the_sign(u_: list[float], r_: list[float]) -> None:
    u, r = torch.tensor(u_).double(), torch.tensor(r_).double()
    assert (step(orthogonal, u, r) - off(u, [r])).norm() <= 1e-10 * u.norm()
    assert (step(orthogonal, u, r) - step(off_span, u, r)).norm() <= 1e-10 * u.norm()


@untimed
@given(vectors, vectors)
def test_pcgrad_is_the_sum_of_what_is_left_of_each(u_: list[float], r_: list[float]) -> None:
    u, r = torch.tensor(u_).double(), torch.tensor(r_).double()
    expected = torch.zeros_like(u)
    for own, other in ((u, r), (r, u)):
        along = own @ other
        expected += own if along >= 0 else own - along / (other @ other) * other
    assert (step(pcgrad, u, r) - expected).norm() <= 1e-9 * (u.norm() + r.norm())


@untimed
@given(vectors, vectors)
def test_blur_forgets_as_fast_as_the_objective_alone(u_: list[float], r_: list[float]) -> None:
    u, r = torch.tensor(u_).double(), torch.tensor(r_).double()
    x = step(blur, u, r)
    assert (x - u - off(r, [u])).norm() <= 1e-9 * (u.norm() + r.norm())
    assert abs(x @ u - u @ u) <= 1e-9 * u.norm() * (u.norm() + r.norm())


@untimed
@given(rows())
def test_off_span_is_least_squares(matrix: Tensor) -> None:
    u, *retain = matrix
    assert (step(off_span, u, *retain) - off(u, retain)).norm() <= 1e-10 * u.norm()


@untimed
@given(rows())
@example(torch.tensor([[0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]).double())  # opposites
@example(torch.tensor([[-1.0, -1.0], [1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]).double())  # equals
@example(torch.tensor([[-1.0, 0.2], [1.0, 0.0], [1.0, 1.0], [1.0, -1.0]]).double())  # within
def test_nearest_is_the_nearest(matrix: Tensor) -> None:
    u, *retain = matrix
    x = step(nearest, u, *retain)
    assert (x - nearest_by_force(u, retain)).norm() <= 1e-10 * u.norm()


@untimed
@given(rows())
def test_nearest_meets_the_conditions_of_the_optimum(matrix: Tensor) -> None:
    u, *retain = matrix
    own, *weights = nearest(gram(matrix))
    x = step(nearest, u, *retain)
    assert own == 1
    for w, r in zip(weights, retain, strict=True):
        assert w >= 0
        assert r @ x >= -1e-10 * u.norm() * r.norm()
        assert abs(w * (r @ x)) <= 1e-10 * u.norm() ** 2


@untimed
@given(rows(most=3), st.permutations([0, 1, 2]))
def test_nearest_does_not_depend_on_the_order(matrix: Tensor, order: list[int]) -> None:
    u, *retain = matrix
    shuffled = [retain[i] for i in order if i < len(retain)]
    assert (step(nearest, u, *retain) - step(nearest, u, *shuffled)).norm() <= 1e-10 * u.norm()


@untimed
@given(vectors, vectors)
def test_nearest_with_one_is_gru(u_: list[float], r_: list[float]) -> None:
    u, r = torch.tensor(u_).double(), torch.tensor(r_).double()
    assert (step(nearest, u, r) - step(gru, u, r)).norm() <= 1e-12 * u.norm()


@pytest.mark.parametrize("seed", range(3))
def test_nearest_of_eight(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(9, 20, dtype=torch.float64, generator=draw)
    matrix[1:] -= 0.2 * matrix[:1]
    matrix[1:] *= torch.logspace(-10, 15, 8, dtype=torch.float64)[:, None]
    u, *retain = matrix
    x = step(nearest, u, *retain)
    assert (x - u).norm() > 0.01 * u.norm(), "the test has no conflict"
    assert (x - nearest_by_force(u, retain)).norm() <= 1e-10 * u.norm()


@pytest.mark.parametrize("rule", OF_SEVERAL)
@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("angle", [1e-5, 1e-7, 1e-9])
def test_retain_gradients_that_float32_cannot_tell_apart(
    rule: Rule, side: float, angle: float
) -> None:
    u = torch.tensor([-1.0, -1.0, 1.0]).double()
    r = torch.tensor([1.0, 0.0, 0.0]).double()
    twin = side * torch.tensor([1.0, side * angle, 0.0]).double()
    weights = rule(gram(torch.stack([u, r, twin])))
    assert weights.abs().max() <= 2e6
    assert conflict(step(rule, u, r, twin), torch.stack([r, twin]), u) <= 2e-6


@untimed
@given(vectors, vectors)
def test_pcgrad_is_theirs(u_: list[float], r_: list[float]) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    K = gram(torch.tensor([u_, r_]).double())
    theirs = from_torchjd(aggregation.PCGradWeighting())
    torch.testing.assert_close(pcgrad(K), theirs(K), rtol=1e-12, atol=1e-12)


def test_nearest_is_their_projection_onto_the_dual_cone() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("qpsolvers")
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 6, dtype=torch.float64, generator=draw)
    matrix[1:] -= matrix[:1]
    first = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    theirs = from_torchjd(aggregation.DualProjWeighting(pref_vector=first))
    K = gram(matrix)
    assert (nearest(K)[1:] > 0.1).sum() > 1, "the test has too little conflict"
    # Theirs is regularised by 1e-4.
    torch.testing.assert_close(nearest(K), theirs(K), rtol=1e-2, atol=1e-3)


def test_their_projection_of_short_gradients() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("qpsolvers")
    from torchjd.linalg import QuadprogProjector

    K = torch.tensor([[4.0, -3.0], [-3.0, 4.0]]).double()
    weighting = aggregation.UPGradWeighting(projector=QuadprogProjector(norm_eps=0.0))
    expected = from_torchjd(aggregation.UPGradWeighting())(K)
    torch.testing.assert_close(from_torchjd(weighting)(1e-8 * K), expected)


def test_a_weighting_is_asked_for_each_block() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = aggregation.MGDAWeighting()
    rule = from_torchjd(weighting)
    K = torch.stack([gram(torch.randn(3, 5, dtype=torch.float64)) for _ in range(4)])
    found = rule(K.reshape(2, 2, 3, 3))
    assert rule.__name__ == "MGDAWeighting"
    assert torch.equal(found, torch.stack([*map(weighting, K)]).reshape(2, 2, 3))


@pytest.mark.parametrize("name", ["PCGrad", "GradVacWeighting", "MoDoWeighting"])
def test_what_is_no_function_of_the_gramian_is_refused(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    with pytest.raises(ValueError, match=f"`weighting` should be .*Found `{name}`"):
        from_torchjd(getattr(aggregation, name)())


def test_processes_agree_on_weights_that_are_drawn() -> None:
    pytest.importorskip("torchjd")
    here, there = two_ranks.run(drawn_weights)
    assert here == there


def drawn_weights() -> list[float]:
    from torchjd.aggregation import RandomWeighting

    torch.manual_seed(torch.distributed.get_rank())
    return from_torchjd(RandomWeighting())(torch.eye(3)).tolist()


# GRU, whose properties its paper names.


def near(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-9 * scale.norm() + 1e-300)


@given(vectors, vectors)
def test_gru_without_conflict_changes_nothing_and_with_it_the_result_is_orthogonal(
    u_: list[float], r_: list[float]
) -> None:
    u, r = tensors(u_, r_)
    x = rectified(u, r)
    if torch.dot(u, r) >= 0:
        assert torch.equal(x, u)
    else:
        assert abs(torch.dot(x, r)) <= 1e-9 * u.norm() * r.norm()
        assert near(x, reference.gru(u, r), u)
        # Pythagoras: <u, x> = |x|^2, and the removed share of energy is the squared cosine.
        assert abs(torch.dot(u, x) - x.norm() ** 2) <= 1e-9 * u.norm() ** 2
        cosine = torch.dot(u, r) / u.norm() / r.norm()
        assert abs(1 - (x.norm() / u.norm()) ** 2 - cosine**2) <= 1e-9


@given(vectors, vectors)
def test_gru_is_idempotent(u_: list[float], r_: list[float]) -> None:
    u, r = tensors(u_, r_)
    x = rectified(u, r)
    assert near(rectified(x, r), x, u)


@given(vectors, vectors, st.sampled_from(SCALES))
def test_gru_does_not_look_at_the_length_of_the_retain_gradient(
    u_: list[float], r_: list[float], scale: float
) -> None:
    u, r = tensors(u_, r_)
    assert near(rectified(u, scale * r), rectified(u, r), u)
    assert near(rectified(scale * u, r), scale * rectified(u, r), scale * u)


@given(vectors, st.sampled_from([1e-6, 0.5, 1.0, 3.0, 1e6]))
def test_gru_leaves_nothing_of_opposite_gradients(r_: list[float], scale: float) -> None:
    (r,) = tensors(r_)
    assert near(rectified(-scale * r, r), torch.zeros(3).double(), scale * r)


@given(vectors)
def test_gru_with_a_zero_retain_gradient_changes_nothing(u_: list[float]) -> None:
    (u,) = tensors(u_)
    assert torch.equal(rectified(u, torch.zeros(3).double()), u)


def test_gru_asks_each_block_by_itself() -> None:
    K = torch.tensor([[[1.0, -1.0], [-1.0, 2.0]], [[1.0, 1.0], [1.0, 2.0]]])
    assert torch.equal(gru(K), torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
