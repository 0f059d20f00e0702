"""The reference model of a replay: what is remembered of it, and which one it is."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geffect.checkpoints.estimators import same_batch
from geffect.checkpoints.replay import replay
from geffect.objectives import (
    NPO,
    TNPO,
    Component,
    FrozenModel,
    GradDiff,
    Likelihoods,
    Objective,
    Reference,
)
from geffect.objectives import reference as references
from geffect.risk import token_log_probabilities
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.checkpoints import FORGET, GA, RETAIN, digests, effects, loaded, naive

# The reference model


@pytest.mark.parametrize("objective", [NPO(beta=0.5), TNPO(beta=2.0), GradDiff(forget=NPO())])
def test_remembered_likelihoods_are_those_of_the_model(objective: Objective) -> None:
    model, original = tiny.gpt2(0), tiny.gpt2(1)
    forget = FORGET[2]
    batch = {"forget": forget, "retain": RETAIN[1]}
    there = FrozenModel(original.eval())
    remembered = Likelihoods(there, FORGET)
    assert torch.equal(remembered.log_probabilities(forget), there.log_probabilities(forget))
    losses = [objective(model, batch, before) for before in (remembered, there)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    grads = [reference.flat(reference.gradient(model, loss)) for loss in losses]
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def test_a_certain_token_is_remembered_as_certain() -> None:
    class Certain:
        def __call__(self, input_ids: Tensor, **_: Tensor) -> Any:
            logits = 1e4 * nn.functional.one_hot(input_ids.roll(-1, dims=1), 23).float()
            return type("Output", (), {"logits": logits})

    batch = FORGET[0]
    assert (Likelihoods(FrozenModel(Certain()), [batch]).log_probabilities(batch) == 0).all()


def test_the_reference_is_asked_once_for_each_batch_and_let_go(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def count(model: nn.Module, batch: Any) -> Any:
        asked.append(batch)
        return token_log_probabilities(model, batch)

    monkeypatch.setattr(references, "token_log_probabilities", count)
    replay(
        [run_folder / "checkpoint-10", run_folder / "checkpoint-15"], tmp_path / "run.h5",
        objective=NPO(), forget=FORGET, retain=RETAIN,
        reference=run_folder / "checkpoint-5",
    )  # fmt: skip
    assert len(asked) == len(FORGET)


def test_another_reference(run_folder: Path, tmp_path: Path) -> None:
    run = replay(
        run_folder / "checkpoint-10", tmp_path / "run.h5", objective=NPO(beta=0.5),
        forget=FORGET, retain=RETAIN, reference=run_folder / "checkpoint-15",
        estimator=same_batch,
    )  # fmt: skip
    model = loaded(run_folder / "checkpoint-10")
    before, npo = loaded(run_folder / "checkpoint-15"), NPO(beta=0.5)
    rows = [naive(model, npo, f, r, before) for f, r in zip(FORGET, RETAIN, strict=True)]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[10, "unlearning"] == pytest.approx(expected, rel=1e-4)
    assert run.manifest["objective"]["reference"]["is"] == "checkpoint-15"


def test_an_objective_that_needs_all_of_the_reference_keeps_it(
    run_folder: Path, tmp_path: Path
) -> None:
    class Distance(Objective):
        """Minus the squared distance of the logits from those of the reference."""

        reference = "logits"

        def components(
            self, model: Any, batch: Any, reference: Reference | None = None
        ) -> dict[str, Component]:
            logits = model(input_ids=batch["forget"]["input_ids"]).logits
            before = self.compared(reference).logits(batch["forget"])
            return {"forget": Component((logits - before).square().mean(), -1.0)}

    run = replay(
        [run_folder / f"checkpoint-{step}" for step in (5, 10)], tmp_path / "run.h5",
        objective=Distance(), forget=FORGET, retain=RETAIN,
    )  # fmt: skip
    norms = run.gram()[:, :, 0, 0].sum(axis=1)
    assert norms[0] == pytest.approx(0.0, abs=1e-12) and norms[1] > 1e-6


def test_a_first_checkpoint_that_has_unlearned_is_no_reference_in_silence(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(**given: Any) -> str:
        caplog.clear()
        fine: dict[str, Any] = {"objective": NPO(), "forget": FORGET, "retain": RETAIN}
        checkpoint = given.pop("checkpoint", run_folder / "checkpoint-5")
        replay(checkpoint, tmp_path / "run.h5", overwrite=True, **fine | given)
        return caplog.text

    assert "`checkpoint-5` is taken" in told() and "--reference" in caplog.text
    assert told(reference=run_folder / "checkpoint-10") == ""
    assert told(objective=GA) == ""
    shutil.copytree(run_folder / "checkpoint-5", tmp_path / "checkpoint-0")
    shutil.copytree(run_folder / "checkpoint-5", tmp_path / "original")
    assert (
        told(checkpoint=tmp_path / "checkpoint-0") == told(checkpoint=tmp_path / "original") == ""
    )


@pytest.mark.parametrize("needs", ["likelihoods", "logits"])
def test_the_reference_of_adapters_is_the_model_they_are_for(
    adapters: Path, tmp_path: Path, needs: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(NPO, "reference", needs)
    before = digests(adapters)
    run = replay(
        adapters / "checkpoint-8", tmp_path / "run.h5", objective=NPO(beta=0.5),
        forget=FORGET, retain=RETAIN, estimator=same_batch,
    )  # fmt: skip
    import peft

    model = peft.PeftModel.from_pretrained(
        loaded(adapters / "base"), adapters / "checkpoint-8", is_trainable=True
    ).eval()
    original, npo = loaded(adapters / "base"), NPO(beta=0.5)
    rows = [naive(model, npo, f, r, original) for f, r in zip(FORGET, RETAIN, strict=True)]
    expected = np.mean([reference.inner(g["objective"], g["forget"]) for g in rows])
    assert effects(run)[8, "unlearning"] == pytest.approx(expected, rel=1e-4)
    said = run.manifest["objective"]["reference"]
    assert said == {"needs": needs, "is": "base, the model that the adapters are for"}
    assert caplog.text == "" and digests(adapters) == before
