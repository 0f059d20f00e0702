"""Violations against a loop: at which level, beyond what rounding, and against which average."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geffect import Recorder, Rectifier, Run, open_run
from geffect.analysis import conflict, rectification, violation
from geffect.layers import Parameter
from geffect.projection import SAGO
from geffect.projection.rules import nearest
from geffect.scores import LEVEL
from geffect.store.schema import RECTIFICATION_COLUMNS, VERSION, Contents, Row
from geffect.store.writer import RunWriter
from tests.utils import shallow as tiny
from tests.utils.rectified import losses_of

EPS = 2.0**-23
Vectors = list[Tensor]


def trained(
    path: Path, lr: float, steps: int = 4, *, world: bool = False, **how: Any
) -> tuple[Run, list[dict[str, Vectors]]]:
    """A recorded run of GA, and by step theta after, the update and the averages."""
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if how.get("space") == "update":
        how["optimizer"] = optimizer
    rectifier = Rectifier(model, **how)
    seen = []
    with Recorder(model, path, update=True) as recorder:
        for pair in tiny.pairs(steps, seed=0):
            before = [p.detach().clone() for p in model.parameters()]
            losses = losses_of(model, pair)
            if world:
                losses["world"] = losses_of(model, tiny.pairs(9)[8])["forget"]
            recorder.backward(objective={"forget": -1.0}, rectifier=rectifier, **losses)
            optimizer.step()
            optimizer.zero_grad()
            after = [p.detach().double() for p in model.parameters()]
            step = {
                "after": after,
                "update": [p - q.double() for p, q in zip(after, before, strict=True)],
            }
            averages = rectifier.watched.items()
            seen.append(step | {n: [r.detach().double() for r in v] for n, v in averages})
    return open_run(path), seen


def naive(step: dict[str, Vectors], members: list[int], average: str) -> tuple[float, float]:
    """The cosine of update and average over some parameters, and what rounding may do to it."""
    d, r, theta = ([step[name][i] for i in members] for name in ("update", average, "after"))
    inner = sum(float((a * b).sum()) for a, b in zip(d, r, strict=True))
    lengths = [sum(float((a * a).sum()) for a in v) ** 0.5 for v in (d, r)]
    rounded = sum(float(EPS * t.norm() * a.norm()) for t, a in zip(theta, r, strict=True))
    size = lengths[0] * lengths[1]
    return inner / size, 1e-6 + rounded / size


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_it_is_a_product_beyond_rounding_of_the_blocks_of_the_rectifier(
    tmp_path: Path, scope: str, lr: float
) -> None:
    run, seen = trained(tmp_path / "run.h5", lr, scope=scope)
    table = violation(run)
    assert LEVEL not in table
    label = {"model": lambda p: "model", "layer": lambda p: p.layer}[scope]
    rows = table.set_index(["step", scope])
    for block in dict.fromkeys(map(label, run.layers)):
        members = [i for i, p in enumerate(run.layers) if label(p) == block]
        for number, step in enumerate(seen):
            cosine, allowed = naive(step, members, "retain_ema")
            row = rows.loc[(number, block)]
            assert row["tolerance"] == pytest.approx(allowed, rel=1e-5)
            assert row["value"] == float(cosine > allowed)
    assert table["value"].mean() > 0, "a gradient that was rectified, and an adaptive optimizer"


@pytest.mark.parametrize("lr", [1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("scope", ["model", "group"])
def test_a_constraint_that_is_kept_is_not_broken_by_rounding(
    tmp_path: Path, lr: float, scope: str
) -> None:
    run, seen = trained(tmp_path / "run.h5", lr, space="update", scope=scope)
    everything = range(len(run.layers))
    harm = [naive(step, [*everything], "retain_ema")[0] for step in seen]
    assert violation(run)["value"].tolist() == [0.0] * len(violation(run))
    assert (np.abs(harm) > 1e-6).any() or lr > 1e-5, "which 1e-6 alone would count"
    quantity = rectification(run, scope).query("quantity == 'violated'")["value"]
    assert quantity.tolist() == violation(run)["value"].tolist()


def test_the_tolerance_grows_as_the_learning_rate_falls(tmp_path: Path) -> None:
    tolerances = [
        violation(trained(tmp_path / f"{lr}.h5", lr, steps=1, space="update")[0])["tolerance"][0]
        for lr in (1e-4, 1e-5)
    ]
    assert tolerances[1] - 1e-6 == pytest.approx(10 * (tolerances[0] - 1e-6), rel=0.05)


@pytest.mark.parametrize(
    ("how", "level"),
    [
        ({"scope": "model"}, "model"),
        ({"scope": "group"}, "group"),
        ({"scope": "layer"}, "layer"),
        ({"scope": "parameter"}, "parameter"),
        ({"scope": "coordinate"}, "parameter"),
        ({"rule": SAGO(), "ema": 1.0}, "parameter"),
        ({"select": 0.1, "scope": "layer"}, "layer"),
        ({"rule": None}, None),
        ({"rule": None, "scope": "layer"}, None),
        ({"rule": None, "select": 0.1}, None),
    ],
    ids=str,
)
def test_the_level_is_that_of_the_constraint(
    tmp_path: Path, how: dict[str, Any], level: str | None
) -> None:
    run, _ = trained(tmp_path / "run.h5", 1e-3, steps=1, **how)
    tables = violation(run), conflict(run)
    assert [table.columns[1] for table in tables] == ([level] * 2 if level else ["model", "layer"])
    finest = how.get("scope") == "coordinate" or isinstance(how.get("rule"), SAGO)
    for table in tables:
        told = table[LEVEL].unique().tolist() if LEVEL in table else []
        assert told == (
            ["the rectifier constrains each coordinate; each parameter is the finest of a run file"]
            if finest
            else []
        )


def test_another_level_is_said(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run.h5", 1e-3, steps=2)
    for table in (violation(run, "layer"), conflict(run, by="layer")):
        assert set(table[LEVEL]) == {"the rectifier constrains the model, not each layer"}
    (told,) = set(violation(run, lambda p: p.layer[:5])[LEVEL])
    assert told == "the rectifier constrains the model, not each group"


def test_every_average_that_is_protected_counts(tmp_path: Path) -> None:
    how = {"rule": nearest, "protect": ("retain", "world"), "space": "update"}
    run, seen = trained(tmp_path / "two.h5", 1e-3, world=True, **how)
    table = violation(run)
    assert list(table["against"].cat.categories) == ["retain", "world"]
    assert not table["value"].any()
    run, seen = trained(tmp_path / "one.h5", 1e-3, world=True, rule=None, protect="world")
    everything = [*range(len(run.layers))]
    expected = [
        float(cosine > allowed)
        for cosine, allowed in (naive(step, everything, "world_ema") for step in seen)
    ]
    assert violation(run)["value"].tolist() == expected
    assert "against" not in violation(run)


# Rows that were made


def made(path: Path, dtype: str, length: float, update: float = 1.0) -> Run:
    """A run of one parameter that rounding may have moved."""
    parameter = Parameter("w", "head", "head", -1, "w", (2,), dtype, ())
    writer = RunWriter(path, [parameter])
    manifest = {"format_version": VERSION, "rectifier": {}, "metadata": {}}
    sources = ("objective", "retain", "retain_ema", "update")
    writer.begin(Contents(sources=sources, manifest=manifest, blocks=("model",)))
    r, d = np.array([1.0, 0.0]), update * np.array([1e-4, 1.0])
    vectors = np.stack([r, r, r, d])
    gram = (vectors @ vectors.T)[None]
    lengths = np.array([length])
    numbers = np.full((1, len(RECTIFICATION_COLUMNS)), np.nan)
    row = Row(step=0, losses=np.zeros(4), gram=gram, lengths=lengths, rectification=numbers)
    writer.append(row)
    writer.close(complete=True)
    return open_run(path)


@pytest.mark.parametrize(
    ("dtype", "length", "found"),
    [
        ("float32", 0.0, 1.0),
        ("float32", 1.1e-4 / EPS, 0.0),
        ("float32", 0.9e-4 / EPS, 1.0),
        ("float64", 1.1e-4 / EPS, 1.0),
        ("bfloat16", 0.9e-4 / EPS, 1.0),  # what is lost to half precision is harm
        ("float32", 1.1 / EPS, np.nan),  # all of the update may be rounding
        ("float32", np.nan, 1.0),  # lengths that nobody wrote
    ],
)
def test_what_rounding_may_be(tmp_path: Path, dtype: str, length: float, found: float) -> None:
    run = made(tmp_path / "run.h5", dtype, length)
    np.testing.assert_array_equal(violation(run)["value"], [found])


def test_what_did_not_move_is_undefined(tmp_path: Path) -> None:
    assert np.isnan(violation(made(tmp_path / "run.h5", "float32", 1.0, update=0.0))["value"][0])
