"""What a user gets wrong is said in one sentence, and costs nothing that was there before."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, RunFileError, open_run
from geffect.losses import NotFinite
from tests.utils.trainers import same

RATE = 0.125
BATCH = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]])
SCALAR = "should be a scalar tensor with a graph, or weights of other losses"
WEIGHTS = (
    "should be a scalar, or weights of scalars of this step, finite and not all zero; a scalar is "
    "a tensor or a function that returns one. Found "
)
NAMES = (
    "should have one named `objective`, none named `rectified` or `update` or ending in `_ema`, "
    "and no name with a slash"
)

Losses = Callable[[nn.Module], dict[str, Any]]


def given(losses: Losses, kind: type[Exception], *parts: str, name: str) -> Any:
    """A case: losses that are wrong, and the parts of the one error that says so."""
    return pytest.param(losses, kind, parts, id=name)


def no_graph(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return loss_of(model)


def without_derivative(x: Tensor) -> Tensor:
    """Of an operation that somebody registered for a device, and not for autograd."""
    doubled: Tensor = torch.ops.geffect_tests.doubled(x)
    return doubled


LIBRARY = torch.library.Library("geffect_tests", "DEF")
LIBRARY.define("doubled(Tensor x) -> Tensor")
LIBRARY.impl("doubled", lambda x: x.detach() * 2, "CPU")

BAD_LOSSES = [
    given(lambda m: {"objective": 1.5}, TypeError, SCALAR, "`float`", "Pass what", name="float"),
    given(lambda m: {"objective": None}, TypeError, SCALAR, "NoneType", "Pass what", name="None"),
    given(
        lambda m: {"objective": m(BATCH)}, ValueError, SCALAR, "shape (3, 1)", "Take its mean",
        name="not scalar",
    ),
    given(
        lambda m: {"objective": no_graph(m)}, ValueError, SCALAR, "without a graph", "Compute it",
        name="no graph",
    ),
    given(
        lambda m: {"objective": loss_of(m).detach()}, ValueError, SCALAR, "without a graph",
        "do not detach", name="detached",
    ),
    given(
        lambda m: {"objective": loss_of(m), "forget": loss_of(m) + without_derivative(loss_of(m))},
        ValueError, "Loss `forget` should be of operations that have derivatives",
        "one that has none", "Register its derivative", name="without derivative",
    ),
    *[
        given(
            lambda m, x=x: {"objective": loss_of(m), "forget": loss_of(m) * x}, NotFinite,
            "Loss `forget` should be finite", f"Found {x}", "Lower the learning rate", name=str(x),
        )
        for x in (math.nan, math.inf, -math.inf)
    ],
    *[
        given(
            lambda m, weights=weights: {"objective": weights, "forget": loss_of(m)}, ValueError,
            "Loss `objective` " + WEIGHTS + f"`{weights}`", "Pass weights of: forget",
            name=f"weights {weights}",
        )
        for weights in (
            {"forgot": -1.0}, {"forget": -1.0, "retain": 1.0}, {"objective": 1.0}, {},
            {"forget": 0.0}, {"forget": math.nan}, {"forget": math.inf},
        )
    ],
    given(
        lambda m: {"forget": loss_of(m)}, ValueError, NAMES, "Found forget", "Pass objective=loss",
        name="no objective",
    ),
    given(lambda m: {}, ValueError, NAMES, "Found none", "Pass", name="no loss"),
    given(
        lambda m: {"objective": loss_of(m), "forgte": loss_of(m)}, ValueError,
        "should have names that differ from `forget`", "Found `forgte`", "Did you mean `forget`?",
        name="a slip",
    ),
    *[
        given(
            lambda m, name=name: {"objective": loss_of(m), name: loss_of(m)}, ValueError, NAMES,
            f"Found objective, {name}", "Pass objective=loss", name=f"named {name}",
        )
        for name in ("a/b", "update", "rectified", "retain_ema")
    ],
]  # fmt: skip


# Losses.


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize(("losses", "kind", "parts"), BAD_LOSSES)
def test_a_bad_loss_costs_nothing(
    tmp_path: Path, losses: Losses, kind: type[Exception], parts: tuple[str, ...], update: bool
) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5", update=update) as recorder:
        take_step(model, optimizer, recorder)
        bad = losses(model)
        with nothing_lost(model, tmp_path / "a.h5"), one_error(kind, *parts):
            recorder.backward(**bad)
        take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


@pytest.mark.parametrize("terms", [{"forget": -1.0}, {"forget": -1.0, "retain": 1.0}])
def test_weights_are_not_of_weights(tmp_path: Path, terms: dict[str, float]) -> None:
    model, _ = started()
    losses = {"objective": terms, "forget": loss_of(model), "retain": loss_of(model)}
    with (
        Recorder(model, tmp_path / "a.h5") as recorder,
        one_error(
            ValueError, "Loss `twice` " + WEIGHTS, "`{'objective': 2.0}`", "Pass weights of: forget"
        ),
    ):
        recorder.backward(**losses, twice={"objective": 2.0})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bad_first_loss_does_not_decide_what_the_run_holds(tmp_path: Path) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5") as recorder:
        with one_error(NotFinite, "Loss `other` should be finite"):
            recorder.backward(objective=loss_of(model), other=loss_of(model) * math.nan)
        assert not (tmp_path / "a.h5").exists()
        take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").sources == ("objective", "forget", "retain")


def test_a_new_source_comes_too_late(tmp_path: Path) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder)
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(
                ValueError,
                "should be among those of the first step of the run: objective, forget, retain.",
                "Found further as well",
                "Name every loss",
            ),
        ):
            recorder.backward(objective=loss_of(model), further=loss_of(model))
        take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


# The model.


@pytest.mark.parametrize("update", [False, True])
def test_parameters_keep_their_shapes(tmp_path: Path, update: bool) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5", update=update) as recorder:
        take_step(model, optimizer, recorder)
        table = model[1].weight.data
        model[1].weight.data = torch.ones(3, 2)  # as a vocabulary that is resized in place
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(
                ValueError,
                "should keep their shapes",
                "Found one of (1, 2) that is (3, 2) now",
                "into another file, with a new Recorder",
            ),
        ):
            recorder.backward(objective=lambda: loss_of(model))
        model[1].weight.data = table
        take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


@pytest.mark.parametrize(
    "made",
    [Recorder, lambda model, _: backward_of(Rectifier(model))],
    ids=["recorder", "rectifier"],
)
def test_two_parameters_in_one_memory_are_refused(tmp_path: Path, made: Any) -> None:
    """As heads were tied long ago: a step by the gradient of one would move both."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.data = model[0].weight.data
    with one_error(ValueError, "memory of its own", "`0.weight` and `1.weight` to be one", "Tie"):
        made(model, tmp_path / "a.h5")
    model[1].weight = model[0].weight
    made(model, tmp_path / "a.h5")


def backward_of(rectifier: Rectifier) -> None:
    model = rectifier._model
    rectifier.backward(objective={"retain": -1.0}, retain=lambda: model(BATCH).sum())


def test_a_parameter_without_a_shape_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1))
    for make in (lambda: Recorder(model, tmp_path / "a.h5"), lambda: Rectifier(model)):
        with one_error(ValueError, "should have a shape", "Found `1.weight`", "Run the model once"):
            make()
    model(torch.ones(1, 2))
    Recorder(model, tmp_path / "a.h5").close()


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    model, optimizer = started()
    model.requires_grad_(False)
    for make in (lambda: Recorder(model, tmp_path / "a.h5"), lambda: Rectifier(model)):
        with one_error(
            ValueError, "should have a parameter that", "Found none in Sequential", "requires_grad_"
        ):
            make()
    assert not list(tmp_path.iterdir())
    model.requires_grad_()
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder)


def freeze(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)


def add(model: nn.Module) -> None:
    model.append(nn.Linear(1, 1, bias=False))


def replace(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("change", "name"), [(freeze, "0.bias"), (add, "2.weight"), (replace, "1.weight")]
)
def test_the_parameters_stay_those_of_the_first_step(
    tmp_path: Path, change: Callable[[nn.Module], None], name: str
) -> None:
    model, optimizer = started()
    before = list(model.children()), dict(model.named_parameters())
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder)
        change(model)
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(
                ValueError,
                "should stay those of the first step",
                f"Found 1 frozen, added or replaced, the first of them ['{name}']",
                "into another file, with a new Recorder",
            ),
        ):
            recorder.backward(objective=loss_of(model))
        del model[2:]
        model[1].weight = before[1]["1.weight"]
        model.requires_grad_()
        take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


# The file.


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"model": nn.Linear(1, 1)}, "Linear is not JSON"),
        ({"loss": torch.tensor(1.0)}, "Tensor is not JSON"),
        ({"deep": [{"set": {1}}]}, "set is not JSON"),
        ({"rate": math.nan}, "float"),
        ({(1, 2): 3}, "keys must be"),
        ("text", "sequence"),
    ],
)
def test_metadata_that_json_cannot_hold(tmp_path: Path, metadata: Any, found: str) -> None:
    with one_error(
        TypeError, "`metadata` should hold what JSON can", found, "Turn other values into text"
    ):
        Recorder(started()[0], tmp_path / "a.h5", metadata=metadata)
    assert not list(tmp_path.iterdir())
    Recorder(started()[0], tmp_path / "a.h5").close()


def test_an_existing_file_is_neither_replaced_nor_continued_by_itself(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.h5")
    before = path.read_bytes()
    with one_error(ValueError, "should not both be True", "Found both", "Choose whether"):
        Recorder(started()[0], path, overwrite=True, resume=True)
    with one_error(FileExistsError, "should not exist yet", "Found", "a.h5", "resume=True"):
        Recorder(started()[0], path)
    assert path.read_bytes() == before


def larger() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def reordered() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for child in model.modules():
        child._parameters = dict(reversed(child._parameters.items()))
    return model


@pytest.mark.parametrize(
    ("model", "how", "parts"),
    [
        (
            None, {"metadata": {"seed": 2}},
            ["`metadata` should be that of", "{'seed': 1}", "Found {'seed': 2}", "Pass the same"],
        ),
        (None, {}, ["`metadata` should be that of", "{'seed': 1}", "Found {}", "another file"]),
        (
            None, {"metadata": {"seed": 1}, "update": True},
            ["`update` should be False", "Found `update = True`", "Pass the same"],
        ),
        (
            larger(), {"metadata": {"seed": 1}},
            ["should have the parameters of the run", "Found 3 that differ", "load the model"],
        ),
        (
            reordered(), {"metadata": {"seed": 1}},
            ["should have the parameters of the run", "Found them in another order", "bias"],
        ),
    ],
    ids=["other metadata", "no metadata", "other sources", "other model", "other order"],
)  # fmt: skip
def test_only_the_same_run_is_continued(
    tmp_path: Path, model: nn.Module | None, how: dict[str, Any], parts: list[str]
) -> None:
    path = recorded(tmp_path / "a.h5", metadata={"seed": 1})
    before = path.read_bytes()
    with one_error(ValueError, *parts, "a.h5"):
        Recorder(model or started()[0], path, resume=True, **how)
    assert path.read_bytes() == before
    recorded(path, metadata={"seed": 1}, resume=True)
    assert open_run(path).steps.tolist() == [0, 1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_closed_recorder_says_so(tmp_path: Path, overwrite: bool) -> None:
    model, optimizer = started()
    recorder = Recorder(model, tmp_path / "a.h5", overwrite=overwrite)
    take_step(model, optimizer, recorder)
    recorder.close()
    with (
        nothing_lost(model, tmp_path / "a.h5"),
        one_error(RunFileError, "a.h5` should be open", "Found it closed", "resume=True"),
    ):
        recorder.backward(**losses_of(model))


@pytest.mark.parametrize("pending", [False, True])
def test_an_exception_leaves_a_readable_run_that_is_marked_open(
    tmp_path: Path, pending: bool
) -> None:
    model, optimizer = started()
    path = tmp_path / "a.h5"
    with pytest.raises(ZeroDivisionError), Recorder(model, path) as recorder:
        take_step(model, optimizer, recorder)
        if pending:
            recorder.backward(objective=loss_of(model))
        _ = 1 / 0
    run = open_run(path)
    assert run.state == "open"
    assert run.steps.tolist() == ([0, 1] if pending else [0])
    assert np.isfinite(run.gram()[:, :, 0, 0]).all()
    recorded(path, resume=True)
    assert open_run(path).state == "complete"
    assert open_run(path).steps.tolist() == [*run.steps, len(run.steps)]


def test_an_exception_before_the_first_step_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(started()[0], tmp_path / "a.h5"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


# The rectifier, as it is made.


def stranger() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ({"scope": "head"}, ["`scope` should be one of model, group, layer,", "'head'", "Choose"]),
        ({"space": "loss"}, ["`space` should be one of gradient, update.", "'loss'", "Choose"]),
        *[
            ({name: x}, [f"`{name}` of Rectifier should be above 0", f"`{name} = {x!r}`", "Pass"])
            for name in ("ema", "select")
            for x in (0, -0.5, 1.5, math.nan, math.inf, "half")
        ],
        (
            {"space": "update", "optimizer": 0.1},
            ["`optimizer` should be a torch", "`float`", "optimizer="],
        ),
        (
            {"space": "update", "optimizer": stranger()},
            ["should step the parameters of `model`", "Found one that has none", "Make it from"],
        ),
        ({"scope": "coordinate", "rule": None}, ["should go with the rule gru", "None", "Choose"]),
    ],
)
def test_a_rectifier_that_cannot_be(how: dict[str, Any], parts: list[str]) -> None:
    with one_error(ValueError, *parts):
        Rectifier(started()[0], **how)


# The rectifier, as it is used.


@pytest.mark.parametrize("then", [{"scope": "layer"}, {"ema": 0.5}, {"rule": None}])
def test_a_rectifier_does_not_change(tmp_path: Path, then: dict[str, Any]) -> None:
    model, optimizer = started()
    before, after = Rectifier(model), Rectifier(model, **then)
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder, rectifier=before)
        optimizer.zero_grad()
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(ValueError, "should be set up as in the first step", "Found", "Set it up"),
        ):
            recorder.backward(**losses_of(model), rectifier=after)
        take_step(model, optimizer, recorder, rectifier=before)
    with (
        Recorder(model, tmp_path / "a.h5", resume=True) as recorder,
        one_error(ValueError, "should be set up as in the first step", "Found", "Set it up"),
    ):
        take_step(model, optimizer, recorder, rectifier=after)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


def test_a_rectifier_does_not_appear(tmp_path: Path) -> None:
    model, optimizer = started()
    rectifier = Rectifier(model)
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder)
        optimizer.zero_grad()
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(
                ValueError, "first step of the run", "Found retain_ema", "pass the rectifier"
            ),
        ):
            recorder.backward(**losses_of(model), rectifier=rectifier)
        take_step(model, optimizer, recorder)
    assert rectifier.watched["retain_ema"] == [None] * 4
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


def test_a_rectified_step_begins_with_empty_gradients(tmp_path: Path) -> None:
    model, optimizer = started()
    rectifier = Rectifier(model)
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder, rectifier=rectifier)
        loss_of(model).backward()
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(ValueError, "`.grad` should be empty", "Found gradients", "zero_grad"),
        ):
            recorder.backward(**losses_of(model), rectifier=rectifier)
        take_step(model, optimizer, recorder, rectifier=rectifier)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


def test_a_retain_loss_is_missed_by_the_recorder(tmp_path: Path) -> None:
    model, optimizer = started()
    rectifier = Rectifier(model)
    with Recorder(model, tmp_path / "a.h5") as recorder:
        take_step(model, optimizer, recorder, rectifier=rectifier)
        optimizer.zero_grad()
        average = copy.deepcopy(rectifier.watched)
        with (
            nothing_lost(model, tmp_path / "a.h5"),
            one_error(ValueError, "should have one named `retain`", "Found obj", "Pass retain="),
        ):
            recorder.backward(objective=loss_of(model), rectifier=rectifier)
        assert_equal(rectifier.watched["retain_ema"], average["retain_ema"])
        take_step(model, optimizer, recorder, rectifier=rectifier)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1]


def test_a_retain_loss_is_missed_by_the_rectifier() -> None:
    model, _ = started()
    rectifier = Rectifier(model)
    with one_error(ValueError, "should have one named `retain`", "Found obj", "Pass retain="):
        rectifier.backward(objective=loss_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("keyword", [False, True])
def test_a_rectified_optimizer_takes_no_closure(tmp_path: Path, keyword: bool) -> None:
    model, optimizer = started()
    rectifier = Rectifier(model, space="update", optimizer=optimizer)
    path = tmp_path / "a.h5"
    with Recorder(model, path, update=True) as recorder:
        take_step(model, optimizer, recorder, rectifier=rectifier)
        for taken in (True, False):
            optimizer.zero_grad()
            recorder.backward(**losses_of(model), rectifier=rectifier)
            with (
                nothing_lost(model, path),
                one_error(
                    ValueError,
                    "without a closure",
                    "Found a closure given to SGD",
                    "Call step() alone",
                ),
            ):
                with_closure(optimizer, lambda: loss_of(model), keyword)
            if taken:
                optimizer.step()
    update = open_run(path).gram()[:, :, -1, -1].sum(axis=1)
    assert (update[:2] > 0).all()
    assert np.isnan(update[2])  # a step that never was is no step of length zero


# Any two of these meet in every way.
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("problem", "scope", "space"),
    [
        ("zero", "model", "gradient"),
        ("zero", "layer", "update"),
        ("zero", "coordinate", "gradient"),
        ("infinite", "model", "update"),
        ("infinite", "layer", "gradient"),
        ("infinite", "coordinate", "update"),
        ("nan", "model", "gradient"),
        ("nan", "layer", "update"),
        ("nan", "coordinate", "gradient"),
        ("nan", "coordinate", "update"),
    ],
)
def test_a_retain_gradient_without_a_direction_rectifies_nothing(
    tmp_path: Path, problem: str, scope: Any, space: Any, first: bool
) -> None:
    model, optimizer = started()
    stepped = {"optimizer": optimizer} if space == "update" else {}
    rectifier = Rectifier(model, scope=scope, space=space, **stepped)
    recorder = Recorder(model, tmp_path / "a.h5")
    if not first:
        take_step(model, optimizer, recorder, rectifier=rectifier)
        assert rectifier.report is not None
        assert any(rectifier.report.fired)
    average = copy.deepcopy(rectifier.watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in (1, 2):
            optimizer.zero_grad()
            plain = copy.deepcopy(model)
            losses = losses_of(model) | {"retain": without_direction(model, problem)}
            recorder.backward(**losses, rectifier=rectifier)
            (-loss_of(plain)).backward()
            assert_equal(
                [parameter.grad for parameter in model.parameters()],
                [parameter.grad for parameter in plain.parameters()],
            )
            optimizer.step()
            torch.optim.SGD(plain.parameters(), lr=RATE).step()
            assert_equal(list(model.parameters()), list(plain.parameters()))
            assert rectifier.skipped == count
            assert rectifier.report is not None
            assert not any(rectifier.report.fired)
    said = [str(warning.message) for warning in caught]
    reason = "zero" if problem == "zero" else "not finite"
    assert said == [
        f"A step was not rectified: the retain gradient is {reason}. Rectifier.skipped counts such "
        "steps; this is said once."
    ]
    assert_equal(rectifier.watched["retain_ema"], average["retain_ema"])

    take_step(model, optimizer, recorder, rectifier=rectifier)
    assert any(rectifier.report.fired)
    assert rectifier.skipped == 2
    recorder.close()
    fired = open_run(tmp_path / "a.h5").rectification()[1]["fired"].any(axis=1)
    assert fired.tolist() == [*([] if first else [True]), False, False, True]


def test_what_is_finite_is_recorded_beside_what_is_not(tmp_path: Path) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5") as recorder:
        recorder.backward(objective=loss_of(model), other=without_direction(model, "nan"))
        optimizer.step()
    gram = open_run(tmp_path / "a.h5").gram()[0]
    assert np.isnan(gram[:, 1, 1]).all()
    assert np.isfinite(gram[:, 0, 0]).all()


# What the tests above are made of.


def started() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(BATCH).square().mean()
    return loss


def losses_of(model: nn.Module) -> dict[str, Any]:
    """What is forgotten is what should stay: the objective is all conflict."""
    return {
        "objective": {"forget": -1.0},
        "forget": loss_of(model),
        "retain": loss_of(model),
    }


def without_direction(model: nn.Module, problem: str) -> Tensor:
    """A loss of zero, with a gradient that is zero, infinite or not a number."""
    roots = sum((p - p.detach()).sqrt().sum() for p in model.parameters())
    linear = sum((p - p.detach()).sum() for p in model.parameters())
    return {"zero": 0 * linear, "infinite": roots, "nan": 0 * roots}[problem]


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
    rectifier: Rectifier | None = None,
) -> None:
    """A good step."""
    optimizer.zero_grad()
    recorder.backward(**losses_of(model), rectifier=rectifier)
    optimizer.step()


def recorded(path: Path, **how: Any) -> Path:
    """A file with one more step."""
    model, optimizer = started()
    with Recorder(model, path, **how) as recorder:
        take_step(model, optimizer, recorder)
    return path


def with_closure(optimizer: torch.optim.Optimizer, closure: Any, keyword: bool) -> None:
    if keyword:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)


@contextmanager
def one_error(kind: type[Exception], *parts: str) -> Iterator[None]:
    """The error says what should be, what was found and what to do, in these words."""
    with pytest.raises(kind) as caught:
        yield
    said = str(caught.value)
    assert caught.type is kind
    assert " should " in said
    assert "Found" in said
    for part in parts:
        assert part in said, said


@contextmanager
def nothing_lost(model: nn.Module, path: Path) -> Iterator[None]:
    """Parameters, gradients and what the file holds are afterwards what they were before."""
    parameters = list(model.parameters())
    before = copy.deepcopy([(p.detach(), p.grad) for p in parameters])
    steps = open_run(path).gram()
    yield
    assert_equal([p.detach() for p in parameters], [p for p, _ in before])
    assert_equal([p.grad for p in parameters], [grad for _, grad in before])
    assert np.array_equal(open_run(path).gram(), steps, equal_nan=True)


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("left", ["a term of its own", "a micro-batch", "a step before"])
def test_a_step_by_more_than_was_recorded(tmp_path: Path, left: str, update: bool) -> None:
    """It is refused before it moves anything; nothing is lost of what was recorded before."""
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5", update=update) as recorder:
        take_step(model, optimizer, recorder)
        if left != "a step before":
            optimizer.zero_grad()
        if left == "a term of its own":
            (2.0 * loss_of(model)).backward()
        if left == "a micro-batch":
            recorder.backward(objective=loss_of(model), forget=loss_of(model))
        recorder.backward(objective=loss_of(model), forget=loss_of(model))
        before = copy.deepcopy(model.state_dict())
        with one_error(
            ValueError, "should step by the gradient that was recorded", "earlier backward", "Call"
        ):
            optimizer.step()
        assert same(before, model.state_dict())
        take_step(model, optimizer, recorder)
    # What was not stepped is recorded all the same: its gradients are what they are.
    assert len(open_run(tmp_path / "a.h5").steps) == (4 if left == "a micro-batch" else 3)


def test_a_closure_that_adds_to_the_gradient_before(tmp_path: Path) -> None:
    model, optimizer = started()

    def closure() -> float:
        recorder.backward(**losses_of(model))
        return 0.0

    with Recorder(model, tmp_path / "a.h5") as recorder:
        optimizer.step(closure)
        with one_error(ValueError, "by the gradient that was recorded", "earlier backward", "Call"):
            optimizer.step(closure)
        take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 2]


def test_gradients_of_what_is_not_stepped_may_pile_up(tmp_path: Path) -> None:
    """The optimizer of a part clears that part alone, as most loops over adapters do."""
    model, _ = started()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=RATE)
    with Recorder(model, tmp_path / "a.h5") as recorder:
        for _ in range(3):
            take_step(model, optimizer, recorder)
    assert open_run(tmp_path / "a.h5").steps.tolist() == [0, 1, 2]


def test_a_step_of_one_s_own_behind_one_that_was_refused(tmp_path: Path) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5") as recorder:
        for _ in range(2):
            recorder.backward(**losses_of(model))
        with one_error(ValueError, "by the gradient that was recorded", "earlier backward", "Call"):
            optimizer.step()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize("cleared", ["to zero", "to none", "never stepped"])
def test_gradients_that_are_cleared_or_not_stepped_are_nobody_s_business(
    tmp_path: Path, cleared: str
) -> None:
    model, optimizer = started()
    with Recorder(model, tmp_path / "a.h5") as recorder:
        for _ in range(3):
            if cleared != "never stepped":
                optimizer.zero_grad(set_to_none=cleared == "to none")
            recorder.backward(objective=loss_of(model), forget=loss_of(model))
            if cleared != "never stepped":
                optimizer.step()
    assert len(open_run(tmp_path / "a.h5").steps) == 3
