"""What is told of SSU's masks: how much they keep, and what they have in common, against a loop."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from geffect import Recorder, Rectifier, open_run
from geffect.analysis import rectification
from geffect.layers import describe
from geffect.projection import SaliencyMask, Salient, orthogonal
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.rectified import losses_of, placed

STEPS = 4
OPTIONS: list[dict[str, Any]] = [
    {"rule": None},
    {},
    {"scope": "layer"},
    {"scope": "coordinate"},
    {"rule": orthogonal, "part": "forget"},
]


def steps_of(
    path: Path, space: str, options: dict[str, Any], c: float, record: bool = True
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A model after some steps, and what the mask of each is by hand."""
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    told = {**options, **placed(space, optimizer)}
    rectifier = Rectifier(model, select=SaliencyMask(c), **told)
    masks = []
    recorder = Recorder(model, path) if record else None
    for pair in tiny.pairs(STEPS):
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        u = -reference.flat(reference.gradient(twin, losses_of(twin, pair)["forget"])).double()
        masks.append(u.abs() >= u.abs().mean() + c * u.abs().std(correction=0))
        losses = {"objective": {"forget": -1.0}, **losses_of(model, pair)}
        if recorder is None:
            rectifier.backward(**losses)
        else:
            recorder.backward(rectifier=rectifier, **losses)
        optimizer.step()
    if recorder is not None:
        recorder.close()
    rectifier.detach()
    return model, masks


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_run_has_the_share_and_the_overlap(
    space: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if space == "update" and "part" in options:
        pytest.skip("a step has no parts")
    model, masks = steps_of(tmp_path / "run.h5", space, options, 0.5)
    by = "layer" if options.get("scope") == "layer" else "model"
    table = rectification(open_run(tmp_path / "run.h5"), by).set_index(["quantity", by, "step"])
    described = describe(model)
    label = torch.cat(
        [
            torch.full((row.numel,), number if by == "layer" else 0)
            for number, row in enumerate(described)
        ]
    )
    layers = [row.layer if by == "layer" else "model" for row in described]
    compared = 0
    for layer in dict.fromkeys(layers):
        own = torch.isin(label, torch.tensor([i for i, name in enumerate(layers) if name == layer]))
        for step, mask in enumerate(masks):
            share = mask[own].double().mean().item()
            assert table.loc[("selected", layer, step), "value"] == pytest.approx(share, abs=2e-3)
            found = table.loc[("overlap", layer, step), "value"]
            either = (mask | masks[step - 1])[own].sum().item() if step else 0
            if not either:
                assert math.isnan(found)
                continue
            both = (mask & masks[step - 1])[own].sum().item()
            compared += 1
            assert found == pytest.approx(both / either, abs=1e-2)
    assert compared >= STEPS - 1


def test_it_is_told_of_what_a_selection_has_to_be_told_of(tmp_path: Path) -> None:
    """Of a fraction of salient coordinates nothing is kept: that fraction is known."""
    model = tiny.llama()
    rectifier = Rectifier(model, select=Salient(0.1))
    rectifier.backward(objective={"forget": -1.0}, **losses_of(model, tiny.pairs(1)[0]))
    assert rectifier.report is not None and math.isnan(rectifier.report.selected[0])
    assert not rectifier._begun().earlier


def test_counting_changes_no_bit_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, _ = steps_of(tmp_path / "told.h5", "update", {}, 1.0)
    monkeypatch.setattr(SaliencyMask, "is_told", False)
    untold, _ = steps_of(tmp_path / "untold.h5", "update", {}, 1.0)
    for one, other in zip(told.parameters(), untold.parameters(), strict=True):
        assert torch.equal(one, other)
    found = rectification(open_run(tmp_path / "untold.h5"))
    assert not {"selected", "overlap"} & {*found["quantity"]}


def test_a_step_that_is_taken_back_is_not_held_against_the_next() -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rectifier = Rectifier(model, None, select=SaliencyMask(0.0))
    first, second, third = tiny.pairs(3)

    def asked(pair: Any) -> Any:
        optimizer.zero_grad()
        rectifier.backward(objective={"forget": -1.0}, **losses_of(model, pair))
        return rectifier.report

    asked(first)
    kept = {i: mask.clone() for i, mask in rectifier._begun().earlier.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geffect.projection.coordinates.Coordinates.change", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asked(second)
    assert all(torch.equal(mask, kept[i]) for i, mask in rectifier._begun().earlier.items())
    report = asked(third)
    u = reference.flat(reference.gradient(model, losses_of(model, third)["forget"])).abs()
    now, before = u >= u.mean(), torch.cat([kept[i].flatten() for i in sorted(kept)])
    expected = [float(now.sum()), float((now & before).sum()), float((now | before).sum())]
    found = [report.selected[0], report.selected_again[0], report.selected_either[0]]
    assert found == pytest.approx(expected, abs=3)


def test_what_the_optimizer_does_not_step_takes_no_part() -> None:
    """Attached to another optimizer, masks of what took part before are beside none."""
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 1, bias=False)
    )
    rectifier = Rectifier(model, None, select=SaliencyMask(-9.0), space="update",
                          optimizer=torch.optim.SGD(model.parameters(), lr=0.1))  # fmt: skip
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1),
                  torch.optim.SGD(model[1].parameters(), lr=0.1)]  # fmt: skip
    x = torch.tensor([1.0, 2.0, -1.0])
    for optimizer in optimizers:
        rectifier.attach(optimizer)
        rectifier.backward(objective=-model(x).sum(), retain=(model(2 * x) ** 2).sum())
        optimizer.step()
        model.zero_grad()
    report = rectifier.report
    assert report is not None
    assert (report.among, report.selected) == ((3.0,), (3.0,))
    assert (report.selected_again, report.selected_either) == ((3.0,), (12.0,))
