"""Which optimizers may step a rectified gradient: any other step is refused."""

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.hooks import BEFORE_STEPS
from tests.utils.network import network, risk
from tests.utils.trainers import same

Optimizer = torch.optim.Optimizer

LR = 0.1


def backward(rectifier: Rectifier, model: nn.Module) -> None:
    """A step that conflicts: what is forgotten is much like what is retained."""
    rectifier.backward(
        objective={"forget": -1.0}, forget=lambda: risk(model, 0), retain=lambda: risk(model, 1)
    )


def harm(model: nn.Module, step: Callable[[], object]) -> float:
    """By how much a step raises the retain risk, to first order: sum <update, grad retain>."""
    parameters = [*model.parameters()]
    retain = torch.autograd.grad(risk(model, 1), parameters)
    before = [p.detach().clone() for p in parameters]
    step()
    moves = [(p.detach() - q) for p, q in zip(parameters, before, strict=True)]
    return sum(float((m * g).sum()) for m, g in zip(moves, retain, strict=True))


class Around(Optimizer):
    """An optimizer that stands around another one, on the same groups: it steps by that one."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {"lr": LR})
        self.inside, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> None:
        self.inside.step()


def sgd(parameters: Iterable[Tensor], **options: Any) -> Optimizer:
    return torch.optim.SGD([*parameters], lr=LR, **options)


class Own(Optimizer):
    """An optimizer that torch does not have."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__([*parameters], {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())


MADE = {"SGD": sgd, "AdamW": lambda ps: torch.optim.AdamW([*ps], lr=LR), "Own": Own}
SCOPES = ["model", "coordinate"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_step_of_an_optimizer_that_was_made_anew(made: Callable[..., Any], scope: Any) -> None:
    """As by a cell of a notebook that is run twice: the step would not be rectified."""
    model = network()
    rectifier = Rectifier(
        model, space="update", ema=1.0, scope=scope, optimizer=made(model.parameters())
    )
    anew = made(model.parameters())
    backward(rectifier, model)
    with pytest.raises(ValueError, match=r"take the step.* has stepped.* Call rectifier.attach"):
        anew.step()
    anew.zero_grad()
    rectifier.attach(anew)
    backward(rectifier, model)
    assert harm(model, anew.step) < 1e-6
    assert rectifier.report is not None


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_another_optimizer_that_steps_the_rest(
    made: Callable[..., Any], is_first: bool, space: Any
) -> None:
    """It is refused before it moves anything, in either order."""
    model = network()
    part, rest = made(model[0].parameters()), made(model[2].parameters())
    rectifier = Rectifier(model, space=space, ema=1.0, optimizer=part)
    backward(rectifier, model)
    if not is_first:
        part.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"step all that is trained.* about to step 2 parameters"):
        rest.step()
    assert same(before, model.state_dict())


def test_two_optimizers_of_a_gradient_that_is_rectified_as_a_whole() -> None:
    model = network()
    optimizers = [sgd(model[0].parameters()), sgd(model[2].parameters())]
    rectifier = Rectifier(model, ema=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(rectifier, model)
            assert harm(model, lambda: [o.step() for o in optimizers]) < 1e-6
            model.zero_grad()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_second_step_by_the_same_gradient(made: Callable[..., Any], scope: Any) -> None:
    model = network()
    optimizer = made(model.parameters())
    rectifier = Rectifier(model, space="update", ema=1.0, scope=scope, optimizer=optimizer)
    backward(rectifier, model)
    assert harm(model, optimizer.step) < 1e-6
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"once for each gradient.* Found another `step\(\)`"):
        optimizer.step()
    assert same(before, model.state_dict())


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_steps_by_gradients_of_the_user_s_own(scope: Any, to_none: bool) -> None:
    """By the optimizer of the rectifier, and by others, between rectified steps."""
    model = network()
    optimizer, other = sgd(model.parameters()), sgd(model[2].parameters())
    rectifier = Rectifier(model, space="update", ema=1.0, scope=scope, optimizer=optimizer)
    for stepping in (optimizer, other, sgd(model.parameters())):
        backward(rectifier, model)
        optimizer.step()
        model.zero_grad(set_to_none=to_none)
        risk(model, 2).backward()
        assert harm(model, stepping.step) != 0.0
        model.zero_grad(set_to_none=to_none)


def test_a_second_step_by_a_gradient_that_is_rectified_itself() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    rectifier = Rectifier(model, optimizer=optimizer)
    backward(rectifier, model)
    for _ in range(2):
        optimizer.step()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("attached", ["inner", "outer"])
def test_an_optimizer_around_that_of_the_rectifier(attached: str, scope: Any) -> None:
    """Whichever of the two is attached, the step is rectified, and none is refused."""
    model = network()
    inner = sgd(model.parameters())
    outer = Around(inner)
    given = {"inner": inner, "outer": outer}[attached]
    rectifier = Rectifier(model, space="update", ema=1.0, scope=scope, optimizer=given)
    for _ in range(3):
        backward(rectifier, model)
        assert harm(model, outer.step) < 1e-6
        model.zero_grad()


def test_an_optimizer_that_was_prepared_by_accelerate() -> None:
    model, accelerator = network(), Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(sgd(model.parameters()))
    rectifier = Rectifier(model, space="update", ema=1.0, optimizer=optimizer)
    for _ in range(2):
        backward(rectifier, model)
        assert harm(model, optimizer.step) < 1e-6
        optimizer.zero_grad()


CLIPPED: dict[str, Callable[[Iterable[nn.Parameter]], object]] = {
    "in place": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3),
    "by others": lambda parameters: [setattr(p, "grad", p.grad * 0.5) for p in parameters],
}


@pytest.mark.parametrize("clip", CLIPPED.values(), ids=CLIPPED)
def test_what_is_clipped_still_is_the_gradient_that_was_left(clip: Callable[..., object]) -> None:
    model = network()
    optimizer, anew = sgd(model.parameters()), sgd(model.parameters())
    rectifier = Rectifier(model, space="update", ema=1.0, optimizer=optimizer)
    backward(rectifier, model)
    clip(model.parameters())
    with pytest.raises(ValueError, match="has stepped its parameters"):
        anew.step()
    model.zero_grad()
    backward(rectifier, model)
    clip(model.parameters())
    assert harm(model, optimizer.step) < 1e-6


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_optimizers_that_are_clipped_one_by_one(space: Any) -> None:
    model = network()
    part, rest = sgd(model[0].parameters()), sgd(model[2].parameters())
    rectifier = Rectifier(model, space=space, ema=1.0, optimizer=part)
    backward(rectifier, model)
    nn.utils.clip_grad_norm_(model[0].parameters(), 1e-3)
    part.step()
    nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3)
    with pytest.raises(ValueError, match=r"step all that is trained.* about to step 2 parameters"):
        rest.step()


@pytest.mark.parametrize("scope", SCOPES)
def test_another_optimizer_by_the_same_gradient_behind_that_of_the_rectifier(scope: Any) -> None:
    model = network()
    optimizer, other = sgd(model.parameters()), sgd(model.parameters())
    rectifier = Rectifier(model, space="update", ema=1.0, scope=scope, optimizer=optimizer)
    backward(rectifier, model)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"once for each gradient.* Found another `step\(\)`, of SG"
    ):
        other.step()
    assert same(before, model.state_dict())


def test_another_optimizer_is_attached_before_the_step() -> None:
    model = network()
    optimizer, anew = sgd(model.parameters()), sgd(model.parameters())
    rectifier = Rectifier(model, space="update", ema=1.0, optimizer=optimizer)
    backward(rectifier, model)
    with pytest.raises(ValueError, match=r"attached between two steps\..* Call zero_grad\(\)"):
        rectifier.attach(anew)
    model.zero_grad()
    rectifier.attach(anew)
    backward(rectifier, model)
    assert harm(model, anew.step) < 1e-6


def test_a_step_by_hand_in_update_space_is_warned_of() -> None:
    model = network()
    rectifier = Rectifier(model, space="update", ema=1.0, optimizer=sgd(model.parameters()))
    backward(rectifier, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"should take the step.* it took none, and that 4 param"):
        backward(rectifier, model)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(rectifier, model)  # a step that nobody took, as one that a GradScaler skips


def test_what_rectifies_nothing_may_be_stepped_twice() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    rectifier = Rectifier(model, rule=None, space="update", optimizer=optimizer)
    backward(rectifier, model)
    for _ in range(2):
        optimizer.step()


def test_a_copy_of_a_rectifier_looks_at_no_steps() -> None:
    model = network()
    rectifier = Rectifier(model)
    backward(rectifier, model)
    before = len(BEFORE_STEPS.hooks)
    copied = copy.deepcopy(rectifier)
    assert len(BEFORE_STEPS.hooks) == before
    del copied
    rectifier.detach()
    assert len(BEFORE_STEPS.hooks) == before - 1


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_detached_no_step_is_refused(space: Any) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    rectifier = Rectifier(model, space=space, ema=1.0, optimizer=optimizer)
    backward(rectifier, model)
    rectifier.detach()
    sgd(model[2].parameters()).step()
    sgd(model.parameters()).step()
    optimizer.step()


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("scope", ["model", "layer", "parameter", "coordinate"])
@pytest.mark.parametrize("select", [None, 0.5])
def test_what_has_no_learning_rate_takes_no_part(select: Any, scope: Any, space: Any) -> None:
    """The first layer is frozen by its rate: it stays, and what the second one does is no harm."""
    model = network()
    still = {"params": [*model[0].parameters()], "lr": 0.0}
    optimizer = torch.optim.SGD([still, {"params": [*model[2].parameters()]}], lr=LR)
    how = {"space": space, "scope": scope, "select": select}
    rectifier = Rectifier(model, ema=1.0, optimizer=optimizer, **how)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        backward(rectifier, model)
        last = copy.deepcopy(model.state_dict())
        assert harm(model, optimizer.step) < 1e-6
        model.zero_grad()
    assert all(
        torch.equal(before[name], model.state_dict()[name]) for name in ("0.weight", "0.bias")
    )
    moved = sum(int((last[n] != model.state_dict()[n]).sum()) for n in ("2.weight", "2.bias"))
    assert 0 < moved <= (10 if select is None else 5)


def test_a_learning_rate_that_comes_between_gradient_and_step() -> None:
    model = network()
    still = {"params": [*model[0].parameters()], "lr": 0.0}
    optimizer = torch.optim.SGD([still, {"params": [*model[2].parameters()]}], lr=LR)
    rectifier = Rectifier(model, ema=1.0, optimizer=optimizer)
    backward(rectifier, model)
    optimizer.param_groups[0]["lr"] = LR
    with pytest.raises(ValueError, match=r"there before its gradient.* Found 2 parameters"):
        optimizer.step()
    model.zero_grad()
    backward(rectifier, model)
    assert harm(model, optimizer.step) < 1e-6


def test_what_has_no_learning_rate_in_an_optimizer_that_is_not_known() -> None:
    model = network()
    still = {"params": [*model[0].parameters()], "lr": 0.0}
    optimizer = torch.optim.SGD([still, {"params": [*model[2].parameters()]}], lr=LR)
    rectifier = Rectifier(model, ema=1.0)
    backward(rectifier, model)
    optimizer.step()
    model.zero_grad()
    with pytest.warns(UserWarning, match="2 parameters with a gradient that no optimizer stepped"):
        backward(rectifier, model)


class Seldom(Around):
    """It steps by the other one at every second call."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.inside.step()


def test_an_optimizer_around_that_steps_seldom() -> None:
    model = network()
    inner = sgd(model.parameters())
    outer, rectifier = Seldom(inner), Rectifier(model, space="update", ema=1.0, optimizer=inner)
    for _ in range(4):
        backward(rectifier, model)
        assert harm(model, outer.step) < 1e-6
        model.zero_grad()


def test_a_step_that_a_scaler_skips_promises_nothing() -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer, other = sgd(model[0].parameters()), sgd(model[2].parameters())
    rectifier = Rectifier(model, optimizer=optimizer)
    rectifier.backward(
        objective={"forget": -1.0}, forget=lambda: 1e6 * risk(model, 0),
        retain=lambda: risk(model, 1), scaler=scaler,
    )  # fmt: skip
    scaler.step(optimizer)
    model.zero_grad()
    risk(model, 2).backward()
    other.step()


def test_a_refused_step_is_none_of_a_recorder(tmp_path: Path) -> None:
    """Whichever was there first: the recorder has not begun to follow it."""
    model = network()
    part, rest = sgd(model[0].parameters()), sgd(model[2].parameters())
    with Recorder(model, tmp_path / "a.h5") as recorder:
        rectifier = Rectifier(model, optimizer=part)
        for step in range(3):
            recorder.backward(
                objective={"forget": -1.0}, forget=lambda: risk(model, 0),
                retain=lambda: risk(model, 1), rectifier=rectifier,
            )  # fmt: skip
            part.step()
            if step == 0:
                with pytest.raises(ValueError, match="step all that is trained"):
                    rest.step()
            model.zero_grad()
    assert open_run(tmp_path / "a.h5").stepped().tolist() == [[True, True, False, False]] * 3
