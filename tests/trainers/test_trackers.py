"""What trackers get: scores of each layer, and the sheet as an image; training does not notice."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils as integrations

from geffect import open_run
from geffect.analysis import cosine, g_effect
from geffect.trainers import GEffectCallback, Trackers
from tests.utils import shallow as tiny
from tests.utils.trainers import same, trainer

PROBES = {"forget": [tiny.batch(50, rows=1)], "retain": tiny.batch(52, rows=2)}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where TensorBoard's callback writes."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return tmp_path / "board"


def events(board: Path) -> Any:
    """What TensorBoard reads there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(board), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


class Wandb:
    """What is called of wandb, and what it was told. No request leaves."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.run = SimpleNamespace(summary={})

    def log(self, told: dict[str, Any]) -> None:
        self.told.append(told)

    def Image(self, drawn: np.ndarray) -> SimpleNamespace:
        assert drawn.dtype == np.uint8
        return SimpleNamespace(drawn=drawn)


def reporting_to(wandb: Wandb) -> integrations.WandbCallback:
    """The callback of transformers, as it is after it has begun a run."""
    callback = object.__new__(integrations.WandbCallback)
    callback._wandb, callback._initialized = wandb, True
    callback._log_model = integrations.WandbLogModel.FALSE
    return callback


class Simple(integrations.MLflowCallback):  # type: ignore[misc]
    """A tracker that takes scores and no image."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def setup(self, *_: Any) -> None: ...

    def on_train_begin(self, *_: Any, **__: Any) -> None: ...

    def on_train_end(self, *_: Any, **__: Any) -> None: ...

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        self.told.append(logs)

    def __del__(self) -> None: ...


def drawn_numbers() -> tuple[Any, ...]:
    return torch.get_rng_state(), *map(str, (random.getstate(), np.random.get_state()))


def test_training_ends_bitwise_as_without_trackers(tmp_path: Path, board: Path) -> None:
    ends = []
    for name in ("none", "own", "ours"):
        watching: list[TrainerCallback] = []
        if name != "none":
            asked = Trackers(sheet_every=2) if name == "ours" else None
            watching.append(GEffectCallback(tmp_path / f"{name}.h5", probes=PROBES, trackers=asked))
        to = [] if name == "none" else ["tensorboard"]
        training = trainer(tmp_path, tiny.llama(dropout=0.3), *watching, report_to=to)
        random.seed(1), np.random.seed(1)
        training.train()
        ends.append((training, drawn_numbers()))
    (first, numbers), *others = ends
    for other, further in others:
        assert same(first.model.state_dict(), other.model.state_dict())
        assert same(first.optimizer.state_dict(), other.optimizer.state_dict())
        assert same(list(numbers), list(further))
    own, ours = (training.state.log_history for training, _ in ends[1:])
    assert [entry.keys() for entry in own] == [entry.keys() for entry in ours], (
        "nothing but the trackers is given more"
    )


@pytest.mark.parametrize("by", ["layer", "group"])
def test_tensorboard_has_the_scores_of_each_block(tmp_path: Path, board: Path, by: str) -> None:
    path = tmp_path / "run.h5"
    asked = GEffectCallback(path, probes=PROBES, every=2, trackers=Trackers(by, sheet_every=None))
    trainer(tmp_path, tiny.llama(), asked, report_to=["tensorboard"]).train()
    found, run = events(board), open_run(path)
    scores = {
        ("unlearning_g_effect", "forget"): g_effect(run, by=by).query("effect == 'unlearning'"),
        ("retaining_g_effect", "retain"): g_effect(run, by=by).query("effect == 'retaining'"),
        ("cosine_objective_forget", "forget"): cosine(run, "objective", "forget", by=by),
        ("cosine_objective_retain", "retain"): cosine(run, "objective", "retain", by=by),
    }
    told = {tag for tag in found.Tags()["scalars"] if tag.count("/") == 3}
    assert len(told) == len(scores) * g_effect(run, by=by)[by].nunique()
    for (name, _), table in scores.items():
        for block, own in table.groupby(by, observed=True):
            tag = f"train/geffect/{str(block).replace(' ', '_').replace('+', '_')}/{name}"
            written = found.Scalars(tag)
            assert [event.step for event in written] == (own["step"] + 1).tolist()
            np.testing.assert_allclose(
                [event.value for event in written], own["value"], rtol=1e-5, atol=1e-30
            )
    assert found.Tags()["images"] == []


def test_tensorboard_has_the_sheet_as_an_image(tmp_path: Path, board: Path) -> None:
    from PIL import Image

    asked = Trackers(sheet_every=2)
    watching = GEffectCallback(tmp_path / "run.h5", probes=PROBES, trackers=asked)
    trainer(tmp_path, tiny.llama(), watching, report_to=["tensorboard"]).train()
    images = events(board).Images("geffect/sheet")
    assert [image.step for image in images] == [2, 4, 6]
    for image in images:
        (tmp_path / "one.png").write_bytes(image.encoded_image_string)
        pixels = np.asarray(Image.open(tmp_path / "one.png"))
        assert pixels.shape == (image.height, image.width, 3)
        assert image.width == 200 * 6.9, "text of 7 points on a page, wherever it is shown"
        assert 0.5 < (pixels == 255).mean() < 0.99, "it is drawn, on white"


def test_wandb_has_scores_and_sheet(tmp_path: Path) -> None:
    path, wandb = tmp_path / "run.h5", Wandb()
    watching = GEffectCallback(path, probes=PROBES, trackers=Trackers("model", sheet_every=3))
    training = trainer(tmp_path, tiny.llama(), watching)
    training.add_callback(reporting_to(wandb))  # behind ours
    training.train()
    images = {
        t["train/global_step"]: t["geffect/sheet"] for t in wandb.told if "geffect/sheet" in t
    }
    assert [*images] == [3, 6] and all(image.drawn.shape[2] == 3 for image in images.values())
    table = g_effect(open_run(path), by="model").query("effect == 'retaining'")
    name = "train/geffect/model/retaining_g_effect"
    told = {t["train/global_step"]: t[name] for t in wandb.told if name in t}
    assert [*told] == (table["step"] + 1).tolist()
    np.testing.assert_allclose([*told.values()], table["value"])


def test_other_trackers_get_scores_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Simple()
    watching = GEffectCallback(tmp_path / "run.h5", probes=PROBES, trackers=Trackers())
    training = trainer(tmp_path, tiny.llama(), watching)
    training.add_callback(one)
    training.train()
    assert sum("geffect/head/unlearning_g_effect" in told for told in one.told) == 6
    warned = [r.getMessage() for r in caplog.records if "Images go to" in r.getMessage()]
    assert len(warned) == 1 and "Simple, with scores alone" in warned[0]


def test_scores_of_adapters_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, one = peft.get_peft_model(tiny.llama(), config), Simple()
    asked = Trackers(sheet_every=None)
    watching = GEffectCallback(tmp_path / "run.h5", probes=PROBES, trackers=asked, log=False)
    training = trainer(tmp_path, model, watching)
    training.add_callback(one)
    training.train()
    names = {name for told in one.told for name in told if name.startswith("geffect")}
    assert names and all(name.startswith("geffect/adapter/layer_0/") for name in names)


def test_a_block_that_is_not_stepped_has_no_score(tmp_path: Path) -> None:
    model, one = tiny.llama(), Simple()
    asked = Trackers(sheet_every=None)
    watching = GEffectCallback(tmp_path / "run.h5", probes=PROBES, trackers=asked)
    training = trainer(tmp_path, model, watching)
    head = [p for name, p in model.named_parameters() if "lm_head" in name]
    others = [p for p in model.parameters() if not any(p is h for h in head)]
    training.optimizer = torch.optim.SGD(others, lr=1e-3)
    training.add_callback(one)
    training.train()
    told = [t for t in one.told if "geffect/head/unlearning_g_effect" in t]
    assert told and all(np.isnan(t["geffect/head/unlearning_g_effect"]) for t in told)
    assert all(np.isfinite(t["geffect/embedding/unlearning_g_effect"]) for t in told)


def test_a_sheet_that_cannot_be_drawn_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("geffect.plots.sheet", broken)
    wandb = Wandb()
    watching = GEffectCallback(tmp_path / "run.h5", probes=PROBES, trackers=Trackers(sheet_every=1))
    training = trainer(tmp_path, tiny.llama(), watching)
    training.add_callback(reporting_to(wandb))
    training.train()
    assert len([r for r in caplog.records if "no ink" in r.getMessage()]) == 1
    assert not any("geffect/sheet" in told for told in wandb.told)
    assert open_run(tmp_path / "run.h5").state == "complete"


# Refusals, all before the first step.


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Any]:
    def asking(trackers: Trackers, **how: Any) -> GEffectCallback:
        return GEffectCallback(tmp_path / "run.h5", **{"probes": PROBES, **how}, trackers=trackers)

    yield asking
    assert not (tmp_path / "run.h5").exists()


def test_a_trainer_that_reports_nowhere_is_refused(tmp_path: Path, refused: Any) -> None:
    training = trainer(tmp_path, tiny.llama(), refused(Trackers()))
    with pytest.raises(ValueError, match=r"should find a tracker .* Found `report_to = \[\]`"):
        training.train()


def test_a_sheet_of_other_probes_is_refused(tmp_path: Path, refused: Any) -> None:
    asked = refused(Trackers(), probes={"facts": PROBES["retain"]})
    training = trainer(tmp_path, tiny.llama(), asked)
    training.add_callback(Simple())
    with pytest.raises(ValueError, match="Found no forget and no retain"):
        training.train()


@pytest.mark.parametrize("every", [0, -1, 2.5, "3", True])
def test_a_sheet_every_so_many_steps(every: Any) -> None:
    with pytest.raises(ValueError, match="`sheet_every` should be a whole number"):
        Trackers(sheet_every=every)


@pytest.mark.parametrize("by", ["expert", "head", "", "Layer"])
def test_other_blocks_are_refused(by: str) -> None:
    with pytest.raises(ValueError, match="`by` should be one of parameter, layer"):
        Trackers(by)
