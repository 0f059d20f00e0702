"""What cannot be rectified is refused before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Rectifier
from geffect.trainers import rectify
from tests.utils import shallow as tiny
from tests.utils import unlearning_trainers as kinds
from tests.utils.rectified_trainers import rectified
from tests.utils.unlearning_trainers import (  # fmt: skip
    RETAIN,
    GradAscent,
    unlearner,
)


def ends(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def refused(trainer: Any, match: str, error: Any = ValueError, **told: Any) -> None:
    kind, keys = type(trainer), vars(trainer).keys()
    with pytest.raises(error, match=match):
        rectify(trainer, told.pop("rectifier", Rectifier(trainer.model)), **told)
    assert type(trainer) is kind
    assert vars(trainer).keys() == keys


def test_what_cannot_be_rectified_is_refused_before_training(tmp_path: Path) -> None:
    refused(unlearner(tmp_path, kind=GradAscent), r"`retain` should be given .* Found none in Grad")
    refused(unlearner(tmp_path, remove_unused_columns=True), "remove_unused_columns=False")
    trainer = unlearner(tmp_path)
    forget = Rectifier(trainer.model, part="forget")
    refused(trainer, r'left out with part="forget": GradDiff has', rectifier=forget, retain=RETAIN)
    refused(trainer, "should have `labels`", retain=[{"input_ids": torch.ones(1, 2)}])
    refused(trainer, "a list of batches or a loader", TypeError, retain=iter(RETAIN))
    rectify(trainer, Rectifier(trainer.model))
    refused(trainer, r"should have one rectifier.*detach\(\)")


def test_two_rectifiers_of_one_optimizer_are_refused(tmp_path: Path) -> None:
    trainer = unlearner(tmp_path)
    trainer.create_optimizer()
    first = Rectifier(trainer.model, space="update", optimizer=trainer.optimizer)
    rectify(trainer, Rectifier(trainer.model, space="update"))
    with pytest.raises(ValueError, match="should have one rectifier"):
        trainer.train()
    first.detach()
    trainer.train()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (kinds.Sharing, r"forward pass of its own.* Found \d+ operations.*retain= batches"),
        (kinds.Silent, r"The loss of Silent should call.*Found no call.*retain=\s+batches"),
        (kinds.Detached, r"should return a tensor with a graph.*retain= batches"),
    ],
)
def test_a_retain_term_that_cannot_be_cut_is_refused(kind: Any, match: str, tmp_path: Path) -> None:
    trainer = rectified(tmp_path, kind=kind)
    before = ends(trainer.model)
    with pytest.raises((ValueError, RuntimeError), match=match):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    instead = rectified(tmp_path, kind=kind, retain=RETAIN)
    instead.train()
    assert len(instead.reports.all) == 6


def test_the_rectifier_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = unlearner(tmp_path)
    rectify(trainer, Rectifier(tiny.gpt2()))
    with pytest.raises(ValueError, match="should step the parameters of `model`"):
        trainer.train()
