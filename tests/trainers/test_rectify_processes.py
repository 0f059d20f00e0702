"""Rectified Trainers in two processes, by DDP and by FSDP2, against one that has all the data."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from geffect import Rectifier, distributed
from geffect.projection import State
from geffect.trainers import rectify
from tests.utils import shallow as tiny
from tests.utils import two_ranks
from tests.utils.trainers import At, Sharding, stop, whole
from tests.utils.unlearning_trainers import (
    RETAIN,
    SGD,
    GradAscent,
    GradDiff,
    Reports,
    opposed_pairs,
    unlearner,
)  # fmt: skip


class ShardedGradDiff(GradDiff, Sharding):
    """GradDiff on a model that is in parts."""


class ShardedGradAscent(GradAscent, Sharding):
    """GA on a model that is in parts."""


KINDS = {"ddp": (GradDiff, GradAscent), "fsdp2": (ShardedGradDiff, ShardedGradAscent)}

CASES: dict[str, dict[str, Any]] = {
    "total": {},
    "forget": {"part": "forget", "scope": "layer"},
    "select": {"select": 0.5},
    "update": {"space": "update", "scope": "coordinate"},
    "retain": {"scope": "parameter", "measure_update": True},
}
"""The options of a rectifier; the last has its retain gradient from batches."""

# Rounded at random, which is another random on each part: this one is compared with itself.
HALF = {"select": 0.5, "state": State(torch.bfloat16)}

SAVING = {"save_strategy": "steps", "save_steps": 2}


def small() -> Any:
    """A Llama of one layer: parts of a model are slow to put together on a CPU."""
    model: Any = tiny.llama()
    model.model.layers = model.model.layers[:1]
    return model


def train(folder: Path, case: str, kinds: Any, *callbacks: Any, processes: int, **told: Any) -> Any:
    """A trainer that had two micro-batches a step on each of two processes, or four on one."""
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 4 // processes, "num_train_epochs": 1, **SGD, **told
    }  # fmt: skip
    resume = options.pop("resume", None)
    ascent, model = case == "retain", small()
    trainer = unlearner(
        folder, model, *callbacks, kind=kinds[ascent], data=opposed_pairs(count=10),
        made={} if ascent else {"alpha": 0.4}, **options,
    )  # fmt: skip
    rectifier = Rectifier(trainer.model, **CASES.get(case, HALF))
    rectify(trainer, rectifier, retain=RETAIN if case == "retain" else None)
    reports = Reports(rectifier)
    trainer.add_callback(reports)
    trainer.train(resume_from_checkpoint=resume)
    trainer.reports = reports
    return trainer


def told_by(trainer: Any) -> dict[str, Any]:
    return {
        "parameters": [whole(p) for p in trainer.model.parameters()],
        "fired": [report.fired for report in trainer.reports.all],
        "inner": [report.inner_before for report in trainer.reports.all],
        "fresh": [report.applied_fresh for report in trainer.reports.all],
        "logged": {
            name for entry in trainer.state.log_history for name in entry if "rectify/" in name
        },
    }


def of_two(layout: str, folder: str) -> dict[str, Any]:
    """What one of two processes has to say of each case."""
    return {case: end(layout, folder, case) for case in CASES}


def stopped_of_two(layout: str, folder: str) -> list[dict[str, Any]]:
    """And of a training that was not stopped, and one that was."""
    straight = end(layout, folder, "half")
    end(layout, folder, "half", At("on_step_end", 2, stop), **SAVING)
    return [straight, end(layout, folder, "half", resume=True, **SAVING)]


def end(layout: str, folder: str, case: str, *callbacks: Any, **told: Any) -> dict[str, Any]:
    two_ranks.tell_place(**told.pop("place", {}))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = train(Path(folder), case, KINDS[layout], *callbacks, processes=2, **told)
    sharded = any(map(distributed.is_sharded, trainer.model.parameters()))
    assert sharded == (layout == "fsdp2")
    return told_by(trainer)


@pytest.fixture(scope="module", params=KINDS)
def said(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes have said, by rank: started once, since that takes long."""
    return two_ranks.run(of_two, request.param, str(tmp_path_factory.mktemp("of_two")))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(
    case: str, said: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = told_by(train(tmp_path, case, (GradDiff, GradAscent), processes=1))
    before = [whole(p) for p in small().parameters()]
    assert max(np.abs(a - b).max() for a, b in zip(before, alone["parameters"], strict=True)) > 1e-4
    assert len(alone["fired"]) == 3
    assert np.any(alone["fired"])
    for of_rank in (of_rank[case] for of_rank in said):
        assert of_rank["fired"] == alone["fired"]
        np.testing.assert_allclose(of_rank["inner"], alone["inner"], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(of_rank["fresh"], alone["fresh"], rtol=1e-3, atol=1e-7)
        for two, one in zip(of_rank["parameters"], alone["parameters"], strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)
        assert "rectify/cosine_before" in of_rank["logged"]
    assert all(map(np.array_equal, *[of_rank[case]["parameters"] for of_rank in said]))


@pytest.mark.parametrize("layout", KINDS)
def test_two_processes_that_were_stopped_end_where_they_would_have(
    layout: str, tmp_path: Path
) -> None:
    for straight, resumed in two_ranks.run(stopped_of_two, layout, str(tmp_path)):
        assert resumed["fired"] == straight["fired"][2:]
        assert all(map(np.array_equal, resumed["parameters"], straight["parameters"]))


def on_two_nodes(folder: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A training on two nodes with a disk each, and one that was stopped and resumed.

    And what is said where the second has lost the state of its rectifier.
    """
    node = {"place": {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}}
    disk, options = Path(folder, str(distributed.rank())), {"save_on_each_node": True, **SAVING}
    straight = end("ddp", str(disk), "total", **node)
    end("ddp", str(disk), "total", At("on_step_end", 2, stop), **options, **node)
    resume = disk / "out" / "checkpoint-2"
    if distributed.rank() == 1:  # to whom transformers 5 leaves all but the weights
        weights = Path(folder, "0", "out", "checkpoint-2", "model.safetensors")
        shutil.copy(weights, resume)
    resumed = end("ddp", str(disk), "total", resume=str(resume), **options, **node)
    if distributed.rank() == 1:
        (resume / "rectifier.pt").unlink()
    with pytest.raises(ValueError) as refusal:
        end("ddp", str(disk), "total", resume=str(resume), **options, **node)
    return straight, resumed, str(refusal.value)


def test_nodes_with_disks_of_their_own_go_on_alike_or_not_at_all(tmp_path: Path) -> None:
    for straight, resumed, refusal in two_ranks.run(on_two_nodes, str(tmp_path)):
        assert resumed["fired"] == straight["fired"][2:]
        assert all(map(np.array_equal, resumed["parameters"], straight["parameters"]))
        assert "on every process, or on none" in refusal
