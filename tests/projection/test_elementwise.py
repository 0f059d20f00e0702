"""What is decided for each coordinate: elementwise rules, and selections with one threshold."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from geffect import Rectifier
from geffect.objectives import nll
from geffect.projection.elementwise import SAGO, Halt, opposed
from geffect.projection.selection import SAMPLE, SaliencyMask, Salient, Selection
from tests.utils import reference, two_ranks
from tests.utils import shallow as tiny

untimed = settings(deadline=None)

coordinates = st.lists(
    st.tuples(*[st.sampled_from([-3.0, -0.5, 0.0, 1.0, 2.0])] * 3), min_size=1, max_size=8
)
scales = st.sampled_from([1e-30, 1e-10, 1.0, 1e15])


def split(table: list[tuple[float, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    u, r, s = torch.tensor(table).T
    return u, r, s


@untimed
@given(coordinates, scales, scales)
def test_opposed_at_every_scale(table: list[tuple[float, ...]], own: float, other: float) -> None:
    u, r, s = split(table)
    expected = [a * b < 0 or a * c < 0 for a, b, c in table]
    assert opposed(own * u, [other * r, s]).tolist() == expected
    assert not opposed(u, []).any()


@untimed
@given(coordinates)
def test_halted_coordinates_are_zero_and_the_others_as_they_were(
    table: list[tuple[float, ...]],
) -> None:
    u, r, s = split(table)
    before = u.clone()
    x = Halt()(u, [r, s])
    assert x.tolist() == [0.0 if a * b < 0 or a * c < 0 else a for a, b, c in table]
    assert torch.equal(Halt()(x, [r, s]), x)
    assert torch.equal(u, before)


@untimed
@given(coordinates, st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_sago_coordinate_by_coordinate(
    table: list[tuple[float, ...]], alpha: float, prefer_retain: bool
) -> None:
    u, r, _ = (part.double() for part in split(table))
    x = SAGO(alpha, prefer_retain)(u, [r])
    for found, (a, b, _) in zip(x.tolist(), table, strict=True):
        if a * b < 0:
            assert found == alpha * b
        else:
            assert found == (a + alpha * b if prefer_retain else a)
        assert found * b >= 0


def test_sago_leaves_alone_what_no_retain_loss_reaches() -> None:
    u = torch.tensor([1.0, -2.0])
    assert torch.equal(SAGO()(u, []), u)


def test_sago_keeps_the_precision_of_the_retain_gradient() -> None:
    u, r = torch.tensor([1.0, -1.0]).bfloat16(), torch.tensor([1.0, 1.001])
    assert SAGO()(u, [r]).tolist() == [1.0, r[1].item()]


def test_sago_refuses_several() -> None:
    u = torch.ones(2)
    with pytest.raises(ValueError, match=r"`SAGO` should be .*Found 2.*`nearest`"):
        SAGO()(u, [u, u])


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_sago_refuses_a_weight_that_harms(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"`alpha` of SAGO should be .*Found"):
        SAGO(alpha)


def kept(
    select: Selection,
    gradients: Sequence[Tensor | None],
    scale: Sequence[Tensor | None] | None = None,
    seed: int = 0,
) -> list[Tensor | None]:
    """The masks of all parameters."""
    scale = [None] * len(gradients) if scale is None else scale
    bound = select.threshold(gradients, scale.__getitem__, torch.Generator().manual_seed(seed))
    return [
        None if gradient is None else select.mask(gradient, scale[i], bound)
        for i, gradient in enumerate(gradients)
    ]


@untimed
@given(st.integers(1, 3000), st.sampled_from([0.005, 0.1, 0.5, 1.0]), scales)
def test_of_few_coordinates_the_fraction_is_exact(size: int, fraction: float, scale: float) -> None:
    draw = torch.Generator().manual_seed(size)
    u = torch.randn(size, generator=draw) * scale
    root = torch.rand(size, generator=draw) * scale
    masks = kept(Salient(fraction), u.tensor_split(3), root.tensor_split(3))
    ratio = (u.abs() / (root + 1e-8)).double().numpy()
    order = np.sort(ratio)
    bound = order[math.ceil((1 - fraction) * (size - 1))]
    assert (torch.cat(masks).numpy() == (ratio >= bound)).all()
    assert torch.cat(masks).any()


@settings(deadline=None, max_examples=15)
@given(st.integers(SAMPLE, 60_000), st.sampled_from([0.005, 0.1, 0.5]), st.integers(0, 5))
def test_of_many_coordinates_the_fraction_is_sampled(size: int, fraction: float, seed: int) -> None:
    whole = torch.randn(size, generator=torch.Generator().manual_seed(size))
    masks = kept(Salient(fraction), whole.tensor_split(3), seed=seed)
    count = sum(int(mask.sum()) for mask in masks if mask is not None)
    slack = 5 * math.sqrt(fraction * (1 - fraction) / SAMPLE) + 2 / SAMPLE
    assert abs(count / size - fraction) <= slack


def test_the_sample_is_of_all_parameters_alike() -> None:
    # The many coordinates of the second decide, not the two parameters half each.
    small, large = torch.full((1000,), 2.0), torch.ones(99_000)
    few = kept(Salient(0.005), [small, None, large])
    assert few[0] is not None and few[0].all() and few[2] is not None and not few[2].any()


def test_the_ratio_of_need_to_harm_decides() -> None:
    u, scale = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([2.0, 0.5, 1.0])
    (mask,) = kept(Salient(0.3), [u], [scale])
    assert mask.tolist() == [False, True, False]


def test_what_no_retain_loss_reaches_is_free() -> None:
    masks = kept(
        Salient(0.5), [torch.ones(2), torch.full((2,), 9.0)], [None, torch.full((2,), 0.1)]
    )
    assert [mask.tolist() for mask in masks] == [[True, True], [False, False]]


def test_the_training_draws_its_own_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    kept(Salient(0.1), [torch.randn(30_000, generator=torch.Generator())])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_is_one(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`fraction` of Salient should be .*Found"):
        Salient(fraction)


@untimed
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=4).filter(any),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    scales,
)
def test_moments_are_those_of_all_coordinates_together(
    sizes: list[int], c: float, scale: float
) -> None:
    draw = torch.Generator().manual_seed(sum(sizes))
    # Parameters of different size: thresholds by tensor would keep other coordinates.
    tensors = [10.0**i * scale * torch.randn(n, generator=draw) for i, n in enumerate(sizes)]
    whole = torch.cat(tensors).double().abs().numpy()
    select = SaliencyMask(c)
    bound = select.threshold([*tensors, None], lambda i: None, torch.Generator())
    assert bound == pytest.approx(whole.mean() + c * whole.std(), rel=1e-9)
    assert torch.cat(kept(select, tensors)).tolist() == (whole >= np.float32(bound)).tolist()


def test_one_threshold_is_not_one_for_each_parameter() -> None:
    small, large = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    masks = kept(SaliencyMask(0.0), [small, large])
    assert [mask.tolist() for mask in masks] == [[False] * 3, [False, True, True]]
    alone = [kept(SaliencyMask(0.0), [tensor])[0] for tensor in (small, large)]
    assert [mask.tolist() for mask in alone] == [[False, True, True]] * 2


def test_moments_of_heavy_tails_are_exact() -> None:
    # A running float32 sum would lose the ones beside the large coordinate.
    gradient = torch.ones(300_000)
    gradient[0] = 1e8
    whole = gradient.double().numpy()
    bound = SaliencyMask(1.0).threshold([gradient], lambda i: None, torch.Generator())
    assert bound == pytest.approx(whole.mean() + whole.std(), rel=1e-12)


def test_equal_coordinates_are_all_kept() -> None:
    (mask,) = kept(SaliencyMask(0.0), [torch.full((70_001,), 0.1)])
    assert mask.all()


def test_low_precision_is_compared_in_float32() -> None:
    # 1.0039 is the mean: in bfloat16 it would be rounded down to 1, and keep every coordinate.
    (mask,) = kept(SaliencyMask(0.0), [torch.tensor([1.0, 1.0078125]).bfloat16()])
    assert mask.tolist() == [False, True]


def test_a_mask_is_applied_once() -> None:
    # The step is m g. A second backward pass into the masked gradient would make it (1 + m) g.
    model = tiny.llama()
    losses = {side: nll(model, batch) for side, batch in tiny.pairs(1)[0].items()}
    plain = [-g for g in reference.gradient(model, losses["forget"]).values()]
    Rectifier(model, None, select=SaliencyMask()).backward(objective={"forget": -1.0}, **losses)
    size = torch.cat([g.reshape(-1) for g in plain]).double().abs()
    bound = size.mean() + size.std(correction=0)
    removed = 0
    for parameter, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, torch.where(g.abs() >= bound, g, 0.0))
        removed += int((g.abs() < bound).sum())
    assert 0.5 < removed / len(size) < 1


@pytest.mark.parametrize("c", [math.nan, math.inf])
def test_the_number_of_deviations_is_finite(c: float) -> None:
    with pytest.raises(ValueError, match=r"`c` of SaliencyMask should be .*Found"):
        SaliencyMask(c)


@pytest.mark.parametrize("select", [Salient(0.5), SaliencyMask()])
def test_without_coordinates_there_is_no_threshold(select: Selection) -> None:
    for nothing in ([], [None], [torch.ones(0)]):
        assert math.isnan(select.threshold(nothing, lambda i: None, torch.Generator()))


LAYOUT = {
    "split unevenly": ((307, 61), Shard(0)),
    "empty on the second process": ((1, 7), Shard(0)),
    "whole on both": ((40, 50), None),
    "whole on both, as a DTensor": ((30, 40), Replicate()),
    "split evenly": ((20, 100), Shard(0)),
}


def made(seed: int) -> list[Tensor | None]:
    """Gradients of very different size, and one parameter without."""
    draw = torch.Generator().manual_seed(seed)
    return [
        10.0 ** (-i) * torch.randn(shape, generator=draw)
        for i, (shape, _) in enumerate(LAYOUT.values())
    ] + [None]


def spread(tensors: list[Tensor | None]) -> list[Tensor | None]:
    mesh = init_device_mesh("cpu", (two_ranks.RANKS,))
    placements = [*[placement for _, placement in LAYOUT.values()], None]
    return [
        tensor if placement is None else distribute_tensor(tensor, mesh, [placement])
        for tensor, placement in zip(tensors, placements, strict=True)
    ]


def chosen(
    select: Selection, us: list[Tensor | None], scale: list[Tensor | None]
) -> tuple[float, list[list[bool]]]:
    bound = select.threshold(us, scale.__getitem__, torch.Generator().manual_seed(1))
    masks = [select.mask(u, scale[i], bound) for i, u in enumerate(us) if u is not None]
    whole = [mask.full_tensor() if isinstance(mask, DTensor) else mask for mask in masks]
    return bound, [mask.tolist() for mask in whole]


def chosen_from_parts(select: Selection) -> tuple[float, list[list[bool]]]:
    scale = [None if s is None else s.abs() for s in made(1)]
    return chosen(select, spread(made(0)), spread(scale))


def halted_parts() -> list[list[float]]:
    us, rs = spread(made(0)), spread(made(1))
    whole = []
    for u, r in zip(us, rs, strict=True):
        if u is not None and r is not None:
            for rule in (Halt(), SAGO(0.5)):
                x = rule(u, [r])
                whole.append((x.full_tensor() if isinstance(x, DTensor) else x).tolist())
    return whole


@pytest.mark.parametrize("select", [Salient(0.1), Salient(0.9), SaliencyMask(0.5)])
def test_a_selection_is_that_of_the_whole(select: Selection) -> None:
    total = sum(u.numel() for u in made(0) if u is not None)
    assert total > SAMPLE, "the test has no sample"
    alone = chosen(select, made(0), [None if s is None else s.abs() for s in made(1)])
    for bound, masks in two_ranks.run(chosen_from_parts, select):
        assert bound == pytest.approx(alone[0], rel=1e-12)
        assert masks == alone[1]


def test_an_elementwise_rule_is_that_of_the_whole() -> None:
    alone = [
        rule(u, [r]).tolist()
        for u, r in zip(made(0), made(1), strict=True)
        if u is not None and r is not None
        for rule in (Halt(), SAGO(0.5))
    ]
    assert two_ranks.run(halted_parts) == [alone, alone]
