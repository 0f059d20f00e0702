"""Several sources of retain data: their gradients are recorded together, whatever is trained on."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geffect import Recorder, open_run
from geffect.analysis import cosine
from geffect.data.collate import collate
from geffect.objectives import FrozenModel, named
from geffect.trainers.unlearning import UnlearningTrainer
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.unlearning_runs import arguments, items

SETS = {"forget": items(2, 0), "domain": items(2, 100), "general": items(2, 200)}


def cosine_of(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return reference.inner(a, b) / (reference.inner(a, a) * reference.inner(b, b)) ** 0.5


@pytest.mark.parametrize("objective", ["graddiff", "ga+kl"])
@pytest.mark.parametrize("source", ["domain", "general"])
def test_both_retain_gradients_and_their_cosine(
    objective: str, source: str, tmp_path: Path
) -> None:
    (other,) = {"domain", "general"} - {source}
    retain = {"retain": SETS[source], other: SETS[other]}
    trainer = UnlearningTrainer(
        tiny.llama(),
        arguments(
            tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1
        ),
        objective=objective,
        forget=SETS["forget"],
        retain=retain,
        recorder=partial(Recorder, path=tmp_path / "run.h5"),
    )
    trainer.train()
    run = open_run(tmp_path / "run.h5")
    assert {"objective", "forget", "retain", other} <= {*run.sources}
    model = tiny.llama()
    of = {
        name: reference.gradient(model, reference.nll(model, collate(SETS[name])))
        for name in ("domain", "general")
    }
    found = cosine(run, "retain", other, by="model").set_index("step")["value"]
    assert found.iloc[0] == pytest.approx(cosine_of(of["domain"], of["general"]), rel=1e-5)
    # What is trained on is the set that is called retain, and no other.
    pair = {"forget": collate(SETS["forget"]), "retain": collate(SETS[source])}
    loss = named(objective)(model, pair, FrozenModel(tiny.llama().eval()))
    expected = reference.gradient(model, loss)
    step = run.gram()[0].sum(0)
    u, r = run.sources.index("objective"), run.sources.index("retain")
    assert float(step[u, u]) == pytest.approx(reference.inner(expected, expected), rel=1e-4)
    assert float(step[u, r]) == pytest.approx(reference.inner(expected, of[source]), rel=1e-3)


def test_weights_name_the_source_that_is_trained_on() -> None:
    model = tiny.llama()
    batches = {name: collate(of_set) for name, of_set in SETS.items()}
    weighted = UnlearningTrainer(
        model, arguments(Path("unused")), objective={"forget": -1.0, "general": 1.0},
        forget=SETS["forget"], retain={"retain": SETS["domain"], "general": SETS["general"]},
    ).objective  # fmt: skip
    expected = reference.nll(model, batches["general"]) - reference.nll(model, batches["forget"])
    assert torch.allclose(weighted(model, batches), expected, rtol=1e-6, atol=1e-6)
