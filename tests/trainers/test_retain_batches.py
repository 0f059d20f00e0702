"""Retain batches that say what should stay, beside a trainer's own loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.trainers.retain_batches import RetainBatches
from tests.utils import shallow as tiny
from tests.utils import unlearning_trainers as kinds
from tests.utils.rectified_trainers import gradient, gru, rectified, shuffled, stepped, windows
from tests.utils.trainers import same
from tests.utils.unlearning_trainers import (
    RETAIN,
    SGD,
    GradAscent,
    GradDiff,
    apart,
    opposed_pairs,
    unlearner,
)  # fmt: skip


def risk(model: nn.Module, batches: Sequence[Any], parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of the mean over all tokens of all batches."""
    sums = [
        kinds.cross_entropy(model(input_ids=b["input_ids"]).logits, b)
        * (b["labels"][:, 1:] != -100).sum()
        for b in batches
    ]
    count = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    return gradient(sum(sums) / count, parameters)


@pytest.mark.parametrize("kind", [GradAscent, kinds.CEU, GradDiff])
def test_retain_batches_say_what_should_stay(kind: Any, tmp_path: Path) -> None:
    told: dict[str, Any] = {"kind": kind, "data": opposed_pairs(kind), **SGD}
    trainer = rectified(tmp_path, retain=RETAIN, **told)
    trainer.train()
    hand = unlearner(tmp_path, **told)
    model, parameters = hand.model, [*hand.model.parameters()]
    average, fired = None, 0
    for step, window in enumerate(windows(trainer.data_collator.batches, epochs=2, each=2)):
        u = sum(gradient(hand.compute_loss(model, b), parameters) for b in window) / len(window)
        own = [RETAIN[(2 * step + micro) % 5] for micro in range(2)]  # also in a shorter window
        r = risk(model, own, parameters)
        average = r if average is None else 0.8 * r + 0.2 * average
        fired += bool(u @ average < 0)
        stepped(model, gru(u, average), rate=0.05, limit=0.1)
    assert sum(trainer.reports.fired) == fired > 0
    assert apart(trainer, model) < 1e-8


def test_retain_batches_leave_no_trace_in_the_training(tmp_path: Path) -> None:
    told: dict[str, Any] = {"kind": GradAscent}
    plain = unlearner(tmp_path, tiny.llama(dropout=0.3), **told)
    plain.train()
    watched = rectified(
        tmp_path, model=tiny.llama(dropout=0.3), rectifier={"rule": None}, retain=shuffled(), **told
    )
    watched.train()
    assert same(plain.model.state_dict(), watched.model.state_dict())
    assert same(plain.optimizer.state_dict(), watched.optimizer.state_dict())


def test_a_row_of_batches_is_the_same_wherever_one_begins() -> None:
    def read(first: int, count: int, row: RetainBatches) -> list[list[int]]:
        return [b["input_ids"].flatten().tolist() for b in row.window(first, count=count)]

    straight = read(0, 11, RetainBatches(shuffled()))
    assert len({str(batch) for batch in straight}) > 6  # each pass has an order of its own
    row = RetainBatches(shuffled())
    assert read(0, 4, row) + read(4, 5, row) + read(9, 2, row) == straight
    assert read(5, 3, row) == read(5, 3, RetainBatches(shuffled())) == straight[5:8]


def test_a_window_that_was_left_in_the_midst_is_begun_anew() -> None:
    batches = [{"labels": torch.full((1, 2), i)} for i in range(5)]
    row = RetainBatches(batches)
    list(row.window(0, count=3))
    next(iter(row.window(3, count=2)))  # and then a pass raised
    again = [int(batch["labels"][0, 0]) for batch in row.window(3, count=2)]
    assert again == [3, 4]
