"""The callback in two processes with a Trainer each, by DDP and by FSDP2."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback

from geffect import RunFileError, StopWhen, distributed, open_run
from geffect.store.writer import RunWriter
from geffect.trainers import GEffectCallback
from tests.utils import shallow as tiny
from tests.utils import trainers, two_ranks
from tests.utils.trainers import Sharding, trainer, whole

PROBES = {"forget": tiny.batch(50, rows=1), "retain": [tiny.batch(s) for s in (51, 52)]}


KINDS = {"ddp": Trainer, "fsdp2": Sharding}


class Counted(TrainerCallback):
    """How often geffect has exchanged something between the processes as each step ends."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at_ends: list[int] = []
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
            patch.setattr(dist, name, self.counting(getattr(dist, name)))

    def counting(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += sys._getframe(1).f_globals["__name__"].startswith("geffect")
            return collective(*args, **kwargs)

        return counted

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.at_ends.append(self.count)


@contextmanager
def full_disk(at_step: int) -> Iterator[None]:
    append = RunWriter.append

    def failing(self: RunWriter, row: Any) -> None:
        if row.step == at_step:
            raise RunFileError(f"Run file `{self.path}` should be writable. Found: no space.")
        append(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "append", failing)
        yield


def of_two(folder: str) -> dict[str, Any]:
    """What one of two processes has to say of each kind."""
    two_ranks.tell_place()
    return {kind: of_kind(kind, Path(folder, kind)) for kind in KINDS}


def of_kind(kind: str, folder: Path) -> dict[str, Any]:
    """Trainings: unwatched, watched, and with files that fail; each error is an end."""
    folder.mkdir(exist_ok=True)
    ends: dict[str, list[np.ndarray]] = {}

    def train(name: str, *callbacks: TrainerCallback, **options: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        data = trainers.samples(6)
        training = trainer(
            folder, tiny.llama(), *callbacks, kind=KINDS[kind], data=data, num_train_epochs=1
        )
        if options:
            path = folder / f"{name}.h5"
            training.add_callback(GEffectCallback(path, probes=PROBES, **options))
        with suppress(RunFileError):
            training.train()
            ends[name] = [whole(p) for p in training.model.parameters()]
        return training

    sharded = map(distributed.is_sharded, train("plain").model.parameters())
    assert any(sharded) == (kind == "fsdp2")
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        train("run", counted, store="full")
    stopped = train("stopped", stop=StopWhen(level=1.0, vocabulary=10**6))
    with full_disk(1):  # which rank 0 alone finds
        train("warned", on_error="warn")
        train("raised", on_error="raise")
    steps = stopped.state.global_step
    return {"ends": ends, "exchanges": np.diff(counted.at_ends).tolist(), "stopped": steps}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes write, one folder a kind."""
    return tmp_path_factory.mktemp("of_two")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    """What the two processes have said, by rank: started once, since that takes long."""
    return two_ranks.run(of_two, str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_record_what_one_does(
    kind: str, said: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    for of_rank in said:
        ends = of_rank[kind]["ends"]
        for name in ("run", "warned"):
            assert all(map(np.array_equal, ends["plain"], ends[name]))
    one = GEffectCallback(tmp_path / "one.h5", probes=PROBES)
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    trainer(tmp_path, tiny.llama(), one, data=trainers.samples(6), **options).train()
    alone, together = open_run(tmp_path / "one.h5"), open_run(folder / kind / "run.h5")
    assert together.steps.tolist() == alone.steps.tolist() == [0, 1]
    assert together.column("n_micro").tolist() == [2, 1]
    assert together.column("clip_scale") == pytest.approx(alone.column("clip_scale"), rel=1e-3)
    for name in ("forget", "retain"):
        assert together.losses()[name] == pytest.approx(alone.losses()[name], rel=1e-4)
    # AdamW divides what is nearly zero by its own size, so that rounding has an effect.
    K = [run.gram().sum(axis=1) for run in (alone, together)]
    np.testing.assert_allclose(K[0][0, :3, :3], K[1][0, :3, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(K[0], K[1], rtol=1e-2, atol=1e-3 * K[0].max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_that_stops_stops_all_processes(
    kind: str, said: list[dict[str, Any]], folder: Path
) -> None:
    assert [of_rank[kind]["stopped"] for of_rank in said] == [1, 1]
    run = open_run(folder / kind / "stopped.h5")
    assert (run.steps.tolist(), run.table("stop")["clause"].tolist()) == ([0], ["level"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("said")
def test_whole_gradients_are_written_by_those_who_hold_them(kind: str, folder: Path) -> None:
    run = open_run(folder / kind / "run.h5")
    assert run.contents.gradients is not None
    assert len(run.contents.gradients.ranges) == (2 if kind == "fsdp2" else 1)
    for step in (0, 1):
        vectors = [np.concatenate(run.gradient(source, step)) for source in run.sources]
        inner = np.array([[a @ b for b in vectors] for a in vectors])
        np.testing.assert_allclose(inner, run.gram()[step].sum(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_fails_is_told_to_all_processes(
    kind: str, said: list[dict[str, Any]], folder: Path
) -> None:
    for of_rank in said:
        assert "raised" not in of_rank[kind]["ends"]
    for name in ("warned", "raised"):
        assert open_run(folder / kind / f"{name}.h5").steps.tolist() == [0]


# For each of two risks how many tokens it is a mean of, and under DDP who has a gradient and the
# sum of it; then the inner products of what is sharded, and whether the row could be written. Of
# what is sharded also, before each risk, whether a process has to look at its model, and before the
# next gradient, whether any part has moved since.
EXCHANGES = {"ddp": 2 * 3 + 1, "fsdp2": 2 * (1 + 1) + 1 + 1 + 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_exchanges_little(kind: str, said: list[dict[str, Any]]) -> None:
    for of_rank in said:
        assert of_rank[kind]["exchanges"] == [EXCHANGES[kind]]
