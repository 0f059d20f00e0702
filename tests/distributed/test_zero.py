"""Recorder and rectifier in the loop of a DeepSpeed engine: two processes, gloo between them."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, Rectifier, open_run
from geffect.layers import describe, trainable
from tests.utils import two_ranks
from tests.utils.engines import OPTIMIZERS, SETTINGS, engine, groups, risks, whole_parameters
from tests.utils.layouts import Small, ddp

if find_spec("deepspeed") is None:  # nothing but an engine needs to load it
    pytest.skip("needs deepspeed", allow_module_level=True)

STEPS = 2
ALL = list(SETTINGS)


def trained_by_ddp(
    optimizer: str,
    path: Path,
    *,
    clip: float = 0.0,
    windows: tuple[int, ...] = (1,) * STEPS,
    objective: dict[str, float] | None = None,
    rectified: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    **recorded: Any,
) -> list[Tensor]:
    """What a loop in plain torch comes to, with as many micro-batches a step as `windows` say."""
    trained = ddp(Small() if model is None else model)
    stepped = OPTIMIZERS[optimizer](groups(trained))
    rectifier = None if rectified is None else Rectifier(trained, optimizer=stepped, **rectified)
    with Recorder(trained, path, **recorded) as recorder:
        for step, window in enumerate(windows):
            for micro in range(window):
                losses = {
                    side: x / max(windows) for side, x in risks(trained, step + micro).items()
                }
                recorder.backward(
                    objective=objective or {"forget": -1.0},
                    rectifier=rectifier,
                    accumulate=micro < window - 1,
                    **losses,
                )
            if clip:
                nn.utils.clip_grad_norm_(trained.parameters(), clip)
            stepped.step()
            stepped.zero_grad()
    return whole_parameters(trained)


def trained_by_engine(
    setting: str,
    optimizer: str,
    path: Path,
    *,
    clip: float = 0.0,
    windows: tuple[int, ...] = (1,) * STEPS,
    objective: dict[str, float] | None = None,
    rectified: dict[str, Any] | None = None,
    half: bool = False,
    model: nn.Module | None = None,
    **recorded: Any,
) -> list[Tensor]:
    """The same in the loop of an engine, which divides the losses of micro-batches itself."""
    made = engine(setting, optimizer, clip=clip, micro_batches=max(windows), half=half, model=model)
    rectifier = None
    if rectified is not None:
        rectifier = Rectifier(made, optimizer=made.optimizer, **rectified)
    with Recorder(made, path, **recorded) as recorder:
        for step, window in enumerate(windows):
            for micro in range(window):
                made.set_gradient_accumulation_boundary(micro == window - 1)
                recorder.backward(
                    objective=objective or {"forget": -1.0},
                    rectifier=rectifier,
                    accumulate=not made.is_gradient_accumulation_boundary(),
                    **risks(made, step + micro),
                )
                made.step()
    return whole_parameters(made)


def unwatched(
    setting: str,
    optimizer: str,
    *,
    clip: float = 0.0,
    windows: tuple[int, ...] = (1,) * STEPS,
    half: bool = False,
) -> list[Tensor]:
    made = engine(setting, optimizer, clip=clip, micro_batches=max(windows), half=half)
    for step, window in enumerate(windows):
        for micro in range(window):
            made.set_gradient_accumulation_boundary(micro == window - 1)
            made.backward(-risks(made, step + micro, ["forget"])["forget"])
            made.step()
    return whole_parameters(made)


def both(folder: Path, jobs: dict[str, tuple[list[str], str, dict[str, Any]]]) -> Any:
    """What DDP comes to in each job, and the engines of its settings."""
    found = {}
    for name, (settings, optimizer, options) in jobs.items():
        (own := folder / name).mkdir(exist_ok=True)
        found[name] = {"ddp": trained_by_ddp(optimizer, own / "ddp.h5", **options)}
        for setting in settings:
            path = own / f"{setting}.h5"
            found[name][setting] = trained_by_engine(setting, optimizer, path, **options)
    return found


def assert_same(
    folder: Path,
    jobs: dict[str, dict[str, Any]],
    settings: list[str] = ALL,
    optimizer: str = "adamw",
) -> None:
    """Gram matrices to 1e-6 of |a||b|, and parameters to 1e-6, are those of DDP."""
    found = two_ranks.run(both, folder, {n: (settings, optimizer, o) for n, o in jobs.items()})[0]
    for name in jobs:
        reference = open_run(folder / name / "ddp.h5")
        for setting in settings:
            run = open_run(folder / name / f"{setting}.h5")
            assert run.sources == reference.sources
            ours, theirs = run.gram(), reference.gram()
            norms = np.sqrt(np.einsum("stii->sti", theirs))
            # A coordinate on the threshold is selected, or not, by its last bit.
            tolerance = 1e-5 if "select" in jobs[name].get("rectified", ()) else 1e-6
            bound = tolerance * norms[..., :, None] * norms[..., None, :]
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
            assert np.all((abs(ours - theirs) <= bound) | np.isnan(theirs)), (name, setting)
            np.testing.assert_array_equal(run.column("lr"), reference.column("lr"))
            np.testing.assert_allclose(run.lengths(), reference.lengths(), rtol=1e-5)
            for a, b in zip(found[name][setting], found[name]["ddp"], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_recorder_sees_what_it_sees_under_ddp(optimizer: str, tmp_path: Path) -> None:
    jobs = {"clipped": {"clip": 0.5}, "update": {"update": True, "store": "sketch"}}
    assert_same(tmp_path, jobs, optimizer=optimizer)


def watched_and_not(folder: Path, half: bool) -> Any:
    found = {}
    for setting in ALL:
        for windows in ((1, 1), (3, 2)):
            options = {"clip": 0.5, "half": half, "windows": windows}
            path = folder / f"{setting} {windows}.h5"
            watched = trained_by_engine(setting, "adamw", path, **options)
            found[setting, windows] = watched, unwatched(setting, "adamw", **options)
    return found


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_training_ends_as_it_would_unwatched(half: bool, tmp_path: Path) -> None:
    for case, (watched, alone) in two_ranks.run(watched_and_not, tmp_path, half)[0].items():
        assert all(map(torch.equal, watched, alone)), case


def test_the_gradient_is_rectified_as_under_ddp(tmp_path: Path) -> None:
    jobs: dict[str, dict[str, Any]] = {
        "model": {},
        "layers": {"scope": "layer", "ema_start": "zero"},
        "coordinates": {"scope": "coordinate"},
        "part": {"part": "forget"},
        "select": {"select": 0.3},
        "measured": {"measure_update": True},
    }
    # Terms that nearly cancel out would leave a gradient with fewer digits than they have.
    objective = {"forget": -1.0, "retain": 0.1}
    assert_same(
        tmp_path,
        {
            n: {"rectified": o, "objective": objective if n == "part" else None}
            for n, o in jobs.items()
        },
        ["stage 1, offload", "stage 2", "stage 3"],
    )


def test_the_update_is_rectified_as_under_ddp(tmp_path: Path) -> None:
    jobs: dict[str, dict[str, Any]] = {
        "model": {},
        "coordinates": {"scope": "coordinate"},
        "metric": {"correction": "retain_adam"},
        "select": {"select": 0.3},
    }
    assert_same(
        tmp_path,
        {n: {"rectified": {"space": "update", **o}, "clip": 0.5} for n, o in jobs.items()},
        ["stage 1", "stage 2, offload", "stage 3, persistent"],
    )


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [("adamw", ALL), ("sgd", ["stage 1", "stage 2, offload", "stage 3"])],
    ids=["adamw", "sgd"],
)
def test_windows_of_micro_batches_are_rectified_as_under_ddp(
    optimizer: str, settings: list[str], tmp_path: Path
) -> None:
    windows = {"clip": 0.5, "windows": (3, 2)}
    jobs = {space: {**windows, "rectified": {"space": space}} for space in ("gradient", "update")}
    assert_same(tmp_path, jobs, settings, optimizer)


def in_half_precision(folder: Path) -> None:
    for setting in ("stage 2", "stage 3, offload"):
        for space in ("gradient", "update"):
            path = folder / f"{setting} {space}.h5"
            trained_by_engine(
                setting, "sgd", path, half=True, rectified={"ema": 1.0, "space": space}, update=True
            )


def test_no_rounding_of_half_precision_harms_the_retain_data(tmp_path: Path) -> None:
    two_ranks.run(in_half_precision, tmp_path)
    for path in tmp_path.glob("*.h5"):
        run = open_run(path)
        source = "update" if "update" in path.name else "rectified"
        K = run.gram().sum(axis=1)
        x, r = run.sources.index(source), run.sources.index("retain_ema")
        cosine = K[:, x, r] / np.sqrt(K[:, x, x] * K[:, r, r])
        assert np.all((-cosine if source == "update" else cosine) > -1e-6), path
        assert any(run.rectification()[1]["fired"].any(axis=-1))


def facts() -> dict[str, Any]:
    made = engine("stage 3")
    stand_ins = trainable(made)
    shapes = {p.name: p.shape for p in describe(made)}
    held = {name: tensor.numel() for name, tensor in stand_ins.items()}
    said = {}

    def refuse(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    def share_a_forward() -> None:
        loss = risks(made, 0, ["forget"])["forget"]
        Rectifier(made).backward(objective={"forget": -1.0}, forget=loss, retain=loss * 2)

    refuse("shared", share_a_forward)
    losses = {"objective": {"forget": -1.0}, **risks(made, 0)}
    refuse("accumulate", lambda: Rectifier(made).backward(accumulate=True, **losses))
    other = engine("stage 2")
    for kind, made_anew in (("stage 2", engine("stage 2")), ("stage 3", engine("stage 3"))):
        rectifier = Rectifier(made_anew)

        def besides(made: Any = made_anew, rectifier: Rectifier = rectifier) -> None:
            rectifier.backward(objective={"forget": -1.0}, **risks(made, 0))
            made.backward(risks(made, 1)["retain"])
            made.step()

        refuse(f"besides at {kind}", besides)
    refuse("module", lambda: trainable(other.module))
    state = Rectifier(other).state_dict()
    refuse("pieces", lambda: Rectifier(made).load_state_dict(state))
    refuse("foreign", lambda: Rectifier(Small(), optimizer=other.optimizer))
    SETTINGS["stage 0"] = {"stage": 0}
    refuse("stage", lambda: trainable(engine("stage 0")))
    return {"shapes": shapes, "held": held, "said": said}


def test_what_a_process_holds_and_what_is_refused() -> None:
    first, second = two_ranks.run(facts)
    assert first["shapes"] == {p.name: p.shape for p in describe(Small())}
    for parameter in describe(Small()):
        name = parameter.name
        assert first["held"][name] + second["held"][name] == parameter.numel
        assert first["held"][name] <= -(-parameter.numel // 2)
    for name, pattern in {
        "shared": "a forward of its own at ZeRO stage 3",
        "besides at stage 2": "Found a backward pass of the engine besides",
        "besides at stage 3": "Found a backward pass of the engine besides",
        "accumulate": "`accumulate = False`. Found True",
        "module": "Pass what `deepspeed.initialize` gave",
        "pieces": "pieces that the engine gives this process",
        "foreign": "Found one that has none of",
        "stage": "Found ZeRO stage 0|without an optimizer of ZeRO",
    }.items():
        assert re.search(pattern, first["said"][name]), (name, first["said"][name])
