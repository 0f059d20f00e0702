"""The gradient at a relearned copy, beside plain autograd and a loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, Relearned, relearned
from geffect.gradients import differentiate
from geffect.layers import trainable
from tests.utils import tiny, two_ranks
from tests.utils.far_device import Counted, Spread, moved_far
from tests.utils.interrupts import grads_of, hooks_left, interrupted_at_line, same
from tests.utils.layouts import LAYOUTS, Small
from tests.utils.models import bits

UNITS = ("theta", "length", "loss")


class Net(nn.Module):
    """Tied weights, a frozen part, dropout and running statistics."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.last = nn.Linear(4, 3)
        self.last.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.again(torch.tanh(self.first(x))))))


def rows(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x).float().square().mean()


def flat(tensors: Any) -> Tensor:
    return torch.cat(
        [torch.zeros(0, dtype=torch.float64), *(t.double().flatten() for t in tensors)]
    )


def naive(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, lengths: Callable[..., float]
) -> list[Tensor]:
    """The parameters after normalised steps, by a loop; they stay moved."""
    moved = list(trainable(model).values())
    for step in range(steps):
        value = loss()
        gradient = torch.autograd.grad(value, moved)
        norm = flat(gradient).norm().item()
        length = lengths(step, value.item(), norm)
        with torch.no_grad():
            for parameter, part in zip(moved, gradient, strict=True):
                parameter -= length / norm * part
    return [parameter.detach().clone() for parameter in moved]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_those_of_a_loop(unit: Any, steps: int) -> None:
    model, twin = Net().eval(), Net().eval()
    asked: list[int] = []

    def loss() -> Tensor:
        asked.append(1)
        return of(model, rows())()

    theta = flat(trainable(model).values()).norm().item()
    first = loss().item()
    lengths = {
        "theta": lambda step, value, norm: 0.1 * theta / steps,
        "length": lambda step, value, norm: 0.1 / steps,
        "loss": lambda step, value, norm: (value - first * (1 - 0.1 * (step + 1) / steps)) / norm,
    }[unit]
    expected = naive(twin, of(twin, rows()), steps, lengths)
    (of(twin, rows(1))()).backward()
    before = flat(trainable(model).values())
    asked.clear()
    with relearned(model, loss, radius=0.1, steps=steps, unit=unit) as copy:
        assert len(asked) == steps  # no other pass is made
        torch.testing.assert_close(
            flat(trainable(model).values()), flat(expected), rtol=1e-10, atol=1e-12
        )
        of(model, rows(1))().backward()
    assert copy.losses[0] == first
    assert copy.length == pytest.approx((flat(expected) - before).norm().item(), rel=1e-9)
    for own, other in zip(trainable(model).values(), trainable(twin).values(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert model.last.bias.grad is None


def test_by_effect_the_loss_falls_by_its_share() -> None:
    model = Net().eval()
    loss = of(model, rows())
    first = loss().item()
    with relearned(model, loss, radius=0.5, steps=15, unit="loss"):
        assert loss().item() == pytest.approx(first / 2, rel=0.05)


@pytest.mark.parametrize("options", [{"radius": 0.0}, {"radius": 0.3, "steps": 0}])
def test_without_a_radius_nothing_changes(options: dict[str, Any]) -> None:
    plain, model = Net(), Net()
    for own in (plain, model):
        torch.manual_seed(3)
        if own is plain:
            of(own, rows())().backward()
        else:
            with relearned(own, lambda: pytest.fail("asked"), **options) as copy:
                of(own, rows())().backward()
            assert (copy.losses, copy.length) == ((), 0.0)
        own.drawn = torch.rand(2)
    assert same(grads_of(plain), grads_of(model))
    assert bits(plain) == bits(model)
    assert torch.equal(plain.drawn, model.drawn)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_is_put_back(error: type[BaseException] | None, dtype: torch.dtype) -> None:
    model = Net(dtype)
    x = rows(dtype=dtype)
    of(model, x)().backward()
    before, grads = bits(model), [p.grad for p in model.parameters()]
    kept = grads_of(model)
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    try:
        with relearned(model, of(model, x), radius=0.1):
            assert bits(model) != before
            assert torch.equal(torch.rand(2), drawn)  # the block draws what it would have drawn
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    assert bits(model) == before
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert same(grads_of(model), kept)
    assert model.training
    assert not hooks_left(model)


def test_an_interrupt_anywhere_leaves_all_as_it_was() -> None:
    model = nn.Linear(3, 2)
    x, before = torch.ones(2, 3), bits(model)

    def block() -> None:
        with relearned(model, of(model, x), radius=0.5, steps=1):
            pass

    block()  # what is loaded or remembered at first
    with interrupted_at_line(0, KeyboardInterrupt) as lines:
        block()
    end = lines[0] - 40  # where all is put back; of what is before, some lines
    for number in [*range(1, end, 160), *range(end, lines[0] + 1)]:
        with pytest.raises(KeyboardInterrupt), interrupted_at_line(number, KeyboardInterrupt):
            block()
        assert bits(model) == before
        assert all(p.grad is None for p in model.parameters())
        assert not hooks_left(model)


def test_one_step_has_the_length_of_the_radius_and_goes_down() -> None:
    model = Net().eval()
    loss = of(model, rows())
    moving = list(trainable(model).values())
    gradient = flat(torch.autograd.grad(loss(), moving))
    before, frozen = flat(moving), model.last.bias.clone()
    with relearned(model, loss, radius=0.2, steps=1, unit="length") as copy:
        way = flat(moving) - before
        assert torch.equal(model.last.bias, frozen)
    assert way.norm().item() == pytest.approx(0.2, rel=1e-6)
    assert copy.length == pytest.approx(0.2, rel=1e-6)
    assert (way @ gradient).item() == pytest.approx(-0.2 * gradient.norm().item(), rel=1e-6)


@pytest.mark.parametrize("radius", [0.1, 10.0])
def test_linear_and_quadratic_losses(radius: float) -> None:
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    theta = model.weight
    matrix = torch.tensor([[3.0, 1, 0], [1, 2, 0], [0, 0, 1]], dtype=torch.float64)
    at_theta = theta.detach().clone()
    with relearned(model, lambda: model(matrix).sum(), radius=radius, unit="length"):
        (linear,) = torch.autograd.grad(model(matrix).sum(), theta)
    torch.testing.assert_close(linear, matrix.sum(0, keepdim=True))

    def quadratic() -> Tensor:
        return (theta @ matrix @ theta.T).sum() / 2

    with relearned(model, quadratic, radius=radius, steps=1, unit="length"):
        (found,) = torch.autograd.grad(quadratic(), theta)
    gradient = at_theta @ matrix
    torch.testing.assert_close(found, (at_theta - radius * gradient / gradient.norm()) @ matrix)


def test_a_rectifier_takes_the_retain_gradient_at_theta() -> None:
    model = Net().eval()
    parameters = list(trainable(model).values())
    forget, retain = of(model, rows(1)), of(model, rows(2))
    r = flat(torch.autograd.grad(retain(), parameters, allow_unused=True))
    with relearned(model, forget, radius=0.2):
        u = flat(torch.autograd.grad(-forget(), parameters))
    assert u @ r < 0
    rectifier = Rectifier(model)
    rectifier.observe(differentiate(parameters, {"retain": retain}))
    with relearned(model, forget, radius=0.2):
        gradients = differentiate(parameters, {"objective": lambda: -forget()})
    rectifier.rectify(gradients)
    torch.testing.assert_close(flat(p.grad for p in parameters), u - (u @ r) / (r @ r) * r)
    assert rectifier.report is not None
    torch.testing.assert_close(rectifier.report.retain_norm[0], r.norm().item())


def test_half_precision_moves_in_float32() -> None:
    model, fine = Net(torch.bfloat16).eval(), Net(torch.bfloat16).eval().float()
    x = rows(dtype=torch.bfloat16)
    before = flat(trainable(model).values())
    with relearned(model, of(model, x), radius=0.1, steps=10) as copy:
        way = flat(trainable(model).values()) - before
    with relearned(fine, of(fine, x.float()), radius=0.1, steps=10) as other:
        expected = flat(trainable(fine).values()) - before
    assert copy.length == pytest.approx(way.norm().item(), rel=1e-6)
    assert copy.length == pytest.approx(other.length, rel=0.1)  # each step alone is rounded away
    assert nn.functional.cosine_similarity(way, expected, dim=0) > 0.95


def test_the_copy_may_lie_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the device is waited for once for each tensor that leaves it."""
    # The device of these tests has the name of one that parameters cannot move on.
    monkeypatch.setattr("geffect.relearning.at_copy.check_can_relearn", lambda m: [*m.parameters()])
    models = [Spread(3) for _ in range(3)]
    ends, counts = [], []
    for model, device in zip(models, (None, None, "cpu"), strict=True):
        if model is not models[0]:
            moved_far(model)
        before = [p.detach().cpu().clone() for p in model.parameters()]
        with Counted() as counted:
            way = Relearned(radius=0.1, steps=2, device=device)
            with way.block(model, lambda model=model: model.losses()["forget"]):
                ends.append([p.detach().cpu().clone() for p in model.parameters()])
        counts.append(counted)
        after = [p.detach().cpu() for p in model.parameters()]
        assert all(map(torch.equal, before, after))
        assert not any(map(torch.equal, before, ends[-1]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])
    beside, away = counts[1:]
    assert away.waits["_to_copy"] - beside.waits["_to_copy"] == 3


def test_steps_that_are_added_again_give_not_every_bit_back() -> None:
    """Why there is a copy."""
    model = nn.Linear(40, 30)
    before, gradient = model.weight.detach().clone(), torch.randn(30, 40)
    there = before - 0.01 * gradient
    assert not torch.equal(there + 0.01 * gradient, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_way_that_rounding_takes_is_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    radius = torch.finfo(dtype).eps / 300
    with (
        pytest.warns(UserWarning, match="rounding takes most of the way") as warned,
        relearned(model, of(model, rows(dtype=dtype)), radius=radius),
    ):
        pass
    assert warned[0].filename == __file__


def test_steps_that_turn_back_are_told() -> None:
    model = nn.Linear(1, 1, bias=False)

    def away() -> Tensor:
        return model(torch.ones(1)).abs().sum()

    with (
        pytest.warns(UserWarning, match="or steps turn back"),
        relearned(model, away, radius=4.0, steps=4, unit="length") as copy,
    ):
        assert copy.length < 1e-6


def test_a_scaler_and_autocast_change_little() -> None:
    model = Net(torch.float32).eval()
    x = rows(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = flat(trainable(model).values())
    with relearned(model, of(model, x), radius=0.1, steps=2):
        expected = flat(trainable(model).values()) - before
    with torch.autocast("cpu", torch.bfloat16):
        of(model, x)()  # what is cast here is not what is cast there
        with relearned(model, of(model, x), radius=0.1, steps=2, scaler=scaler):
            way = flat(trainable(model).values()) - before
            inside = model(x)
        outside = model(x)
    assert nn.functional.cosine_similarity(way, expected, dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outside, model(x))
    assert not torch.equal(outside, inside)


@pytest.mark.parametrize("scale", [2.0**14, 2.0**60, float("inf")])
def test_a_scaler_keeps_what_float16_would_lose(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).half()
    x, before = rows(dtype=torch.float16), flat(model.parameters())

    def small() -> Tensor:
        return model(x).square().float().mean() * 1e-7

    fine = nn.Linear(4, 3)
    fine.load_state_dict(model.state_dict())
    gradient = torch.autograd.grad(fine(x.float()).square().mean(), list(fine.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with relearned(model, small, radius=0.1, steps=1, unit="loss", scaler=scaler) as copy:
        way = flat(model.parameters()) - before
    assert nn.functional.cosine_similarity(way, -flat(gradient), dim=0) > 0.999
    scaled = 1e7 * copy.losses[0]
    assert copy.length == pytest.approx(0.1 * scaled / flat(gradient).norm().item(), rel=0.02)


def test_a_loss_that_cannot_fall_moves_nothing() -> None:
    model = nn.Linear(2, 1)
    with (
        pytest.warns(UserWarning, match="The gradient of the relearning loss should not be 0"),
        relearned(model, lambda: 0 * model(torch.ones(2)).sum(), radius=0.1) as copy,
    ):
        assert copy.losses == ()


def test_what_goes_beyond_the_block_is_refused(tmp_path: Any) -> None:
    model = Net()
    loss = of(model, rows())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = bits(Net().eval())
    with relearned(model, loss, radius=0.1):
        late = {"logits": model(rows())}["logits"].sum()
        with pytest.raises(RuntimeError, match="No step should be taken at a relearned copy"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="No step should be taken at a relearned copy"):
            Rectifier(model).backward(objective=lambda: -loss(), retain=loss)
        with (
            pytest.raises(RuntimeError, match="No step should be taken at a relearned copy"),
            Recorder(model, tmp_path / "a.h5") as recorder,
        ):
            recorder.backward(objective=loss)
        with (
            pytest.raises(RuntimeError, match="No step should be taken at a relearned copy"),
            relearned(model, loss, radius=0.1),
        ):
            pass
    with pytest.raises(RuntimeError, match="should be taken inside of the block"):
        late.backward()
    optimizer.step()
    assert {k: v for k, v in bits(model).items() if "norm" not in k} == {
        k: v for k, v in before.items() if "norm" not in k
    }


def test_a_loss_that_takes_the_copy_with_it_is_refused() -> None:
    model = Net().eval()
    parameters = list(trainable(model).values())

    def loss() -> Tensor:
        with relearned(model, of(model, rows()), radius=0.1):
            return -of(model, rows(1))()

    with pytest.raises(RuntimeError, match="should"):
        differentiate(parameters, {"objective": loss})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"radius": -1.0}, "`radius` should be a number from 0, in units of `theta`. Found -1.0"),
        ({"radius": float("nan")}, "`radius` should be a number"),
        ({"radius": 1.5, "unit": "loss"}, "`radius` should be a number from 0 to 1"),
        ({"radius": 0.1, "unit": "norm"}, "`unit` should be one of theta, length, loss"),
        ({"radius": 0.1, "steps": -1}, "`steps` should be a whole number"),
        ({"radius": 0.1, "steps": True}, "`steps` should be a whole number"),
        ({"radius": 0.1, "device": "gpu"}, "`device` should be one of this machine"),
    ],
)
def test_ways_that_are_none(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Relearned(**options)
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=says), relearned(model, lambda: None, **options):  # type: ignore[arg-type,return-value]
        pass


def test_losses_and_models_that_are_none() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    x = torch.ones(2)

    def refused(error: type[Exception], says: str, loss: Any, own: Any = model, **o: Any) -> None:
        with pytest.raises(error, match=says), relearned(own, loss, **{"radius": 0.1} | o):
            pytest.fail("entered")

    refused(TypeError, "`loss` should be a function", model(x).sum())
    refused(TypeError, "given by a function without arguments", lambda batch: model(batch).sum())
    refused(TypeError, "`model` should be a torch.nn.Module", lambda: model(x).sum(), 3)
    refused(ValueError, "should be computed with the model", lambda: other(x).sum())
    refused(ValueError, "should be finite", lambda: model(x).sum() * float("nan"))
    refused(ValueError, "The loss should be above 0", lambda: -model(x).square().sum(), unit="loss")
    nn.init.zeros_(other.weight), nn.init.zeros_(other.bias)
    refused(ValueError, "parameters should not all be 0", lambda: other(x).sum(), other)
    refused(ValueError, "offloaded", lambda: other(x).sum(), nn.Linear(2, 1, device="meta"))


def test_adapters_move_alone() -> None:
    model = Small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    ids = tiny.batch(0)["input_ids"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with relearned(model, lambda: model(ids).square().mean(), radius=0.1):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}


def at_a_copy(layout: str | None, part: slice) -> list[Tensor]:
    """The gradient at a copy, whole."""
    model: nn.Module = Small()
    if layout is not None:
        model = LAYOUTS[layout](model)
    ids = tiny.batch(0, rows=4)["input_ids"][part]

    def loss() -> Tensor:
        return model(ids).square().mean()

    before = [p.detach().clone() for p in trainable(model).values()]
    model(ids)  # FSDP2 leaves its parameters whole until a backward pass
    with relearned(model, loss, radius=0.05, steps=2):
        model(ids)
        loss().backward()
    assert all(map(torch.equal, before, (p.detach() for p in trainable(model).values())))
    found = [p.grad for p in trainable(model).values()]
    return [getattr(g, "full_tensor", lambda own=g: own)() for g in found if g is not None]


def on_a_rank(layout: str) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    return at_a_copy(layout, slice(2 * rank, 2 * rank + 2))


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_are_as_one(layout: str) -> None:
    expected = at_a_copy(None, slice(None))
    for found in two_ranks.run(on_a_rank, layout):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
