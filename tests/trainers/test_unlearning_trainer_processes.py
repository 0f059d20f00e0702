"""The trainer for unlearning in two processes, by DDP and by FSDP2."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geffect import Recorder, Rectifier, distributed, open_run
from geffect.objectives import NPO, GradDiff
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import shallow as tiny
from tests.utils import two_ranks
from tests.utils.trainers import whole
from tests.utils.unlearning_runs import alike_items, arguments, ends_of

RECTIFIERS: dict[str, Any] = {
    "ordinary": lambda model: None,
    "recorded": lambda model: None,
    "gru": Rectifier,
    "update": lambda model: Rectifier(model, space="update"),
    "coordinate": lambda model: Rectifier(model, space="update", scope="coordinate"),
}
RUNS = [
    *[("ddp", rectified) for rectified in ("ordinary", "recorded", "gru", "update")],
    *[("fsdp2", rectified) for rectified in ("recorded", "gru", "update", "coordinate")],
]


def end(folder: Path, kind: type[UnlearningTrainer], rectified: str, **options: Any) -> Any:
    """The parameters after training, and what evaluation then says."""
    model: Any = tiny.llama()
    model.model.layers = model.model.layers[:1]  # parts are slow to put together on a CPU
    data = {"forget": alike_items(12, 0), "retain": alike_items(14, 100)}
    path = folder / f"{rectified}.h5"
    trainer = kind(
        model,
        arguments(folder, max_grad_norm=0.5, num_train_epochs=1, **options),
        objective=GradDiff(forget=NPO(beta=0.1), weight=0.01),
        eval_dataset={"odd": alike_items(5, 200)},
        rectifier=RECTIFIERS[rectified](model),
        recorder=None if rectified == "ordinary" else partial(Recorder, path=path),
        **data,
    )
    trainer.train()
    fired = [log.get("rectify/fired") for log in trainer.state.log_history if "loss" in log]
    return {
        "parameters": [whole(p) for p in trainer.model.parameters()],
        "sharded": any(map(distributed.is_sharded, trainer.model.parameters())),
        "evaluated": {n: v for n, v in trainer.evaluate().items() if n.endswith("nll")},
        "fired": fired,
    }


def of_two(folder: str) -> dict[str, Any]:
    """What one of two processes has to say of each kind."""
    return ends_of(folder, RUNS, end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes write, one folder a kind."""
    return tmp_path_factory.mktemp("of_two")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[Any, Any]]:
    """What the two processes have said, by rank: started once, since that takes long."""
    return two_ranks.run(of_two, str(folder))


@pytest.mark.parametrize(("kind", "rectified"), RUNS)
def test_two_processes_end_where_one_does(
    kind: str, rectified: str, said: list[Any], folder: Path, tmp_path: Path
) -> None:
    options = {"per_device_train_batch_size": 4}
    alone = end(tmp_path, UnlearningTrainer, rectified, **options)
    for of_rank in said:
        told = of_rank[kind, rectified]
        assert told["sharded"] == (kind == "fsdp2")
        for a, b in zip(told["parameters"], alone["parameters"], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        assert told["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-5)
        assert told["fired"] == alone["fired"]
    if rectified == "ordinary":
        return
    together, run = (open_run(p / f"{rectified}.h5") for p in (folder / kind, tmp_path))
    assert together.sources == run.sources
    np.testing.assert_allclose(together.gram(), run.gram(), rtol=1e-3, atol=1e-5)
