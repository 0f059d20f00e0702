"""What a rectifier remembers: averages beside float64, in every type, and through a file."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from geffect.costs.live_bytes import LiveBytes
from geffect.projection.kept import State
from geffect.projection.memory import NOISE, RetainMemory

EXACT, HALF = State(), State(torch.bfloat16)
Vector = Sequence[Tensor | None]


def memory(*sets: str, weight: float = 0.2, state: State = EXACT, squares: bool = True) -> Any:
    return RetainMemory(sets or ("retain",), weight, second_moment=squares, state=state)


def gradients(steps: int, *sets: str, size: int = 50) -> list[dict[str, Vector]]:
    """Heavy-tailed ones of two parameters and one that no loss reaches."""
    draw = torch.Generator().manual_seed(0)
    return [
        {
            name: [torch.randn(size, generator=draw) ** 3, None, torch.randn((), generator=draw)]
            for name in sets or ("retain",)
        }
        for _ in range(steps)
    ]


def after(steps: Sequence[Mapping[str, Vector]], **options: Any) -> Any:
    found = memory(*steps[0], **options)
    for step in steps:
        assert found.update(step) is None
    return found


def naive_average(steps: Sequence[Mapping[str, Vector]], name: str, i: int, w: float) -> Tensor:
    average = None
    for step in steps:
        tensor = step[name][i]
        new = torch.zeros(()).double() if tensor is None else tensor.double()
        average = new if average is None else w * new + (1 - w) * average
    assert average is not None
    return average


def naive_scale(steps: Sequence[Mapping[str, Vector]], i: int) -> Tensor:
    """With weights that are those of an average: they add up to one."""
    weights = [0.999**age for age in reversed(range(len(steps)))]
    mean = sum(
        weight * sum(t.double() ** 2 for vector in step.values() if (t := vector[i]) is not None)
        for weight, step in zip(weights, steps, strict=True)
    )
    return (mean / sum(weights)) ** 0.5


def kept(memory: Any) -> list[Tensor]:
    state = memory.state_dict(["a", "b", "c"])
    count, floor = state.pop("count"), state.pop("floor")
    tensors = [t.clone() for vector in state.values() for t in vector.values() if t is not None]
    return [torch.tensor([count, floor]), *tensors]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("weight", [0.05, 0.8, 1.0])
@pytest.mark.parametrize("sets", [("retain",), ("retain", "world")])
def test_averages_and_mean_squares_beside_float64(sets: tuple[str, ...], weight: float) -> None:
    steps = gradients(7, *sets)
    found = after(steps, weight=weight)
    for i in (0, 2):
        for name, average in zip(sets, found.retain(i), strict=True):
            expected = naive_average(steps, name, i, weight)
            torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(average, found.vector(name)[i])
        torch.testing.assert_close(
            found.scale(i).double(), naive_scale(steps, i), rtol=1e-5, atol=1e-6
        )
    assert found.retain(1) == [None] * len(sets) and found.scale(1) is None


@pytest.mark.parametrize("state", [EXACT, HALF, State(device="cpu")], ids=str)
def test_the_first_gradient_is_the_average_and_a_loss_that_misses_it_counts_as_zero(
    state: State,
) -> None:
    one = torch.ones(1)
    found = memory(weight=0.25, state=state)
    assert not found.ready and len(found.vector("retain")) == 0
    found.update({"retain": [4 * one, None]})
    assert found.ready and found.retain(0) == [4 * one]
    found.update({"retain": [None, 4 * one]})
    assert (found.retain(0), found.retain(1)) == ([3 * one], [one])
    assert all(t.dtype == torch.float32 for t in found.vector("retain"))


@pytest.mark.parametrize("state", [EXACT, HALF], ids=str)
def test_what_happens_to_a_gradient_later_does_not_reach_the_average(state: State) -> None:
    gradient = torch.tensor([1.0, -2.0], requires_grad=True)
    found = memory(state=state)
    found.update({"retain": [gradient]})
    gradient.data.zero_()
    assert found.retain(0)[0].tolist() == [1.0, -2.0]
    assert not found.retain(0)[0].requires_grad


def test_four_hundred_steps_of_half_precision_are_right_in_the_mean() -> None:
    # A gradient that is nearly the same in each step: nearest rounding stops long before it.
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(20_000, generator=draw)
    steps = [
        {"retain": [mean * (1 + 0.1 * torch.randn(20_000, generator=draw))]} for _ in range(400)
    ]
    steps[0]["retain"][0].mul_(3)
    (found,) = after(steps, weight=0.01, state=HALF).retain(0)
    expected = naive_average(steps, "retain", 0, 0.01)
    nearest = steps[0]["retain"][0].bfloat16()
    for step in steps[1:]:
        nearest.lerp_(step["retain"][0].bfloat16(), 0.01)
    error, of_nearest = found.double() / expected - 1, nearest.double() / expected - 1
    assert of_nearest.mean() > 0.1, "nothing is lost by nearest rounding"
    spread = float(error.std())
    assert spread < 0.03
    # The mean of the errors is zero, up to what so many independent ones leave.
    assert abs(float(error.mean())) < 5 * spread / 20_000**0.5
    # So an inner product near zero keeps its sign.
    other = torch.randn(20_000, generator=draw).double()
    other -= (other @ expected) / (expected @ expected) * expected
    for cosine in (0.002, -0.002):
        near = other / other.norm() + cosine * expected / expected.norm()
        assert (near @ found.double()) * cosine > 0


def test_the_mean_square_in_half_precision_is_right_in_the_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    steps = [{"retain": [torch.randn(20_000, generator=draw)]} for _ in range(300)]
    found = after(steps, state=HALF).scale(0).double() / naive_scale(steps, 0) - 1
    assert abs(float(found.mean())) < 2e-3
    assert found.std() < 0.05


def test_rounding_is_up_or_down_to_a_neighbour_with_the_right_odds() -> None:
    quarter = torch.full((40_000,), 1 + 2**-9)  # a quarter of the way from 1 to 1 + 2^-7
    found = after([{"retain": [torch.cat([quarter, -quarter, torch.zeros(9)])]}], state=HALF)
    above, below, zero = found.retain(0)[0].split([40_000, 40_000, 9])
    for side in (above, -below):
        assert set(side.tolist()) == {1.0, 1 + 2**-7}
        assert float((side > 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert not zero.any()


@pytest.mark.parametrize("squares", [False, True])
def test_random_bits_are_its_own_and_the_same_on_another_process(squares: bool) -> None:
    steps = gradients(5)
    before = torch.get_rng_state()
    first = after(steps, state=HALF, squares=squares)
    torch.manual_seed(17)
    second = after(steps, state=HALF, squares=squares)
    torch.set_rng_state(before)
    after(steps, state=HALF, squares=squares)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(kept(first), kept(second))


def test_an_update_in_float32_makes_no_tensor() -> None:
    steps = gradients(3, "retain", "world", size=10_000)
    found = after(steps[:2])
    with LiveBytes() as live:
        found.update(steps[2])
    assert live.peak < 1000


def test_a_state_of_half_precision_takes_half_and_a_tensor_for_the_moment() -> None:
    steps = [{"retain": [torch.ones(10_000) for _ in range(8)]} for _ in range(2)]
    with LiveBytes() as live:
        found = after(steps, state=HALF, squares=False)
        held = live.now
    assert found.ready and held == pytest.approx(8 * 20_000, abs=1000)
    assert live.peak <= 8 * 20_000 + 3 * 40_000 + 1000


WRONG = {
    "zero": torch.zeros(3),
    "not finite": torch.tensor([1.0, torch.inf, 0.0]),
    "not finite because of nan": torch.tensor([torch.nan, 0.0, 0.0]),
    "not finite in float32": torch.full((3,), 1e300, dtype=torch.float64),
    "zero in float32": torch.full((3,), 1e-300, dtype=torch.float64),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("state", [EXACT, HALF], ids=str)
def test_a_gradient_that_says_nothing_is_left_out_whole(wrong: str, state: State) -> None:
    found = after([{"retain": [torch.ones(3)], "world": [torch.ones(3)]}], state=state)
    before = kept_of_one(found)
    problem = found.update({"retain": [torch.ones(3)], "world": [WRONG[wrong]]})
    reason = "zero" if wrong.startswith("zero") else "not finite"
    assert problem == f"{reason} for `world`"
    assert same(kept_of_one(found), before)
    assert memory().update({"retain": [WRONG[wrong]]}) == reason


def kept_of_one(memory: Any) -> list[Tensor]:
    state = memory.state_dict(["a"])
    count, floor = state.pop("count"), state.pop("floor")
    return [torch.tensor([count, floor]), *[vector["a"].clone() for vector in state.values()]]


def test_noise_is_measured_by_the_objective_gradient_of_the_step_that_averages_began_in() -> None:
    one = torch.ones(3)
    found = memory()
    for size in (1e-12, 1e-9):
        assert found.update({"retain": [size * one]}) is None
        assert found.compares and found.compare(0.1) == NOISE
        assert not found.ready and found.retain(0) == [None] and found.scale(0) is None
    found.update({"retain": [1e-6 * one]})
    assert found.compare(0.1) is None and not found.compares
    before = kept_of_one(found)
    assert found.update({"retain": [1e-9 * one]}) == NOISE
    assert same(kept_of_one(found), before)
    assert found.update({"retain": [2e-8 * one]}) is None
    assert same(found.retain(0), after([{"retain": [s * one]} for s in (1e-6, 2e-8)]).retain(0))


@pytest.mark.parametrize("largest", [0.0, float("inf"), float("nan")])
def test_an_objective_gradient_that_says_nothing_makes_no_noise(largest: float) -> None:
    one = torch.ones(3)
    found = after([{"retain": [1e-20 * one]}])
    assert found.compare(largest) is None and found.ready and found.compares
    found.update({"retain": [one]})
    assert found.compare(1.0) is None and found.ready and not found.compares
    assert found.update({"retain": [1e-20 * one]}) == NOISE


def test_of_several_sets_one_that_is_noise_leaves_all_out() -> None:
    found = after([{"retain": [torch.ones(3)], "world": [torch.full((3,), 1e-9)]}])
    assert found.compare(1.0) == NOISE and not found.ready
    found.update({"retain": [torch.ones(3)], "world": [torch.ones(3)]})
    assert found.compare(1.0) is None
    sizes = {"retain": [torch.ones(3)], "world": [torch.full((3,), 1e-9)]}
    assert found.update(sizes) == f"{NOISE} for `world`"


def test_a_gradient_of_nothing_is_zero() -> None:
    assert memory().update({"retain": [None, torch.zeros(0)]}) == "zero"


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradients_of_every_size_are_taken_in(size: float) -> None:
    found = after([{"retain": [torch.full((3,), size)]}] * 2, squares=False)
    torch.testing.assert_close(found.retain(0)[0], torch.full((3,), size))


def test_without_agreement_only_what_is_not_finite_is_left_out() -> None:
    found = memory()
    assert found.update({"retain": [torch.tensor([torch.nan])]}, agree=False) == "not finite"
    assert not found.ready
    assert found.update({"retain": [torch.zeros(1)]}, agree=False) is None
    assert found.ready and found.retain(0) == [torch.zeros(1)]


PARAMETERS = {"a": torch.ones(50), "b": torch.ones(2, 2), "c": torch.ones(())}


@pytest.mark.parametrize("state", [EXACT, HALF, State(torch.bfloat16, "cpu")], ids=str)
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("stop", [0, 3])
def test_a_run_that_was_resumed_equals_the_one_that_was_not(
    state: State, squares: bool, stop: int
) -> None:
    steps = gradients(6, "retain", "world")
    unbroken = after(steps, state=state, squares=squares)
    first = memory("retain", "world", state=state, squares=squares)
    for step in steps[:stop]:
        first.update(step)
    file = io.BytesIO()
    torch.save(first.state_dict(list(PARAMETERS)), file)
    file.seek(0)
    second = memory("retain", "world", state=state, squares=squares)
    second.load_state_dict(torch.load(file, weights_only=True), PARAMETERS)
    assert second.ready is first.ready
    for step in steps[stop:]:
        second.update(step)
    assert same(kept(second), kept(unbroken))


def test_what_was_loaded_is_a_copy_and_goes_on_with_another_weight() -> None:
    steps = gradients(2)
    first, second = after(steps[:1]), memory(weight=1.0)
    second.load_state_dict(first.state_dict(list(PARAMETERS)), PARAMETERS)
    second.update(steps[1])
    assert torch.equal(first.retain(0)[0], steps[0]["retain"][0])
    assert torch.equal(second.retain(0)[0], steps[1]["retain"][0])


def test_a_state_of_another_rectifier_or_model_is_refused_and_changes_nothing() -> None:
    state = after(gradients(2)).state_dict(list(PARAMETERS))
    found = after(gradients(3))
    before = kept(found)
    wrong: list[tuple[Any, dict[str, Tensor], str]] = [
        (
            memory("world"),
            PARAMETERS,
            r"should hold .*average.world.* Found .*average.retain`, .*Make",
        ),
        (memory(squares=False), PARAMETERS, r"should hold .* Found .*second_moment.* Make"),
        (found, {**PARAMETERS, "d": torch.ones(1)}, r"missing are `d`; unknown are none"),
        (found, {"a": torch.ones(50)}, r"missing are none; unknown are `b`, `c`. Load"),
        (found, {**PARAMETERS, "a": torch.ones(51)}, r"Found \(50,\) for `a`, which has \(51,\)"),
    ]
    for refusing, parameters, message in wrong:
        with pytest.raises(ValueError, match=message):
            refusing.load_state_dict(state, parameters)
    assert same(kept(found), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, r"`dtype` of State should be .* Found `torch.float16`. Choose"),
        ({"device": "cuda"}, r"`device` of State should be .* Found `'cuda'`. Choose"),
    ],
)
def test_a_state_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        State(**options)
