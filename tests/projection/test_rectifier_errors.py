"""What a rectifier makes of bad input: one clear error, or a step as if it had not been there."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from geffect import Rectifier
from geffect.gradients import differentiate
from geffect.projection import Elementwise, nearest
from tests.utils.network import network, risk
from tests.utils.trainers import same

LR = 0.1

PLACES: dict[str, dict[str, Any]] = {
    "gradient": {"space": "gradient"},
    "gradient, layer": {"space": "gradient", "scope": "layer"},
    "gradient, select": {"space": "gradient", "select": 0.5},
    "update": {"space": "update"},
    "update, retain_adam": {"space": "update", "correction": "retain_adam"},
    "update, coordinate": {"space": "update", "scope": "coordinate"},
    "several": {"space": "gradient", "rule": nearest, "protect": ("retain", "world")},
}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR)


def zero(model: nn.Module) -> Tensor:
    """A finite loss whose gradient is zero."""
    return 0.0 * risk(model, 1)


def infinite(model: nn.Module) -> Tensor:
    """A finite loss whose gradient is infinite: a square root at zero."""
    return sum((p - p.detach()).sum().sqrt() for p in model.parameters())


def not_a_number(model: nn.Module) -> Tensor:
    """A finite loss whose gradient is not a number: infinity times zero."""
    return sum(((p - p.detach()) ** 2).sum().sqrt() for p in model.parameters())


BAD: dict[str, tuple[Callable[[nn.Module], Tensor], str]] = {
    "zero": (zero, "zero"),
    "infinite": (infinite, "not finite"),
    "nan": (not_a_number, "not finite"),
}


def made(place: str, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Rectifier:
    rectifier = Rectifier(model, **PLACES[place])
    if rectifier.needs_optimizer and optimizer is not None:
        rectifier.attach(optimizer)
    return rectifier


def backward(
    rectifier: Rectifier, model: nn.Module, *, retain: Tensor | None = None, **options: Any
) -> None:
    """A step whose retain gradient would conflict, if it were not for what is passed."""
    losses: dict[str, Any] = {
        "objective": -risk(model, 0),
        "retain": risk(model, 1) if retain is None else retain,
    }
    if "world" in str(rectifier.options["protect"]):
        losses["world"] = risk(model, 2)
    rectifier.backward(**losses, **options)


def stepped(rectifier: Rectifier, model: nn.Module, optimizer: Any, **options: Any) -> None:
    backward(rectifier, model, **options)
    optimizer.step()
    model.zero_grad()


# A retain gradient that is none.


def selected(place: str, model: nn.Module) -> None:
    """What a selection leaves of `.grad` without a mean square: the half that is largest."""
    if "select" not in place:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    lengths = torch.cat([grad.abs().flatten() for grad in grads])
    least = lengths.quantile(0.5, interpolation="higher")
    assert 0.4 <= (lengths >= least).float().mean() <= 0.6
    for grad in grads:
        grad[grad.abs() < least] = 0.0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_a_retain_gradient_that_is_none_rectifies_nothing(place: str, bad: str) -> None:
    """The step is the plain one, and the average is that of a rectifier which comes after it.

    A selection of coordinates holds all the same.
    """
    loss, word = BAD[bad]
    model, plain = network(), network()
    optimizer, other = adamw(model), adamw(plain)
    rectifier = made(place, model, optimizer)
    said = rf"A step was not rectified: the retain gradient is {word}.* Rectifier\.skipped counts"
    with pytest.warns(UserWarning, match=said) as warned:
        stepped(rectifier, model, optimizer, retain=loss(model))
        assert len(warned) == 1
    assert rectifier.skipped == 1
    report = rectifier.report
    assert report is not None
    assert set(report.fired) == {float("select" in place)}
    assert all(value != value for value in report.inner_before)
    (-risk(plain, 0)).backward()
    selected(place, plain)
    other.step()
    other.zero_grad()
    assert same(model.state_dict(), plain.state_dict())
    after = made(place, plain, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(rectifier, model, optimizer)
        stepped(after, plain, other)
        assert same(model.state_dict(), plain.state_dict())
        assert rectifier.skipped == 1
        stepped(rectifier, model, optimizer, retain=loss(model))  # said once, counted twice
    assert rectifier.skipped == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_one_bad_micro_batch_makes_a_bad_step(place: str) -> None:
    model, plain = network(), network()
    optimizer, other = adamw(model), adamw(plain)
    rectifier = made(place, model, optimizer)
    backward(rectifier, model, accumulate=True)
    with pytest.warns(UserWarning, match="the retain gradient is not finite"):
        stepped(rectifier, model, optimizer, retain=not_a_number(model))
    for _ in range(2):
        (-risk(plain, 0)).backward()
    selected(place, plain)
    other.step()
    assert same(model.state_dict(), plain.state_dict())
    backward(rectifier, model, retain=zero(model), accumulate=True)  # others are none
    stepped(rectifier, model, optimizer)
    assert rectifier.skipped == 1


@pytest.mark.parametrize("place", PLACES)
def test_an_objective_without_gradient_leaves_the_average_as_it_should_be(place: str) -> None:
    """Its gradient is not finite: the optimizer's to deal with, as it is without a rectifier."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rectifier = made(place, model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stepped(rectifier, model, optimizer)
        before = copy.deepcopy(model.state_dict())
        losses = {"retain": risk(model, 1), "world": risk(model, 2)}
        rectifier.backward(objective=infinite(model), **losses)
    assert all(p.grad is not None and not bool(p.grad.isfinite().any()) for p in model.parameters())
    optimizer.zero_grad()
    assert same(before, model.state_dict())
    for average in rectifier.watched.values():
        assert all(t is not None and bool(t.isfinite().all()) for t in average)


# Optimizers.


@pytest.mark.parametrize("place", [place for place in PLACES if "update" in place])
def test_the_optimizer_of_another_model(place: str) -> None:
    model, foreign = network(), adamw(network())
    said = r"`optimizer` should step the parameters of `model`\. Found .* Make it from"
    with pytest.raises(ValueError, match=said):
        Rectifier(model, **PLACES[place], optimizer=foreign)
    rectifier = made(place, model, None)
    with pytest.raises(ValueError, match=said):
        rectifier.attach(foreign)
    made(place, model, adamw(model))  # which is none that anybody else has
    foreign.step()


@pytest.mark.parametrize("place", [place for place in PLACES if "update" in place])
def test_no_optimizer_at_all(place: str) -> None:
    model = network()
    rectifier = made(place, model, None)
    said = r"`optimizer` should be given .* Found none\. Pass Rectifier\(.*optimizer=optimizer\)"
    with pytest.raises(ValueError, match=said):
        backward(rectifier, model)
    assert all(p.grad is None for p in model.parameters())
    not_one: Any = model
    with pytest.raises(ValueError, match=r"should be a torch optimizer\. Found `Sequential`"):
        rectifier.attach(not_one)


class Wrapped(torch.optim.Optimizer):
    """One that leaves the rest to the optimizer inside of it, as many wrappers do."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside, self.param_groups = inside, inside.param_groups


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_a_wrapper_whose_steps_cannot_be_followed(space: Any) -> None:
    model = network()
    said = r"made by `torch.optim.Optimizer.__init__`.* Found `Wrapped`.* Pass the optimizer inside"
    with pytest.raises(ValueError, match=said):
        Rectifier(model, space=space, optimizer=Wrapped(adamw(model)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("foreign", [True, False])
def test_a_parameter_group_added_later(place: str, foreign: bool) -> None:
    """Of tensors that the rectifier does not know: it could not keep them from doing harm."""
    model = network()
    if not foreign:
        model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    rectifier = made(place, model, optimizer)
    stepped(rectifier, model, optimizer)
    if foreign:
        added = [nn.Parameter(torch.ones(2))]
        added[0].grad = torch.ones(2)
    else:
        added = list(model[0].requires_grad_(True).parameters())
    optimizer.add_param_group({"params": added})
    before = copy.deepcopy([*model.parameters(), *added])
    if foreign and not rectifier.needs_optimizer:
        stepped(rectifier, model, optimizer)  # a gradient that is none of the rectifier's
        return
    with pytest.raises(ValueError, match=r"should .* Found .*"):
        stepped(rectifier, model, optimizer)
    assert same(before, [*model.parameters(), *added])


def test_a_group_of_parameters_that_it_knows_may_come_later() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=LR)
    rectifier = Rectifier(model, space="update", optimizer=optimizer, measure_update=True)
    stepped(rectifier, model, optimizer)
    optimizer.add_param_group({"params": model[2].parameters()})
    before = copy.deepcopy(model[2].state_dict())
    for _ in range(3):
        stepped(rectifier, model, optimizer)
        assert rectifier.report is not None
        assert rectifier.report.applied_average[0] >= -1e-7
    assert not same(before, model[2].state_dict())


@pytest.mark.parametrize("place", [place for place in PLACES if "update" in place])
def test_a_closure(place: str) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    rectifier = made(place, model, optimizer)
    backward(rectifier, model)
    before = copy.deepcopy(model.state_dict())
    said = r"should be called without a closure .* Found a closure given to Adam.* or detach\(\)"
    for call in (
        lambda: optimizer.step(lambda: risk(model, 0)),
        lambda: optimizer.step(closure=lambda: risk(model, 0)),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert same(before, model.state_dict())
    rectifier.detach()
    optimizer.step(lambda: risk(model, 0))


@pytest.mark.parametrize("place", [place for place in PLACES if "update" in place])
def test_an_optimizer_that_needs_a_closure(place: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"should need no closure.* Found LBFGS.* such as AdamW"):
        made(place, model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    ("climbs", "said"),
    [
        (
            {"maximize": True},
            r"`maximize` of SGD should be False.* Found `maximize = True`.* Negate the loss",
        ),
        ({"lr": -LR}, r"rate of SGD should not be negative.* Found -.* Negate the loss"),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_an_optimizer_that_climbs(place: str, climbs: dict[str, Any], said: str) -> None:
    """Its steps go up along a gradient, so that what is guarded would be the wrong side."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.param_groups[0].update(climbs)
    rectifier = made(place, model, None)
    with pytest.raises(ValueError, match=said):
        rectifier.attach(optimizer)
    with pytest.raises(ValueError, match=said):
        Rectifier(model, **PLACES[place], optimizer=optimizer)
    optimizer.param_groups[0].update(maximize=False, lr=LR)
    rectifier.attach(optimizer)
    optimizer.param_groups[0].update(climbs)  # found out before anything is taken in
    with pytest.raises(ValueError, match=said):
        backward(rectifier, model)
    assert all(p.grad is None for p in model.parameters())
    assert not rectifier._memory.ready


def test_an_optimizer_that_climbs_and_was_never_attached() -> None:
    """It takes the rectified gradient all the same, so it is found out before it moves anything."""
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, maximize=True)
    rectifier = Rectifier(model)
    backward(rectifier, model)
    before = copy.deepcopy(model.state_dict())
    risk(other, 0).backward()  # somebody else's step is none of its business
    torch.optim.SGD(other.parameters(), lr=LR, maximize=True).step()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`maximize` of SGD should be False.* Negate the"):
            optimizer.step()
    assert same(before, model.state_dict())
    optimizer.param_groups[0]["maximize"] = False
    optimizer.step()
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()  # no rectified gradient is waiting: a step of the user's own


def test_a_step_that_was_not_observed() -> None:
    model = network()
    gradients = differentiate([*model.parameters()], {"objective": risk(model, 0)})
    with pytest.raises(ValueError, match=r"`observe` should be called before .* Found no step"):
        Rectifier(model).rectify(gradients)
    assert all(p.grad is None for p in model.parameters())


def test_two_rectifiers_on_one_optimizer() -> None:
    model = network()
    optimizer = adamw(model)
    Accelerator(cpu=True)
    first = Rectifier(model, space="update", optimizer=optimizer)
    said = r"An optimizer should have one rectifier\. Found another .* Call detach\(\)"
    for given in (optimizer, AcceleratedOptimizer(optimizer)):
        with pytest.raises(ValueError, match=said):
            Rectifier(model, space="update", optimizer=given)
    with pytest.raises(ValueError, match=said):
        second = Rectifier(model, space="update", optimizer=(other := adamw(model)))
        second.attach(optimizer)
    stepped(second, model, other)  # still where it was
    assert second.report is not None
    second.detach()
    first.attach(optimizer)  # once more the same
    first.detach()
    second = Rectifier(model, space="update", optimizer=optimizer)
    stepped(second, model, optimizer)
    assert second.report is not None
    assert first.report is None


def test_two_rectifiers_on_one_gradient() -> None:
    model = network()
    first, second = Rectifier(model), Rectifier(model, scope="layer")
    backward(first, model)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match=r"`\.grad` should be empty .* Found gradients of an ear"):
        backward(second, model)
    assert same(before, [p.grad for p in model.parameters()])


# Checkpoints.


def of_others() -> dict[str, Any]:
    """What is loaded instead of the state of a rectifier of the same model, and what is said."""

    def state(model: nn.Module, **options: Any) -> dict[str, Any]:
        rectifier = Rectifier(model, **options)
        backward(rectifier, model)
        return rectifier.state_dict()

    part = network()
    part[0].requires_grad_(False)
    whole = state(network())
    return {
        "shapes": (
            state(network(width=5)),
            r"shapes of this model.* Found \(5, 3\) for `0\.weight`",
        ),
        "names": (state(nn.Sequential(nn.Identity(), *network())), r"parameters of this model"),
        "fewer": (state(part), r"parameters of this model.* missing are `0\.weight`"),
        "options": (state(network(), ema=0.5), r"set up as the one whose state it takes.*0\.5"),
        "format": ({**whole, "format": 99}, r"should have format 2\. Found 99"),
        "saved before": ({**whole, "format": 1}, r"should have format 2\. Found 1\. Pass what"),
        "none of it": (network().state_dict(), r"should have format 2\. Found None"),
    }


@pytest.mark.parametrize("name", of_others())
def test_a_checkpoint_of_another_model(name: str) -> None:
    foreign, said = of_others()[name]
    model = network()
    rectifier = Rectifier(model)
    backward(rectifier, model)
    before = copy.deepcopy(rectifier.state_dict())
    with pytest.raises(ValueError, match=said):
        rectifier.load_state_dict(foreign)
    assert same(before, rectifier.state_dict())


# Nothing is left half done.


class Failing(Elementwise):
    """A rule that knows how many tensors it takes, and no more."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        if self.left == 0:
            raise RuntimeError("out of memory")
        self.left -= 1
        return 0.5 * u


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_parameters_are_never_left_half_updated(
    after: int, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the optimizer steps a few tensors at a time."""
    monkeypatch.setattr("geffect.projection.projector.PORTION_BYTES", 1)
    model = network()
    optimizer = optimizer(model.parameters(), lr=LR)
    rule = Failing(after=100)
    rectifier = Rectifier(model, rule, space="update", optimizer=optimizer)
    backward(rectifier, model)
    rule.left = after
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert same(before, model.state_dict())


def broken(K: Tensor) -> Tensor:
    return torch.full_like(K[..., 0], torch.nan)


@pytest.mark.parametrize("scope", ["model", "layer", "parameter"])
def test_a_rule_without_weights_takes_no_step(scope: Any) -> None:
    model = network()
    optimizer = adamw(model)
    rectifier = Rectifier(model, broken, scope=scope, space="update", optimizer=optimizer)
    backward(rectifier, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"should give finite weights\. Found .* Guard"):
        optimizer.step()
    assert same(before, model.state_dict())


def test_a_rectifier_of_another_model_is_refused_and_changes_nothing() -> None:
    model, other = (nn.Linear(2, 1, bias=False) for _ in range(2))
    rectifier = Rectifier(other)
    loss = model(torch.ones(2)).sum()
    with pytest.raises(ValueError, match=r"computed with the model that is watched. Found"):
        rectifier.backward(objective=-loss, retain=loss)
    assert model.weight.grad is None and not rectifier.watched["retain_ema"][0]


def test_an_optimizer_of_deepspeed_belongs_to_an_engine() -> None:
    class DeepSpeedOptimizerWrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = nn.Linear(2, 1)
    wrapped = DeepSpeedOptimizerWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"Found DeepSpeed's, .* the engine as"):
        Rectifier(model, space="update").attach(wrapped)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("told", "stepped", "warned"),
    [
        (False, [[2]], True),
        (False, [[0], [2]], False),  # as Muon beside AdamW
        (False, [], False),  # a scaler that skips, or a loop that steps by hand
        (True, [[2]], False),
    ],
)
def test_a_gradient_that_is_stepped_in_part_is_said(
    told: bool, stepped: list[list[int]], warned: bool
) -> None:
    """<u, r> >= 0 of the whole says nothing of the part that an optimizer steps."""
    model = network()
    optimizers = [
        torch.optim.SGD([p for i in layers for p in model[i].parameters()], LR)
        for layers in stepped
    ]
    rectifier = Rectifier(model, optimizer=optimizers[0] if told else None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(3):
            model.zero_grad()
            rectifier.backward(
                objective={"forget": -1.0}, forget=risk(model, seed), retain=risk(model, seed + 7)
            )
            for optimizer in optimizers:
                optimizer.step()
    found = [str(w.message) for w in said if "no optimizer stepped" in str(w.message)]
    assert len(found) == warned
    assert not warned or "Found 2 parameters" in found[0]
