"""A replay whose objective is differentiated where a checkpoint has relearned, beside autograd."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect import Relearned, open_run, relearned
from geffect.analysis import g_effect
from geffect.checkpoints.estimators import full, reference_ema, same_batch, split_batch
from geffect.checkpoints.replay import replay
from geffect.objectives import KL, NPO, FrozenModel, GradDiff, Regularised, WeightedGradientAscent
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.checkpoints import FORGET, GA, RETAIN, digests, loaded

AT = Relearned(radius=0.05, steps=2)
WGA = WeightedGradientAscent()
CHECKPOINT = "checkpoint-5"

Part = Callable[[nn.Module, Any, Any], Tensor]
"""Of a model and a batch of either set."""


def ascent(model: nn.Module, forget: Any, retain: Any) -> Tensor:
    return -reference.nll(model, forget)


def weighted(model: nn.Module, forget: Any, retain: Any) -> Tensor:
    return WGA(model, {"forget": forget})


def descent(model: nn.Module, forget: Any, retain: Any) -> Tensor:
    return 2 * reference.nll(model, retain)


def divergence(model: nn.Module, forget: Any, retain: Any) -> Tensor:
    return 2 * KL()(model, {"retain": retain}, FrozenModel(loaded(Path(model.name_or_path))))


OBJECTIVES: dict[str, tuple[Any, Part, Part | None]] = {
    "ascent": (GA, ascent, None),
    "wga": (WGA, weighted, None),
    "wga+gd": (GradDiff(forget=WGA, weight=2.0), weighted, descent),
    "wga+kl": (Regularised(WGA, KL(), weight=2.0), weighted, divergence),
}
"""Each with what of it is taken at the copy, and what at theta."""

ascends = pytest.mark.filterwarnings("ignore:An objective that is taken at a relearned copy")
few = pytest.mark.filterwarnings("ignore:A step should have 8 rows")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.llama(seed=5, tied=True).save_pretrained(folder / CHECKPOINT)
    return folder


def replayed(folder: Path, to: Path, objective: Any, **options: Any) -> Any:
    return replay(
        folder / CHECKPOINT,
        to / "run.h5",
        **{
            "objective": objective,
            "forget": FORGET,
            "retain": RETAIN,
            "overwrite": True,
            **options,
        },
    )


def scored(batch: Any) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def mean_over(batches: Any, loss: Callable[[Any], Tensor]) -> Tensor:
    """The token mean over a set, in one graph."""
    count = sum(map(scored, batches))
    return torch.stack([loss(batch) * scored(batch) / count for batch in batches]).sum()


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return reference.flat(reference.gradient(model, loss)).double()


def naive(model: nn.Module, name: str, forget: Any, retain: Any) -> Tensor:
    """The gradients of the objective and both risks, as rows: token means over batches."""
    _, moved, stays = OBJECTIVES[name]
    rows = [
        gradient(model, mean_over(batches, partial(reference.nll, model)))
        for batches in (forget, retain)
    ]
    learned = partial(mean_over, FORGET, partial(reference.nll, model))
    with relearned(model, learned, radius=AT.radius, steps=AT.steps):
        u = gradient(model, mean_over(forget, lambda batch: moved(model, batch, None)))
    if stays is not None:
        u = u + gradient(model, mean_over(retain, lambda batch: stays(model, None, batch)))
    return torch.stack([u, *rows])


@ascends
@few
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_that_at_the_copy(name: str, folder: Path, tmp_path: Path) -> None:
    before, model = digests(folder), loaded(folder / CHECKPOINT)
    objective = OBJECTIVES[name][0]
    own = [naive(model, name, [f], [r]) for f, r in zip(FORGET, RETAIN, strict=True)]
    expected = {
        same_batch: [G @ G.T for G in own],
        split_batch: [(a @ b.T + b @ a.T) / 2 for a, b in zip(own[::2], own[1::2], strict=True)],
        full: [G @ G.T for G in [naive(model, name, FORGET, RETAIN)]],
    }
    for estimator, rows in expected.items():
        run = replayed(folder, tmp_path, objective, estimator=estimator, relearned=AT)
        assert run.sources == ("objective", "forget", "retain")
        np.testing.assert_allclose(
            run.gram().sum(1), [torch.stack(rows).mean(0)], rtol=1e-3, atol=1e-5
        )
    assert digests(folder) == before


def test_the_mean_over_many_batches_is_that_of_one(folder: Path, tmp_path: Path) -> None:
    """With rows for its uncertainty, whose mean it is."""
    run = replayed(
        folder, tmp_path, WGA, forget=FORGET * 2, retain=RETAIN * 2, estimator=full, relearned=AT
    )
    G = naive(loaded(folder / CHECKPOINT), "wga", FORGET, RETAIN)
    assert len(run.rows) == 1 and run.rows[0] == 16
    np.testing.assert_allclose(run.gram().sum(1), [G @ G.T], rtol=1e-3, atol=1e-5)


@few
def test_the_file_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    replayed(folder, tmp_path, OBJECTIVES["wga+kl"][0], relearned=AT)
    run = open_run(tmp_path / "run.h5")
    assert run.manifest["relearned"] == {
        "source": "objective",
        "radius": 0.05,
        "unit": "theta",
        "steps": 2,
        "relearns": "the forget set",
        "stays": ["retain", "objective.kl"],
    }
    assert run.manifest["losses"]["objective"] == "loss"
    assert g_effect(run)["score"].str.contains("objective at a relearned copy").all()
    replayed(folder, tmp_path, WGA)
    plain = open_run(tmp_path / "run.h5")
    assert "relearned" not in plain.manifest
    assert not g_effect(plain)["score"].str.contains("copy").any()


@ascends
@few
@pytest.mark.parametrize(
    ("name", "estimator"), [("ascent", same_batch), ("wga", full), ("wga", reference_ema)]
)
def test_without_a_radius_it_is_the_gradient_at_the_checkpoint(
    name: str, estimator: Any, folder: Path, tmp_path: Path
) -> None:
    found = [
        replayed(folder, tmp_path, OBJECTIVES[name][0], estimator=estimator, relearned=way)
        .gram()
        .tobytes()
        for way in (None, Relearned(radius=0.0), Relearned(radius=1.0, steps=0))
    ]
    assert found[0] == found[1] == found[2]


@few
def test_each_checkpoint_relearns_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(
        "geffect.checkpoints.batch_gradients.Sources._risk_to_forget",
        lambda self: asked.append(1.0) or sum(p.square().sum() for p in self._model.parameters()),
    )
    replayed(folder, tmp_path, WGA, estimator=full, relearned=AT)
    assert len(asked) == AT.steps


@few
@pytest.mark.parametrize("objective", [GA, NPO(), GradDiff()])
def test_an_objective_without_a_bound_is_told(objective: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="should saturate.*\\.81.*\\.230") as told:
        replayed(folder, tmp_path, objective, estimator=full, relearned=AT)
    assert any(warning.filename == __file__ for warning in told)


@few
def test_copies_that_no_replay_makes(folder: Path, tmp_path: Path) -> None:
    own = Relearned(radius=0.1, loss=lambda: torch.zeros(()))
    for way, error, says in (
        (0.1, TypeError, "`relearned` should be a geffect.Relearned. Found `float`"),
        (own, ValueError, "should have no `loss`: each checkpoint relearns the whole forget set"),
    ):
        with pytest.raises(error, match=says):
            replayed(folder, tmp_path, WGA, relearned=way)
    with pytest.raises(ValueError, match="should have a part that is of the forget set"):
        replayed(folder, tmp_path, {"retain": 1.0}, estimator=full, relearned=AT)
