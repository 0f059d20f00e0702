"""Models of which it is known whether they forgot, as an audit builds and reads them by itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from geffect.audit.auditing import audit
from geffect.audit.controls import CONTROLS, ascended, head_only, in_int4_cells, shuffled
from geffect.audit.quantisers import Int4
from geffect.audit.rounding import int4_cells, rounded
from geffect.demo.audited import audited_sets
from geffect.demo.config import QUICK
from tests.utils import tiny
from tests.utils.audits import BUDGET, OF_CONTROLS, items
from tests.utils.controls import RATE, Subject
from tests.utils.fixtures import Study
from tests.utils.models import bits

BRIEF = replace(OF_CONTROLS, relearning=replace(OF_CONTROLS.relearning, steps=(2,)), taught=(1,))


@pytest.fixture(scope="module")
def report(quick_study: Study) -> Any:
    subject = Subject.of(quick_study.out / "models", 0, QUICK)
    sets = audited_sets(subject.corpus, subject.tokenizer)
    told: list[float] = []
    found = audit(
        subject.retrained,
        subject.original,
        subject.retrained,
        sets=sets,
        budget=BRIEF,
        learning_rate=RATE,
        batteries=["memorised", "hidden", "utility"],
        controls=True,
        report=lambda what, done: told.append(done),
    )
    assert told == sorted(told) and told[-1] == 1.0
    return found


def test_every_control_is_built_and_read_right(report: Any) -> None:
    table = report.controls.set_index("control")
    assert [*table.index] == ["this model", *(control.name for control in CONTROLS)]
    wrong = table[(table["should"] != "") & (table["should"] != table["reads"])]
    assert wrong.empty, wrong.to_string()
    assert table.loc["head only", "attack"] == "decoder swap"
    assert table.loc["int4 cells", "attack"] == "rounding to int4"
    assert (table.loc[["head only", "int4 cells"], "share"] > 0.9).all()


def test_the_model_itself_stands_beside_them(report: Any) -> None:
    table = report.controls.set_index("control")
    assert table.loc["this model", "reads"] == report.verdict
    means = report.table.set_index(["battery", "metric", "set", "model"])["value"]
    nll = means["memorised", "nll", "forget", "unlearned"]
    assert table.loc["this model", "nll"] == pytest.approx(nll)
    assert table.loc["retrained", "nll"] == pytest.approx(nll)  # here it is the same model
    page = report.to_html()
    assert "Controls</h2>" in page and "no weight left its cell of int4" in page
    assert '"control": "head only"' in report.to_json()


def batches() -> Iterator[Any]:
    while True:
        yield from tiny.pairs(4)


def test_no_weight_leaves_its_cell_and_the_largest_does_not_move() -> None:
    original = tiny.llama(0)
    steps = iter([False] * 5 + [True])
    edited = in_int4_cells(original, batches(), 1e-2, lambda model: next(steps))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(edited.parameters(), original.parameters(), strict=True)
    ]
    assert any(moved)
    with rounded(edited, Int4(32)) as one, rounded(original, Int4(32)) as other:
        linear = [n for n, m in original.named_modules() if isinstance(m, nn.Linear)][:-1]
        for name in linear:
            assert torch.equal(one.get_submodule(name).weight, other.get_submodule(name).weight)


def test_cells_are_those_of_a_loop() -> None:
    model = tiny.llama(0)
    for weight, low, high in int4_cells(model):
        for row, lows, highs in zip(weight.detach(), low, high, strict=True):
            for start in range(0, len(row), 32):
                group = row[start : start + 32]
                most = group.abs().max()
                for x, a, b in zip(group, lows[start:], highs[start:], strict=False):
                    if abs(x) == most:
                        assert a == b == x
                        continue
                    code = round(float(x / most * 7))
                    inside = float(most) * 0.999
                    for bound, side in ((a, -0.49), (b, 0.49)):
                        wanted = np.clip((code + side) * float(most) / 7, -inside, inside)
                        assert float(bound) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        break  # one weight: the loop is slow


def test_the_head_alone_is_trained_and_is_tied_no_more() -> None:
    original = tiny.llama(0, tied=True)
    before = bits(original)
    steps = iter([False, True])
    model: Any = head_only(original, batches(), 1e-2, lambda model: next(steps))
    own, old = dict(model.named_parameters()), dict(original.named_parameters())
    assert {n for n in own if n not in old or not torch.equal(own[n], old[n])} == {"lm_head.weight"}
    assert (
        bits(original) == before and original.lm_head.weight is original.model.embed_tokens.weight
    )


def test_ascent_is_that_of_a_loop() -> None:
    original = tiny.llama(0)
    model = ascended(original, batches(), 1e-3, steps=3)
    twin = tiny.llama(0).eval()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    for batch, _ in zip(batches(), range(3), strict=False):
        loss = -twin(**batch["forget"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_shuffled_weights_are_the_same_numbers() -> None:
    original = tiny.llama(0)
    for one, other in zip(shuffled(original).parameters(), original.parameters(), strict=True):
        assert torch.equal(one.flatten().sort()[0], other.flatten().sort()[0])


def test_a_control_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    models = [tiny.llama(seed) for seed in range(2)]
    sets = {"forget": items(0), "retain": items(1), "holdout": items(2)}
    found = audit(*models, sets=sets, budget=BUDGET, batteries=["utility"], controls=True)
    table = found.controls
    assert isinstance(table, pd.DataFrame)
    reads = table.set_index("control")["reads"]
    assert {n for n, x in reads.items() if x == "could not be built"} == {
        "retrained", "head only", "int4 cells", "shuffled", "ascended",
    }  # fmt: skip
    assert found.manifest["skipped"]["control retrained"] == "No retrained model was given."
