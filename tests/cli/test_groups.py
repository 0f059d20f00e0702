"""Towers, depth groups and experts on the command line."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from geffect import Recorder, open_run
from geffect.analysis import g_effect
from tests.utils.command_line import Ask
from tests.utils.pages import Page

GROUPS = {
    "tower": ["encoder", "decoder"],
    "paper": ["encoder shallow", "encoder middle", "encoder other",
              "decoder shallow", "decoder middle", "decoder deep"],
    "code": ["encoder layers 0-9", "encoder other", "decoder layers 0-9", "decoder layers 10-19"],
}  # fmt: skip
COLUMNS = {"tower": "tower", "paper": "group", "code": "group", "expert": "expert"}


class Mixture(nn.Module):
    """A router and experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(1, 2, bias=False)
        self.experts = nn.Parameter(torch.ones(2, 1, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers, one of experts, and a number that is of no layer."""
    path = tmp_path_factory.mktemp("groups") / "towers.h5"
    layers = nn.ModuleList(nn.ModuleDict({"mlp": Mixture()}) for _ in range(2))
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": layers})})
    model["encoder"].temperature = nn.Parameter(torch.ones(1))
    deep = nn.ModuleList(nn.Sequential(nn.Linear(1, 1, False)) for _ in range(12))
    model["decoder"] = nn.ModuleDict({"layers": deep, "norm": nn.LayerNorm(1, bias=False)})
    with Recorder(model, path) as recorder:
        square = sum((parameter**2).sum() for parameter in model.parameters())
        recorder.backward(objective={"forget": -1.0}, forget=square, retain=square * 2)
    return path


@pytest.mark.parametrize("by", [*GROUPS, "expert"])
def test_scores_by_towers_depths_and_experts(ask: Ask, run: Path, by: str) -> None:
    said = ask("scores", run, "--by", by, "--format", "json")
    assert said.code == 0
    rows = json.loads(said.out)
    table = g_effect(open_run(run), by=by)
    assert [row[COLUMNS[by]] for row in rows] == table[COLUMNS[by]].tolist()
    if by in GROUPS:
        assert (
            list(dict.fromkeys(row["group" if by != "tower" else by] for row in rows)) == GROUPS[by]
        )
    whole = g_effect(open_run(run), by="model")["value"].sum()
    assert sum(row["value"] for row in rows) == pytest.approx(whole, rel=1e-9)


def test_experts_and_routers_are_rows(run: Path) -> None:
    table = g_effect(open_run(run), by="expert")
    assert list(table["expert"].cat.categories)[:4] == [
        "encoder layer 0 expert 0", "encoder layer 0 expert 1", "encoder layer 0 router",
        "encoder layer 1 expert 0",
    ]  # fmt: skip


def test_a_picture_and_a_page_by_group(ask: Ask, run: Path, tmp_path: Path) -> None:
    assert ask("plot", run, "-o", tmp_path / "picture.png", "--by", "tower").code == 0
    page = tmp_path / "page.html"
    assert ask("report", run, "-o", page, "--by", "code").code == 0
    shown = Page(page.read_text(encoding="utf-8"))
    assert "By code and step" in shown.words
    maps = [chart for chart in shown.charts if chart["kind"] == "map"]
    assert len(maps) == 3 and all(chart["blocks"] == GROUPS["code"] for chart in maps)


def test_info_says_towers_and_what_is_in_no_layer(ask: Ask, run: Path) -> None:
    facts = json.loads(ask("info", run, "--format", "json").out)
    assert facts["towers"] == ["encoder", "decoder"]
    assert facts["other"] == ["encoder.temperature"]
    lines = ask("info", run).out.splitlines()
    assert any(line.split() == ["other", "encoder.temperature"] for line in lines)
