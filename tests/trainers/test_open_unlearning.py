"""The trainers of open-unlearning, with the three lines of its page, on a Trainer of now."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from geffect import Rectifier, open_run
from geffect.trainers import GEffectCallback, rectify
from tests.utils import tiny
from tests.utils import unlearning_trainers as kinds
from tests.utils.trainers import same
from tests.utils.unlearning_trainers import unlearner

ELEVEN = [
    kinds.GradAscent, kinds.GradDiff, kinds.NPO, kinds.DPO, kinds.SimNPO, kinds.RMU, kinds.UNDIAL,
    kinds.CEU, kinds.SatImp, kinds.WGA, kinds.PDU,
]  # fmt: skip

PROBES = {"forget": [tiny.batch(50)], "retain": [tiny.batch(51)]}


def theirs(kind: Any) -> Any:
    """The class with the signature that it has there."""

    class Theirs(kind):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            return kind.compute_loss(self, model, inputs, return_outputs)

    return Theirs


def adapted(kind: type[Trainer]) -> Any:
    """The three lines of the page."""

    class Adapted(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            return super().compute_loss(model, inputs, return_outputs)

    return Adapted


def test_without_the_three_lines_a_trainer_of_now_calls_it_wrongly(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_items_in_batch"):
        unlearner(tmp_path, kind=theirs(kinds.GradDiff), max_steps=1).train()


@pytest.mark.parametrize("kind", ELEVEN, ids=lambda kind: kind.__name__)
def test_each_is_recorded_and_rectified(kind: Any, tmp_path: Path) -> None:
    made = adapted(theirs(kind))
    options = {"max_steps": 2, "gradient_accumulation_steps": 1}
    plain = unlearner(tmp_path / "plain", kind=made, **options)
    plain.train()
    path = tmp_path / "run.h5"
    watched = unlearner(
        tmp_path / "watched", None, GEffectCallback(path, probes=PROBES), kind=made, **options
    )
    watched.train()
    assert same(plain.model.state_dict(), watched.model.state_dict())
    assert open_run(path).steps.tolist() == [0, 1]
    rectified = unlearner(tmp_path / "rectified", kind=made, **options)
    has_term = hasattr(made, "compute_retain_loss")
    retain = None if has_term else PROBES["retain"]
    rectify(rectified, Rectifier(rectified.model), retain=retain)
    rectified.train()
    assert rectified._rectified.rectifier.report is not None
    assert has_term == (kind.__name__ not in ("GradAscent", "CEU"))
